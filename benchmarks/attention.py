"""Attention of packed rows: compares the backends of `pangea_jax/model/attention`.

    python -m benchmarks.attention                                    # xla and triton on a GPU: 2 rows of 8,192 tokens
    python -m benchmarks.attention --impls=xla,blockwise --rows=1 --row_tokens=512      # a small try on a CPU

The shapes are those of the 7B: 28 query heads, 4 key heads, 128 channels, bfloat16, conversations of 300 to 3,000
tokens. Prints the median milliseconds of the forward pass, and of forward and backward pass, and the largest relative
error against `xla`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peer
from pangea_jax.model.attention import attention

HEADS, KEY_HEADS, CHANNELS = 28, 4, 128


def packed_rows(rows: int, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions [rows, row_tokens] of rows without padding."""
    rng = np.random.default_rng(0)
    ids, positions = np.zeros((2, rows, row_tokens), np.int32)
    for row in range(rows):
        start = segment = 0
        while start < row_tokens:
            segment, length = segment + 1, min(rng.integers(300, 3001), row_tokens - start)
            ids[row, start : start + length] = segment
            positions[row, start : start + length] = np.arange(length)
            start += length
    return ids, positions


def measure(impls: list[str], rows: int, row_tokens: int, repetitions: int) -> dict[str, tuple]:
    """By backend: milliseconds of the forward pass, of forward and backward, and the largest relative error."""
    ids, positions = packed_rows(rows, row_tokens)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    *qkv, g = (
        jax.random.normal(key, (rows, row_tokens, n, CHANNELS), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    measured, expected = {}, None
    for impl in impls:
        mix = functools.partial(attention, segment_ids=ids, positions=positions, impl=impl)
        forward = jax.jit(mix)
        both = jax.jit(lambda *qkv, mix=mix: (mix(*qkv), *jax.vjp(mix, *qkv)[1](g)))
        found = [np.asarray(x, np.float32) for x in both(*qkv)]
        expected = expected or found
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected)]
        calls = {"forward": lambda f=forward: f(*qkv), "both": lambda f=both: f(*qkv)}
        times = peer.alternate(calls, repetitions)
        medians = (1e3 * float(np.median(seconds[:, 0])) for seconds in times.values())
        measured[impl] = (*medians, max(errors))
    return measured


def main():
    parser = peer.parser(__doc__, repetitions=10)
    parser.add_argument(
        "--impls", default="xla,triton", help="backends; the first is the reference"
    )
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--row_tokens", type=int, default=8192)
    args = parser.parse_args()
    rows, tokens, device = args.rows, args.row_tokens, jax.devices()[0].device_kind
    print(f"{peer.machine()}, {device}; {rows} x {tokens} tokens")
    measured = measure(args.impls.split(","), rows, tokens, args.repetitions)
    for impl, (forward, both, error) in measured.items():
        times = f"forward {forward:8.2f} ms, with backward {both:8.2f} ms"
        print(f"{impl:10} {times}, error {error:.1e}")


if __name__ == "__main__":
    main()
