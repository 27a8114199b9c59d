"""Compares the official sample of PangeaIns with the reference implementation of LLaVA-NeXT.

`golden_labels.jsonl.gz` has the result of `preprocess_multimodal` and `preprocess_qwen` for each
record, `golden_images.jsonl.gz` the result of `process_anyres_image` and `unpad_image` for each picture.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pangea_jax.anyres import layout
from pangea_jax.data import chat
from pangea_jax.data.image import check, decode, views
from pangea_jax.data.pipeline import PipelineConfig, measure, render_example
from pangea_jax.data.reader import Geometry, Reader, ReadingPolicy, Tiles
from pangea_jax.data.record import Conversation
from pangea_jax.data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
SAMPLE = Path(os.environ.get("PANGEAINS_SAMPLE", SHARED / "pangeains_sample"))
QWEN3 = SHARED / "tokenizer_qwen3"
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
STD = np.array((0.26862954, 0.26130258, 0.27577711))
SPLIT_OFF, IGNORED = -200, -100
CONFIG = PipelineConfig(rows=1, row_tokens=8192, row_tiles=20, loss_mask="pangea")
# The policy of configs/pangea_7b_finetune.py; tests/test_reading.py checks that they are equal.
POLICY = ReadingPolicy(marker_first=True, multi_image="padded")

pytestmark = pytest.mark.skipif(
    not (SAMPLE / "golden_labels.jsonl.gz").is_file() or not (QWEN3 / "tokenizer.json").is_file(),
    reason="the official PangeaIns sample and a Qwen tokenizer are not beside this checkout",
)


def golden(name):
    with gzip.open(SAMPLE / f"golden_{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


class Folder:
    """A folder of pictures with the part of a store that `Tiles` needs."""

    orientation = "stored"

    def image(self, key):
        return (SAMPLE / key).read_bytes()


class Index:
    """Has only the sizes of the records' pictures."""

    orientation = "stored"

    def __init__(self, records):
        keys = [key for record in records for key in record.images]
        sizes = [check(SAMPLE / key) for key in keys]
        width, height = zip(*sizes, strict=True)
        self.image_index = pa.table({"key": keys, "width": width, "height": height})


@pytest.fixture(scope="module")
def records():
    released = json.loads((SAMPLE / "PangeaIns.json").read_text(encoding="utf-8"))
    return [Conversation.from_pangeains(one, default_language="en") for one in released]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(QWEN3, image_id=151_669)


def test_ids_and_labels_of_every_record(records, tokenizer):
    labels = golden("labels")
    assert len(labels) == len(records) == 135
    for expected in labels:
        record = records[expected["index"]]
        places = [np.zeros(1, np.int32)] * len(record.images)
        rendered = chat.render(
            record.turns,
            tokenizer,
            places,
            tiles_per_image=[1] * len(places),
            loss_mask="pangea",
            move_marker_first=True,
        )
        ids = np.where(rendered.image_index >= 0, SPLIT_OFF, rendered.tokens)
        assert ids.tolist() == expected["input_ids"], record.id
        found = np.where(rendered.trained, rendered.tokens, IGNORED)
        assert found.tolist() == expected["labels"], record.id


def test_tiles_grids_and_token_counts_of_every_picture(records):
    pictures = golden("images")
    assert len(pictures) == sum(len(record.images) for record in records) == 120
    for expected in pictures:
        key = records[expected["index"]].images[0]
        image = decode(SAMPLE / key)
        assert list(image.size) == expected["size"] == list(check(SAMPLE / key))
        found = layout(image.size, PINPOINTS, 336, 24)
        assert list(found.canvas) == expected["best"]
        assert found.num_tiles == expected["views"]
        assert list(found.features[::-1]) == expected["unpadded"]
        assert len(found.image_index) == expected["image_tokens"]
        tiles = (views(image, PINPOINTS, 336) / np.float32(255) - MEAN) / STD
        pooled = tiles.reshape(len(tiles), 12, 28, 12, 28, 3).mean((2, 4)).transpose(0, 3, 1, 2)
        reference = np.array(expected["pooled12"]).reshape(pooled.shape)
        np.testing.assert_allclose(pooled, reference, atol=0.01, err_msg=key)


def test_examples_are_the_reference_with_pictures_put_in(records, tokenizer):
    """The input of training: shifted by one, with as many image tokens as in the reference."""
    reader = Reader(tokenizer, Tiles(Geometry(PINPOINTS, 336, 24), POLICY, Folder()))
    pictures = golden("images")
    image_tokens = {one["index"]: one["image_tokens"] for one in pictures}
    views_of = {one["index"]: one["views"] for one in pictures}
    for expected in golden("labels")[::5]:
        record = records[expected["index"]]
        example = render_example(record, None, reader, CONFIG)
        width = image_tokens.get(expected["index"], 0)
        ids, labels = [], []
        for id, label in zip(expected["input_ids"], expected["labels"], strict=True):
            repeat = width if id == SPLIT_OFF else 1
            ids += [tokenizer.image_id if id == SPLIT_OFF else id] * repeat
            labels += [label] * repeat
        assert example.tokens.tolist() == ids
        assert example.targets[:-1].tolist() == ids[1:]
        trained = np.array([label != IGNORED for label in labels[1:]] + [False])
        assert np.array_equal(example.weights > 0, trained)
        assert (example.image_index >= 0).sum() == width
        assert len(example.tiles) == views_of.get(expected["index"], 0)


def test_the_lengths_of_the_sample_are_measured_without_decoding(records, tokenizer):
    few = records[::9]
    reader = Reader(tokenizer, Tiles(Geometry(PINPOINTS, 336, 24), POLICY, Index(few)))
    sizes = measure(few, reader, CONFIG)
    image_tokens = {one["index"]: one for one in golden("images")}
    labels = {one["index"]: one for one in golden("labels")}
    for i, (tokens, tiles, targets) in zip(range(0, 135, 9), sizes.tolist(), strict=True):
        width = image_tokens[i]["image_tokens"] if i in image_tokens else 0
        assert tokens == len(labels[i]["input_ids"]) - bool(width) + width
        assert tiles == (image_tokens[i]["views"] if width else 0)
        assert targets == sum(label != IGNORED for label in labels[i]["labels"][1:])
