"""Shows a batch to a person: its words, with trained tokens in colour, and a sheet of its tiles."""

import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from pangea_jax.batch import Batch
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.figures import inert

TRAINED, CONTEXT, PICTURE = "bold green", "dim", "cyan"
_SHEET_WIDTH, _GAP = 1600, 4
_UNUSED = (60, 60, 60)


def trained_tokens(row: Batch) -> np.ndarray:
    """bool [T]: true at the tokens that are predicted, not at the positions that predict them."""
    trained = np.zeros(len(row.tokens), bool)
    trained[1:] = (row.weights[:-1] > 0) & (row.segment_ids[1:] == row.segment_ids[:-1])
    return trained


def render_row(row: Batch, tokenizer: Tokenizer, patches: int) -> Iterator:
    """Yields rich renderables: a rule and the words of every segment, with one phrase per image."""
    trained, pictured = trained_tokens(row), row.image_index >= 0
    segments = row.segment_ids
    for segment in range(1, int(segments.max(initial=0)) + 1):
        places = np.flatnonzero(segments == segment)
        start, count = places[0], len(places)
        targets = int(np.count_nonzero(row.weights[places]))
        yield Rule(f"segment {segment}: {count} tokens from {start}, {targets} trained")
        text = Text()
        for (is_picture, is_trained), run in itertools.groupby(
            places, key=lambda t: (bool(pictured[t]), bool(trained[t]))
        ):
            run = list(run)
            if is_picture:
                index = row.image_index[run]
                tiles = (index[index > 0] - 1) // patches
                text.append(
                    f"[{len(run)} places of tiles {tiles.min()} to {tiles.max()}]", style=PICTURE
                )
            else:
                words = tokenizer.decode(row.tokens[run].tolist(), skip_special=False)
                text.append(inert.visible(words), style=TRAINED if is_trained else CONTEXT)
        yield text


def describe(batch: Batch, patches: int) -> str:
    """One line: rows, conversations, padding, tile fill, trained tokens."""
    segments = batch.segment_ids
    used = np.maximum((batch.image_index.max(axis=1) - 1) // patches + 1, 0).sum()
    rows, tiles = batch.pictures.shape[:2]
    targets = np.count_nonzero(batch.weights)
    return (
        f"{rows} rows of {segments.shape[1]} tokens and {tiles} tiles: "
        f"{segments.max(axis=1).sum()} conversations, {np.mean(segments == 0):.1%} padding, "
        f"{used / max(rows * tiles, 1):.1%} of the tiles filled, {targets} tokens trained "
        f"({targets / max(np.count_nonzero(segments), 1):.1%})"
    )


def print_batch(
    batch: Batch, tokenizer: Tokenizer, patches: int, console: Console, *, rows: int
) -> None:
    """Prints the first `rows` rows, with the trained tokens in colour."""
    console.print(describe(batch, patches), highlight=False)
    for r in range(min(rows, len(batch))):
        row = batch[r]
        padding = np.mean(row.segment_ids == 0)
        console.print(Rule(f"row {r}, {padding:.1%} padding", characters="=", style="bold"))
        for part in render_row(row, tokenizer, patches):
            console.print(part)


def contact_sheet(batch: Batch, patches: int, *, rows: int) -> Image.Image:
    """A picture of the tiles of the first `rows` rows. Unused tiles are crossed out."""
    tiles, index = batch.tiles[:rows], batch.image_index[:rows]
    count, per_row, side = tiles.shape[0], tiles.shape[1], tiles.shape[2]
    columns = min(per_row, max(1, _SHEET_WIDTH // (min(side, 160) + _GAP)))
    shown = min(side, (_SHEET_WIDTH // columns) - _GAP)
    lines = math.ceil(per_row / columns)
    step = shown + _GAP
    sheet = Image.new(
        "RGB", (columns * step + _GAP, count * (lines * step + 2 * _GAP) + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for r, n in np.ndindex(count, per_row):
        x = _GAP + (n % columns) * step
        y = _GAP + r * (lines * step + 2 * _GAP) + (n // columns) * step
        if n * patches < index[r].max():
            tile = Image.fromarray(tiles[r, n]).resize((shown, shown), Image.Resampling.BILINEAR)
            sheet.paste(tile, (x, y))
        else:
            draw.rectangle((x, y, x + shown - 1, y + shown - 1), outline=_UNUSED)
            draw.line((x, y, x + shown - 1, y + shown - 1), fill=_UNUSED)
    return sheet


def save_batch(
    batch: Batch,
    tokenizer: Tokenizer,
    patches: int,
    directory: Path,
    *,
    rows: int = 8,
    name: str = "first_batch",
) -> str:
    """Writes `name`.html with the words, and `name`.png if there are tiles; returns `describe`.

    Training calls this once, because most mistakes in the data are visible only here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.html").open("w", encoding="utf-8") as file:
        console = inert.console(record=True, file=io.StringIO(), width=160)
        print_batch(batch, tokenizer, patches, console, rows=rows)
        file.write(console.export_html())
    if batch.tiles is not None:
        contact_sheet(batch, patches, rows=rows).save(directory / f"{name}.png")
    return describe(batch, patches)
