"""Compares useful tokens per second of a pass of training: packed rows here, padded rows in transformers.

    taskset -c 0 python -m benchmarks.train_step --store=data/pangeains      # lengths and picture sizes of a store
    taskset -c 0 python -m benchmarks.train_step                             # drawn like those of PangeaIns

A 50M-parameter model in float32 (`benchmarks/peer.py`) takes the same optimiser steps on both sides, from the same
weights: forward, backward, clipping and AdamW of all parameters. The batches differ:

    packed    rows of 2,048 tokens that several conversations share, as launch/train.py makes them
    grouped   one conversation per row, in a batch of similar lengths, padded to the longest (the paper's sampler)
    shuffled  one conversation per row, in random order, padded to the longest of the batch

transformers is timed on `grouped` and `shuffled`, ours on `packed` and `shuffled`. Useful tokens are those of
conversations, without padding. A tile is 64 tokens here and 576 in Pangea, so rows of 2,048 tokens correspond to rows
of about 8,192 there. Conversations longer than half a row are cut. Contents are random, which costs the same.
"""

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import peer
from pangea_jax import anyres
from pangea_jax.batch import Batch, Example
from pangea_jax.data.packing import plan_rows

ROW_TOKENS, LONGEST, BATCH, MAX_TILES = 2048, 1024, 4, 5


def shapes_like_pangeains(count: int, rng) -> list[tuple[int, tuple[int, int] | None]]:
    """(words, picture size) of conversations as in the released sample: 89 % of its records have a picture, and the
    numbers of words are about log-normal with median 220."""
    words = np.exp(rng.normal(np.log(220), 0.9, count)).astype(int)
    sizes = [(640, 480), (480, 640), (1024, 768), (336, 336), (500, 375)]
    return [
        (int(n), sizes[rng.integers(len(sizes))] if rng.random() < 0.89 else None) for n in words
    ]


def shapes_of_store(folder: str, count: int, rng) -> list[tuple[int, tuple[int, int] | None]]:
    """(words, picture size) of random conversations of a store."""
    rows = pq.read_table(Path(folder) / "index.parquet", columns=["num_tokens", "image_sizes"])
    rows = [row for row in rows.to_pylist() if len(row["image_sizes"]) <= 1]
    chosen = [rows[i] for i in rng.permutation(len(rows))[:count]]
    sizes = [tuple(row["image_sizes"][0]) if row["image_sizes"] else None for row in chosen]
    return [(row["num_tokens"], size) for row, size in zip(chosen, sizes, strict=True)]


