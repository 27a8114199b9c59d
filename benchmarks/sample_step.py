"""Compares a training step of the sample with its matrix products alone, and counts how full its rows are.

    python -m benchmarks.sample_step
    python -m benchmarks.sample_step --point=languages=all

Prints conversations, tokens and trained tokens of a batch; the median time of a step; and what the matrix products of
that step take if nothing else runs: every product of the forward pass and of both gradients, on random values of the
same shapes, each compiled on its own. Steps and products are timed in turn, so that both meet the same machine.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer
from configs import sample
from launch import common
from pangea_jax import experiment, sharding
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import init_state
from pangea_jax.typed_config import build

PRODUCTS_EVERY = 10
"""Steps between two timings of the products."""

Product = tuple[int, int, int, int]
"""[a, b, c] of a product [a, b] @ [b, c], and how many there are."""


def forward_products(exp: experiment.Experiment) -> Iterator[tuple[str, Product]]:
    """The products of the forward pass of decoder and projector; the tower's features are computed before."""
    feed, model, lm = exp.pipeline, exp.model, exp.model.language
    tokens, patches = feed.rows * feed.row_tokens, feed.rows * feed.row_tiles * model.vision.patches
    heads, kv = lm.heads * lm.head_width, lm.kv_heads * lm.head_width
    yield "projector in", (patches, model.vision.width, lm.width, 1)
    yield "projector out", (patches, lm.width, lm.width, 1)
    for name, shape in {
        "query": (lm.width, heads),
        "key": (lm.width, kv),
        "value": (lm.width, kv),
        "output": (heads, lm.width),
        "gate": (lm.width, lm.mlp),
        "up": (lm.width, lm.mlp),
        "down": (lm.mlp, lm.width),
    }.items():
        yield name, (tokens, *shape, lm.layers)
    scores = feed.rows * lm.heads * lm.layers
    yield "queries by keys", (feed.row_tokens, lm.head_width, feed.row_tokens, scores)
    yield "weights by values", (feed.row_tokens, feed.row_tokens, lm.head_width, scores)
    yield "head", (feed.rows * feed.max_targets, lm.width, lm.vocab_size, 1)


def products_of_step(exp: experiment.Experiment) -> list[Product]:
    """All products of a step: forward, and the gradients of both factors. Features of pictures need no gradient."""
    products = []
    for name, (a, b, c, count) in forward_products(exp):
        products.append((a, b, c, count))
        products.append((b, a, c, count))
        if name != "projector in":
            products.append((a, c, b, count))
    return products


class Products:
    """Matrix products to time: equal ones, such as those of the heads, run as one batch."""

    def __init__(self, products: list[Product]):
        merged: dict[tuple[int, int, int], int] = {}
        for *shape, count in products:
            merged[tuple(shape)] = merged.get(tuple(shape), 0) + count
        self.flops = sum(2 * a * b * c * n for (a, b, c), n in merged.items())
        self._run = jax.jit(jnp.matmul)
        keys = jax.random.split(jax.random.key(0), len(merged))
        self._parts = []
        for key, ((a, b, c), count) in zip(keys, merged.items(), strict=True):
            # Small products in a batch, large ones again and again: the memory stays small.
            batch = min(count, max(1, 2**22 // (a * b + b * c + a * c)))
            one = jax.random.normal(key, (batch, a, b))
            self._parts.append((one, jax.random.normal(key, (batch, b, c)), count / batch))
        self.seconds()

    def seconds(self) -> float:
        """Seconds of all products."""
        total = 0.0
        for one, other, times in self._parts:
            start = time.perf_counter()
            jax.block_until_ready(self._run(one, other))
            total += times * (time.perf_counter() - start)
        return total


def measure(exp: experiment.Experiment, steps: int) -> dict:
    """The printed figures of `steps` steps."""
    mesh = sharding.make_mesh(**dataclasses.asdict(exp.mesh))
    store, tokenizer = experiment.open_data(exp)
    choice = experiment.choose_records(exp, store)
    pretrained = experiment.load_pretrained(exp.model, exp.pretrained, mesh)
    cache = common.cache_directory("features")
    features = experiment.cached_features(exp, pretrained, store, mesh, cache)
    reader = experiment.make_reader(exp, store, tokenizer, features)
    batches = experiment.make_feed(exp, store, choice, reader)
    total = experiment.number_of_steps(exp, batches)
    optimizer = optim.make_optimizer(exp.optimizer, total)
    graphdef, state, shardings = init_state(
        exp.model, optimizer, mesh, seed=exp.seed, frozen=exp.frozen, pretrained=pretrained
    )
    step = experiment.make_step(exp, graphdef, optimizer, shardings, mesh)
    products = Products(products_of_step(exp))
    taken, alone, tokens, trained = [], [], [], []
    for number, batch in enumerate(itertools.islice(batches, steps + 1)):
        tokens.append(int((np.asarray(batch.segment_ids) > 0).sum()))
        trained.append(int((np.asarray(batch.weights) > 0).sum()))
        placed = batch.place(mesh)
        start = time.perf_counter()
        state, metrics = step(state, placed)
        jax.block_until_ready((state, metrics))
        taken.append(time.perf_counter() - start)
        if number % PRODUCTS_EVERY == 0:
            alone.append(products.seconds())
    return {
        "slots": exp.pipeline.rows * exp.pipeline.row_tokens,
        "tokens": np.mean(tokens),
        "trained": np.mean(trained),
        "step": np.median(taken[1:]),
        "products": np.median(alone),
        "flops": products.flops,
    }


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("--point", help="argument of configs/sample.py, such as en_ratio=0.8")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    exp = build(experiment.Experiment, sample.get_config(args.point))
    found = measure(exp, args.steps)
    feed, slots = exp.pipeline, found["slots"]
    rate = found["flops"] / found["products"] / 1e9
    print(peer.machine())
    print(f"configs/sample.py:{args.point or ''}")
    print(f"{feed.examples} conversations a step, {feed.rows} rows of {feed.row_tokens} tokens")
    for name in ("tokens", "trained"):
        print(f"{name:18} {found[name]:8.0f} of {slots} ({found[name] / slots:.1%})")
    per_second = feed.examples / found["step"]
    print(f"step               {found['step'] * 1e3:8.1f} ms, {per_second:.0f} conversations/s")
    print(f"its products alone {found['products'] * 1e3:8.1f} ms, {rate:.0f} GFLOP/s")
    print(f"step / products    {found['step'] / found['products']:8.2f}")


if __name__ == "__main__":
    main()
