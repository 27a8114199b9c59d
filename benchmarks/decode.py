"""Decoding beside transformers' `generate`: same CPU, same weights, same prompt, in turn in one process.

    python -m benchmarks.decode [--repetitions=7]

A 50M-parameter model in float32 (`benchmarks/peer.py`), a 640x480 picture and 32 words a row, 64 greedy tokens from a
KV cache. The time is that of generating 64 tokens less that of generating one. Prints tokens a second, the ratio, and
the bytes of weights read a second beside what one vector times a large matrix reads here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import peer
from pangea_jax.generate.decode import complete, last_hidden

WORDS, NEW = 32, 64
NO_STOP = -1
DECODER = re.compile(r"language_model|lm_head")


def generate_pair(ours, theirs, rows: int):
    """Functions of the number of new tokens; both return the tokens."""
    import torch

    batch, inputs = peer.make_inputs(rows, WORDS)
    graphdef, state = nnx.split(ours)

    @functools.partial(jax.jit, static_argnums=2)
    def generate(state, batch, new):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.prefill(batch, batch["tokens"].shape[1] + new)
        last, lengths = last_hidden(hidden, batch["segment_ids"])
        stop_ids = jnp.array([NO_STOP])
        return complete(model, last, lengths, cache, max_new_tokens=new, stop_ids=stop_ids)

    @torch.no_grad()
    def reference(new):
        out = theirs.generate(
            **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[:, -new:].numpy()

    return lambda new: generate(state, batch, new), reference


def measure(generate, reference, repetitions: int) -> peer.Times:
    """Seconds of all tokens but the first, which the prefill makes."""
    same = np.array_equal(generate(NEW), reference(NEW))
    print(f"{NEW} tokens a row are {'the same' if same else 'NOT the same'}")
    first = peer.in_turn(lambda: generate(1), lambda: reference(1), repetitions)
    whole = peer.in_turn(lambda: generate(NEW), lambda: reference(NEW), repetitions)
    return peer.Times(
        whole.ours - np.median(first.ours, axis=0), whole.theirs - np.median(first.theirs, axis=0)
    )


def main():
    args = peer.arguments(__doc__, repetitions=7)
    ours, theirs = peer.make_pair()
    # As `pangea_jax.load` does on a CPU.
    ours.language.unstack()
    print(peer.machine())
    reached = {}
    for rows in (1, 8):
        times = measure(*generate_pair(ours, theirs, rows), args.repetitions)
        print(times.report(f"decode a token, {rows} row{'s' * (rows > 1)}", per=NEW - 1))
        for name, seconds in (("ours", times.ours), ("transformers", times.theirs)):
            print(f"    {name}: {rows * (NEW - 1) / np.median(seconds[:, 0]):.0f} tokens/s")
        reached[rows] = times.ours[:, 0].min() / (NEW - 1)
    weights = [p for name, p in theirs.named_parameters() if DECODER.search(name)]
    embedding = peer.CONFIG.language.vocab_size * peer.CONFIG.language.width
    read = 4 * (sum(parameter.numel() for parameter in weights) - embedding)
    print(
        f"a token reads {read / 1e6:.0f} MB of weights: {read / reached[1] / 1e9:.1f} GB/s at best, of "
        f"{peer.read_bandwidth() / 1e9:.1f} GB/s that a matrix-vector product reads"
    )


if __name__ == "__main__":
    main()