def make_example(words: int, picture, rng) -> Example:
    """A picture, then words, of which the last third is trained; at most `LONGEST` tokens."""
    vision = peer.CONFIG.vision
    tile = (vision.image_size, vision.image_size, 3)
    index, tiles = np.zeros(0, np.int32), np.zeros((0, *tile), np.uint8)
    if picture:
        found = anyres.layout(
            picture, peer.CONFIG.pinpoints, vision.image_size, vision.grid, "transformers"
        )
        index = found.image_index
        tiles = rng.integers(0, 256, (found.num_tiles, *tile), np.uint8)
    words = min(words, LONGEST - len(index))
    index = np.concatenate([index, np.full(words, -1, np.int32)])
    tokens = np.where(index < 0, rng.integers(0, peer.IMAGE_ID, len(index)), peer.IMAGE_ID)
    weights = (np.arange(len(index)) >= len(index) - 1 - words // 3).astype(np.float32)
    weights[-1] = 0
    tokens = tokens.astype(np.int32)
    return Example(tokens, index, tiles, targets=np.roll(tokens, -1), weights=weights)


def in_batches(order) -> list[list[int]]:
    return [list(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]


def padded(examples, batches):
    """Our batches of one conversation per row. All rows are as long as the longest, so there is only one program."""
    longest = max(len(example.tokens) for example in examples)
    return [
        Batch.fill([[examples[i]] for i in batch], longest, MAX_TILES, peer.CONFIG.vision.patches)
        for batch in batches
    ]


def packed(examples):
    """Our batches of one packed row each, with about `BATCH` conversations."""
    sizes = np.array([example.size for example in examples])
    capacity = (ROW_TOKENS, MAX_TILES * len(examples), ROW_TOKENS)
    plan = plan_rows(sizes, capacity, seed=0, window=len(examples))
    rows = [[examples[i] for i in plan[row]] for row in range(len(plan))]
    tiles = max(sum(len(example.tiles) for example in row) for row in rows)
    return [
        Batch.fill([row], ROW_TOKENS, tiles, peer.CONFIG.vision.patches, examples[0])
        for row in rows
    ]


def their_batches(examples, pictures, batches):
    """Inputs of transformers: each batch is padded to its longest conversation. `pictures` are sizes, or None."""
    import torch

    inputs = []
    for batch in batches:
        longest = max(len(examples[i].tokens) for i in batch)
        ids = torch.full((len(batch), longest), peer.PAD_ID)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            n = len(examples[i].tokens)
            ids[row, :n] = torch.tensor(examples[i].tokens)
            mask[row, :n] = 1
            trained = torch.tensor(np.roll(examples[i].weights, 1) > 0)
            labels[row, :n][trained] = ids[row, :n][trained]
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        shown = [i for i in batch if pictures[i]]
        if shown:
            most = max(len(examples[i].tiles) for i in shown)
            tiles = [
                np.pad(tiles, [(0, most - len(tiles)), (0, 0), (0, 0), (0, 0)])
                for tiles in (examples[i].tiles for i in shown)
            ]
            given["pixel_values"] = peer.their_pixels(np.stack(tiles))
            given["image_sizes"] = torch.tensor([pictures[i][::-1] for i in shown])
        inputs.append(given)
    return inputs


def main():
    parser = peer.parser(__doc__, repetitions=2)
    parser.add_argument("--store", help="folder of a store that launch/build_data.py made")
    parser.add_argument("--conversations", type=int, default=16)
    args = parser.parse_args()
    rng, count = np.random.default_rng(0), args.conversations
    drawn = (args.store, count, rng)
    shapes = shapes_of_store(*drawn) if args.store else shapes_like_pangeains(*drawn[1:])
    examples = [make_example(words, picture, rng) for words, picture in shapes]
    lengths = np.array([len(example.tokens) for example in examples])
    useful = int(lengths.sum())
    orders = {
        "grouped": in_batches(np.argsort(lengths)),
        "shuffled": in_batches(range(len(lengths))),
    }
    rows = packed(examples)
    print(peer.machine("torch", "transformers"))
    places = {"packed": len(rows) * ROW_TOKENS}
    for name, batches in orders.items():
        places[name] = sum(len(batch) * lengths[batch].max() for batch in batches)
    print(
        f"{len(examples)} conversations, {useful} tokens, {lengths.min()} to {lengths.max()} each; useful share of "
        "token places: " + ", ".join(f"{name} {useful / n:.0%}" for name, n in places.items())
    )
    ours, theirs = peer.make_pair()
    sides = {
        "ours, packed": peer.our_steps(ours, rows),
        "ours, shuffled": peer.our_steps(ours, padded(examples, orders["shuffled"])),
    }
    for name, batches in orders.items():
        inputs = their_batches(examples, [picture for _, picture in shapes], batches)
        sides[f"transformers, {name}"] = peer.their_steps(theirs, inputs)
    times = peer.alternate(sides, args.repetitions)
    for name, seconds in times.items():
        print(f"{name:24} {useful / np.median(seconds[:, 0]):7,.0f} useful tokens/s")
    for mine, other in itertools.product(list(sides)[:2], list(sides)[2:]):
        clock, processor = np.median(times[other] / times[mine], axis=0)
        print(
            f"{mine}, beside {other}: {clock:.2f} times as fast by the clock, {processor:.2f} by processor time"
        )


if __name__ == "__main__":
    main()
