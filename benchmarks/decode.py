"""Compares decoding with transformers' `generate`: same CPU, weights and prompt, in turn in one process.

    python -m benchmarks.decode [--repetitions=7]
    python -m benchmarks.decode --alone              # the 7B on a GPU or TPU, without transformers

A 50M-parameter model in float32 (`benchmarks/peer.py`), a 640x480 picture and 32 words per row, 64 greedy tokens from a
KV cache. The time is that of generating 64 tokens minus that of generating one. Prints tokens per second, the ratio,
and the bytes of weights read per second, compared with the product of one vector and a large matrix. `--alone` decodes
with random weights of the full size in bfloat16, with 1, 8 and 32 rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import peer
from pangea_jax.batch import Batch
from pangea_jax.generate.decode import complete, last_hidden
from pangea_jax.model import Pangea, PangeaConfig

WORDS, NEW = 32, 64
NO_STOP = -1


def make_generate(ours):
    """A function of a batch and the number of new tokens; it returns the tokens."""
    graphdef, state = nnx.split(ours)

    @functools.partial(jax.jit, static_argnums=2)
    def generate(state, batch, new):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.prefill(batch, batch.tokens.shape[1] + new)
        last, lengths = last_hidden(hidden, batch.segment_ids)
        stop_ids = jnp.array([NO_STOP])
        return complete(model, last, lengths, cache, max_new_tokens=new, stop_ids=stop_ids)

    return functools.partial(generate, state)


def generate_pair(ours, theirs, rows: int):
    """Functions of the number of new tokens; both return the tokens."""
    import torch

    batch, inputs = peer.make_inputs(rows, WORDS)
    generate = make_generate(ours)

    @torch.no_grad()
    def reference(new):
        out = theirs.generate(
            **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[:, -new:].numpy()

    return lambda new: generate(batch, new), reference


def measure(generate, reference, repetitions: int) -> peer.Times:
    """Seconds of all tokens but the first, which the prefill makes."""
    same = np.array_equal(generate(NEW), reference(NEW))
    print(f"{NEW} tokens a row are {'the same' if same else 'NOT the same'}")
    first = peer.in_turn(lambda: generate(1), lambda: reference(1), repetitions)
    whole = peer.in_turn(lambda: generate(NEW), lambda: reference(NEW), repetitions)
    return peer.Times(
        whole.ours - np.median(first.ours, axis=0), whole.theirs - np.median(first.theirs, axis=0)
    )


def alone(config: PangeaConfig, repetitions: int, rows=(1, 8, 32), words: int = 512) -> None:
    """Decodes after prompts of random words with random weights, and prints a line for each number of rows."""

    @nnx.jit
    def make():
        model = Pangea(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(config.dtype), nnx.state(model)))
        return model

    model = make()
    decoder = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model.language)))
    read = decoder if config.language.tied_head else decoder - model.language.embedding_vd.nbytes
    generate = make_generate(model)
    print(f"{jax.devices()[0].device_kind}, {read / 1e9:.2f} GB of weights, {words} words a row")
    for count in rows:
        shape, image = (count, words), config.vision.image_size
        rng = np.random.default_rng(0)
        batch = Batch(
            tokens=rng.integers(0, config.language.vocab_size, shape, np.int32),
            image_index=np.full(shape, -1, np.int32),
            positions=np.tile(np.arange(words, dtype=np.int32), (count, 1)),
            segment_ids=np.ones(shape, np.int32),
            tiles=np.zeros((count, 0, image, image, 3), np.uint8),
        )
        calls = {new: functools.partial(generate, batch, new) for new in (1, NEW)}
        times = peer.alternate(calls, repetitions)
        first, whole = (np.median(times[new][:, 0]) for new in (1, NEW))
        token = (whole - first) / (NEW - 1)
        print(
            f"{count:3} rows: {1e3 * token:.2f} ms a token, {count / token:,.0f} tokens/s, "
            f"weights read at {read / token / 1e9:,.0f} GB/s",
            flush=True,
        )


def main():
    parser = peer.parser(__doc__, repetitions=7)
    parser.add_argument("--alone", action="store_true", help="the 7B, without transformers")
    args = parser.parse_args()
    if args.alone:
        return alone(PangeaConfig(dtype="bfloat16"), args.repetitions)
    ours, theirs = peer.make_pair()
    ours.language.unstack()  # as `pangea_jax.load` does on a CPU
    print(peer.machine("torch", "transformers"))
    reached = {}
    for rows in (1, 8):
        times = measure(*generate_pair(ours, theirs, rows), args.repetitions)
        print(times.report(f"decode a token, {rows} row{'s' * (rows > 1)}", per=NEW - 1))
        for name, seconds in (("ours", times.ours), ("transformers", times.theirs)):
            print(f"    {name}: {rows * (NEW - 1) / np.median(seconds[:, 0]):.0f} tokens/s")
        reached[rows] = times.ours[:, 0].min() / (NEW - 1)
    weights = nnx.state(ours.language)
    read = sum(x.nbytes for x in jax.tree.leaves(weights)) - ours.language.embedding_vd.nbytes
    print(
        f"a token reads {read / 1e6:.0f} MB of weights: {read / reached[1] / 1e9:.1f} GB/s at best, of "
        f"{peer.read_bandwidth() / 1e9:.1f} GB/s that a matrix-vector product reads"
    )


if __name__ == "__main__":
    main()
