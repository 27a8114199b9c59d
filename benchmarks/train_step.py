"""A pass of training over the same conversations, packed here, padded in transformers: useful tokens a second.

    taskset -c 0 python -m benchmarks.train_step --store=data/pangeains      # lengths and picture sizes of a store
    taskset -c 0 python -m benchmarks.train_step                             # drawn like those of PangeaIns

A 50M-parameter model in float32 (`benchmarks/peer.py`) takes the same optimiser steps in both, from the same weights:
forward, backward, clipping and AdamW of all parameters. What differs is how a batch is made of conversations:

    packed    rows of 2,048 tokens that several conversations share, as launch/train.py makes them
    grouped   one conversation a row, those of a batch about equally long, padded to the longest (the paper's sampler)
    shuffled  one conversation a row, in random order, padded to the longest of the batch

transformers is timed on `grouped` and `shuffled`, ours on `packed`, and on `shuffled` too, which shows what is gained
without packing. Useful tokens are those of conversations, padding is none. A tile is 64 tokens here and 576 in
Pangea: a row is to a conversation about what 8,192 tokens are there. Conversations longer than half a row are cut.
Contents are random, which costs the same.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import peer
from pangea_jax import anyres
from pangea_jax.data.packing import fill_rows, plan_rows, size
from pangea_jax.model import params as model_params
from pangea_jax.model.vision import normalize
from pangea_jax.sharding import make_mesh
from pangea_jax.train.state import TrainState
from pangea_jax.train.step import make_train_step

ROW_TOKENS, LONGEST, CONVERSATIONS, BATCH = 2048, 1024, 16, 4
MAX_TILES = 5
LEARNING_RATE, CLIP = 1e-5, 1.0


def shapes_like_pangeains(rng) -> list[tuple[int, tuple[int, int] | None]]:
    """(words, picture size) of conversations: of the released sample's records 89 % have a picture, and their words
    are about log-normal with median 220."""
    words = np.exp(rng.normal(np.log(220), 0.9, CONVERSATIONS)).astype(int)
    sizes = [(640, 480), (480, 640), (1024, 768), (336, 336), (500, 375)]
    return [
        (int(n), sizes[rng.integers(len(sizes))] if rng.random() < 0.89 else None) for n in words
    ]


def shapes_of_store(folder: str, rng) -> list[tuple[int, tuple[int, int] | None]]:
    """(words, picture size) of conversations drawn from a store's index."""
    rows = pq.read_table(Path(folder) / "index.parquet", columns=["num_tokens", "image_sizes"])
    rows = [row for row in rows.to_pylist() if len(row["image_sizes"]) <= 1]
    chosen = rng.permutation(len(rows))[:CONVERSATIONS]
    return [
        (
            rows[i]["num_tokens"],
            tuple(rows[i]["image_sizes"][0]) if rows[i]["image_sizes"] else None,
        )
        for i in chosen
    ]


def make_example(words: int, picture, rng) -> dict[str, np.ndarray]:
    """A picture, then words, of which the last third is trained; cut at `LONGEST`."""
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
    targets = np.roll(tokens, -1)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": weights,
        "image_index": index.astype(np.int32),
        "tiles": tiles,
        "picture": picture,
    }


def in_batches(order) -> list[list[int]]:
    return [list(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]


def padded(examples, batches):
    """Our batches of one conversation a row, each as long as the longest of all, so that one program serves."""
    longest = max(len(example["tokens"]) for example in examples)
    return [
        fill_rows([[examples[i]] for i in batch], longest, MAX_TILES, peer.CONFIG.vision.patches)
        for batch in batches
    ]


def packed(examples):
    """Our batches, a packed row each: about as many conversations as `BATCH`."""
    sizes = np.array([size(example) for example in examples])
    capacity = (ROW_TOKENS, MAX_TILES * len(examples), ROW_TOKENS)
    plan = plan_rows(sizes, capacity, seed=0, window=len(examples))
    rows = [[examples[i] for i in plan[row]] for row in range(len(plan))]
    tiles = max(sum(len(example["tiles"]) for example in row) for row in rows)
    return [
        fill_rows([row], ROW_TOKENS, tiles, peer.CONFIG.vision.patches, examples[0]) for row in rows
    ]


def our_pass(ours, batches):
    """A function that takes one step a batch; returns the last loss."""
    config = dataclasses.replace(
        ours.config,
        vision=dataclasses.replace(ours.config.vision, scan_unroll=ours.config.vision.used_layers),
        language=dataclasses.replace(ours.config.language, scan_unroll=ours.config.language.layers),
    )
    ours.config, ours.vision.config, ours.language.config = config, config.vision, config.language
    graphdef, params = model_params.split(ours)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    copied = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), copied, {}, optimizer.init(copied))
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), state)
    targets = max(int((batch["weights"] > 0).sum(axis=1).max()) for batch in batches)
    step = make_train_step(graphdef, optimizer, everywhere, mesh, max_targets=targets)
    states = [jax.device_put(state, everywhere)]

    def train():
        for batch in batches:
            states[0], metrics = step(states[0], batch)
        return jax.block_until_ready((metrics["loss"], states[0]))[0]

    return train


