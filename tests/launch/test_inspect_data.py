"""launch/inspect_data.py shows what is in the batch."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pangea_jax.batch import Batch, Example
from pangea_jax.data import batch_view
from tests.launch.conftest import call


def example(letters, text, answer, tiles):
    """`text`, a place for each patch of `tiles` tiles, and `answer`. Only the answer is trained."""
    words, said = letters.encode(text), letters.encode(answer)
    tokens = np.array([*words, *[letters.image_id] * (4 * tiles), *said], np.int32)
    index = np.full(len(tokens), -1, np.int32)
    index[len(words) : len(words) + 4 * tiles] = np.arange(1, 4 * tiles + 1)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(tokens) - len(said) - 1 : -1] = 1
    colour = np.full((tiles, 6, 6, 3), 40 * tiles, np.uint8)
    targets = np.append(tokens[1:], 0).astype(np.int32)
    return Example(tokens, index, colour, targets=targets, weights=weights)


@pytest.fixture(scope="module")
def batch(letters):
    first = example(letters, "What? ", "cat", 1)
    second = example(letters, "And [this]? ", "dog!", 2)
    return Batch.fill([[first, second], [second]], 64, 4, 4)


def printed(batch, letters, rows):
    console = Console(file=io.StringIO(), width=200, record=True)
    batch_view.print_batch(batch, letters, 4, console, rows=rows)
    return console


def test_what_is_trained_is_coloured(batch, letters):
    row = batch[0]
    said = letters.decode(row.tokens[batch_view.trained_tokens(row)].tolist())
    assert said == "catdog!"
    texts = [part for part in batch_view.render_row(row, letters, 4) if hasattr(part, "spans")]
    coloured = [
        (text.plain[span.start : span.end], span.style) for text in texts for span in text.spans
    ]
    assert coloured == [
        ("What? ", batch_view.CONTEXT),
        ("[4 places of tiles 0 to 0]", batch_view.PICTURE),
        ("cat", batch_view.TRAINED),
        ("And [this]? ", batch_view.CONTEXT),
        ("[8 places of tiles 1 to 2]", batch_view.PICTURE),
        ("dog!", batch_view.TRAINED),
    ]


def test_the_shares_are_those_of_the_batch(batch, letters):
    text = printed(batch, letters, rows=1).export_text()
    used = 6 + 4 + 3 + 2 * (12 + 8 + 4)
    assert f"2 rows of 64 tokens and 4 tiles: 3 conversations, {1 - used / 128:.1%} padding" in text
    assert "62.5% of the tiles filled, 11 tokens trained" in text
    assert "segment 2: 24 tokens from 13, 4 trained" in text
    assert "row 1" not in text
    assert "row 1" in printed(batch, letters, rows=5).export_text()


def test_the_sheet_shows_every_tile_in_its_place(batch, letters, tmp_path):
    line = batch_view.save_batch(batch, letters, 4, tmp_path)
    assert "3 conversations" in line
    page = (tmp_path / "first_batch.html").read_text()
    assert "And [this]?" in page
    sheet = np.asarray(Image.open(tmp_path / "first_batch.png"))
    gap, side = 4, 6
    rows = [gap + r * (side + gap + 2 * gap) for r in range(2)]
    for y, colours in zip(rows, ([40, 80, 80, None], [80, 80, None, None]), strict=True):
        for n, colour in enumerate(colours):
            x = gap + n * (side + gap)
            tile = sheet[y : y + side, x : x + side]
            assert (tile == colour).all() if colour else (tile[0, 0] == 60).all()


def test_features_have_no_sheet(batch, letters, tmp_path):
    features = np.zeros((2, 4, 4, 8), np.float16)
    batch = dataclasses.replace(batch, tiles=None, features=features)
    batch_view.save_batch(batch, letters, 4, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["first_batch.html"]


def test_the_command(tmp_path):
    def run(*more):
        flags = ("--config=configs/sample.py", "--n=2", f"--workdir={tmp_path}", *more)
        return call("launch/inspect_data.py", *flags)

    done = run("--skip=3")
    assert done.returncode == 0, done.stderr
    assert "16 rows of 208 tokens and 6 tiles: 64 conversations" in " ".join(done.stdout.split())
    assert "row 1" in done.stdout
    assert "row 2" not in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"batch.html", "batch.png"}
    assert Image.open(tmp_path / "batch.png").width > 100
    wrong = run("--skip=9999")
    assert wrong.returncode == 1
    assert "after --skip=9999: the chosen examples make 750 batches of 16 rows" in wrong.stderr
    streamed = ("--config.pipeline.packing=best_fit", "--config.pipeline.examples_per_row=1")
    wrong = run("--skip=9", "--config.mixture.num_examples=60", *streamed)
    assert wrong.returncode == 1
    assert "after --skip=9: the chosen examples make fewer batches of 16 rows" in wrong.stderr