def their_pass(theirs, examples, batches):
    """The same in transformers, each batch padded to its longest."""
    import torch

    inputs = []
    for batch in batches:
        longest = max(len(examples[i]["tokens"]) for i in batch)
        ids = torch.full((len(batch), longest), peer.PAD_ID)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            n = len(examples[i]["tokens"])
            ids[row, :n] = torch.tensor(examples[i]["tokens"])
            mask[row, :n] = 1
            trained = np.roll(examples[i]["weights"], 1) > 0
            labels[row, :n][torch.tensor(trained)] = ids[row, :n][torch.tensor(trained)]
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        shown = [examples[i] for i in batch if examples[i]["picture"]]
        if shown:
            most = max(len(example["tiles"]) for example in shown)
            tiles = [
                np.pad(e["tiles"], [(0, most - len(e["tiles"])), (0, 0), (0, 0), (0, 0)])
                for e in shown
            ]
            pixels = np.asarray(normalize(jnp.asarray(np.stack(tiles)))).transpose(0, 1, 4, 2, 3)
            given["pixel_values"] = torch.tensor(pixels)
            given["image_sizes"] = torch.tensor([e["picture"][::-1] for e in shown])
        inputs.append(given)
    theirs.train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)

    def train():
        for given in inputs:
            optimizer.zero_grad(set_to_none=True)
            loss = theirs(**given, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
            optimizer.step()
        return loss.item()

    return train


def main():
    parser = peer.parser(__doc__, repetitions=2)
    parser.add_argument("--store", help="folder of a store that launch/build_data.py made")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shapes = shapes_of_store(args.store, rng) if args.store else shapes_like_pangeains(rng)
    examples = [make_example(words, picture, rng) for words, picture in shapes]
    lengths = np.array([len(example["tokens"]) for example in examples])
    useful = int(lengths.sum())
    orders = {
        "grouped": in_batches(np.argsort(lengths)),
        "shuffled": in_batches(range(len(lengths))),
    }
    rows = packed(examples)
    print(peer.machine())
    print(
        f"{len(examples)} conversations, {useful} tokens, {lengths.min()} to {lengths.max()} each; useful share of "
        f"token places: packed {useful / (len(rows) * ROW_TOKENS):.0%}, "
        + ", ".join(
            f"{name} {useful / sum(len(b) * lengths[b].max() for b in batches):.0%}"
            for name, batches in orders.items()
        )
    )
    ours, theirs = peer.make_pair()
    sides = {
        "ours, packed": our_pass(ours, rows),
        "ours, shuffled": our_pass(ours, padded(examples, orders["shuffled"])),
        **{
            f"transformers, {name}": their_pass(theirs, examples, batches)
            for name, batches in orders.items()
        },
    }
    times = peer.alternate(sides, args.repetitions)
    for name, seconds in times.items():
        print(f"{name:24} {useful / np.median(seconds[:, 0]):7,.0f} useful tokens/s")
    for mine, theirs in itertools.product(list(sides)[:2], list(sides)[2:]):
        clock, processor = np.median(times[theirs] / times[mine], axis=0)
        print(
            f"{mine}, beside {theirs}: {clock:.2f} times as fast by the clock, {processor:.2f} by processor time"
        )


if __name__ == "__main__":
    main()
