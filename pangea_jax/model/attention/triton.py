"""Flash attention (Dao 2023) of packed rows for NVIDIA GPUs, a Pallas kernel compiled by Triton.

A segment of a packed row is a run of neighbouring tokens, so a query sees a range of keys: from the first token of its
segment to itself. The kernels read only that range: a row of 8,192 tokens with four conversations costs a quarter of a
causal kernel that masks by segment id. Query heads that share a key head read it in place. Its gradient is summed over
them in float32.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pangea_jax.model.attention.segments import RESIDUALS, UNSEEN, ranges

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens that a program works on at once. The backward pass holds more arrays, so it has smaller blocks."""

    q: int
    kv: int
    backward: int = 64
    interpret: bool = False


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"],
    blocks: Blocks,
) -> Float[Array, "B T H C"]:
    """Attention of every token to itself and to the tokens before it in its segment.

    Args:
      segment_ids: tokens of a segment are neighbours. A run of padding (0) is a segment too, with finite but
        meaningless results.
      blocks: each divides T.
    """
    starts, ends = ranges(segment_ids)
    return _attention(q, k, v, starts, ends, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, starts, ends, blocks):
    return _forward(q, k, v, starts, blocks)[0]


def _attention_fwd(q, k, v, starts, ends, blocks):
    # Names by which `keep` can choose them.
    mixed, highest = (checkpoint_name(x, RESIDUALS) for x in _forward(q, k, v, starts, blocks))
    return mixed, (q, k, v, starts, ends, mixed, highest)


def _attention_bwd(blocks, kept, cotangent):
    q, k, v, starts, ends, mixed, highest = kept
    # Subtracted from the gradient of every weight in the softmax: "D" in the paper.
    shared = jnp.einsum("BTHC,BTHC->BHT", mixed, cotangent, preferred_element_type=jnp.float32)
    of_queries = cotangent, highest, shared
    dq = _backward_q(q, k, v, starts, of_queries, blocks)
    dk, dv = _backward_kv(q, k, v, ends, of_queries, blocks)
    return dq, dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(q, k, v, starts, blocks):
    """Mixed values, and log2 of the sum of 2 ** logits, [B, H, T]."""
    B, T, H, C = q.shape
    rows, keys, numbers, edges = _specs(q, k, blocks.q)
    return _call(
        functools.partial(_forward_kernel, block=blocks.kv, scale=C**-0.5 * LOG2_E),
        "packed_attention",
        [(q, rows), (k, keys), (v, keys), (starts, edges)],
        [(q, rows), (jax.ShapeDtypeStruct((B, H, T), jnp.float32), numbers)],
        grid=(B, H, T // blocks.q),
        num_warps=4 if C <= 64 else 8,
        interpret=blocks.interpret,
    )


def _backward_q(q, k, v, starts, of_queries, blocks):
    """Gradient of the queries."""
    B, T, H, C = q.shape
    rows, keys, numbers, edges = _specs(q, k, blocks.backward)
    inputs = [(q, rows), (k, keys), (v, keys), (starts, edges)]
    (dq,) = _call(
        functools.partial(_backward_q_kernel, block=blocks.backward, scale=C**-0.5),
        "packed_attention_dq",
        [*inputs, *zip(of_queries, (rows, numbers, numbers))],
        [(q, rows)],
        grid=(B, H, T // blocks.backward),
        interpret=blocks.interpret,
    )
    return dq


def _backward_kv(q, k, v, ends, of_queries, blocks):
    """Gradients of keys and values, summed over the query heads that share them."""
    cotangent, highest, shared = of_queries
    B, T, H, C = q.shape
    K = k.shape[2]
    G = H // K
    q, cotangent = (x.reshape(B, T, K, G, C) for x in (q, cotangent))
    highest, shared = (x.reshape(B, K, G, T) for x in (highest, shared))
    rows, _, _, edges = _specs(k, k, blocks.backward)
    heads = pl.BlockSpec((None, T, None, G, C), lambda b, h, i: (b, 0, h, 0, 0))
    numbers = pl.BlockSpec((None, None, G, T), lambda b, h, i: (b, h, 0, 0))
    inputs = [(q, heads), (k, rows), (v, rows), (ends, edges), (cotangent, heads)]
    return _call(
        functools.partial(_backward_kv_kernel, block=blocks.backward, scale=C**-0.5),
        "packed_attention_dkv",
        [*inputs, (highest, numbers), (shared, numbers)],
        [(k, rows), (v, rows)],
        grid=(B, K, T // blocks.backward),
        interpret=blocks.interpret,
    )


def _specs(rows, keys, size):
    """The blocks that program (b, h, i) reads, in four kinds of arrays.

    `rows` [B, T, H, C]: block i of head h. `keys` [B, T, K, C]: all tokens of its key head. Numbers [B, H, T] and edges
    [B, T]: block i.
    """
    _, T, H, C = rows.shape
    G = H // keys.shape[2]
    return (
        pl.BlockSpec((None, size, None, C), lambda b, h, i: (b, i, h, 0)),
        pl.BlockSpec((None, T, None, C), lambda b, h, i: (b, 0, h // G, 0)),
        pl.BlockSpec((None, None, size), lambda b, h, i: (b, h, i)),
        pl.BlockSpec((None, size), lambda b, h, i: (b, i)),
    )


def _call(kernel, name, inputs, outputs, *, grid, interpret, num_warps=4):
    """Runs a kernel. `inputs` and `outputs` are pairs (array or its shape, spec)."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*(array for array, _ in inputs))


def _places(size):
    """Indices of the program's tokens in the row."""
    return pl.program_id(2) * size + jnp.arange(size)


def _key_blocks(starts, block):
    """The range of key blocks that some query of the program sees: first, and last + 1."""
    stop = (pl.program_id(2) + 1) * len(starts)
    return lax.div(jnp.min(starts), block), lax.div(stop + block - 1, block)


def _keys(k_ref, v_ref, queries, starts, j, block):
    """Block j of keys and values, and which of them each query sees."""
    window = pl.dslice(j * block, block)
    keys = j * block + jnp.arange(block)
    seen = (keys[None] <= queries[:, None]) & (keys[None] >= starts[:, None])
    return plgpu.load(k_ref.at[window, :]), plgpu.load(v_ref.at[window, :]), seen


def _forward_kernel(q_ref, k_ref, v_ref, starts_ref, *outputs, block, scale):
    mixed_ref, highest_ref = outputs
    size, C = q_ref.shape
    queries, starts, q = _places(size), starts_ref[...], q_ref[...]

    def body(j, carry):
        mixed, highest, total = carry
        k, v, seen = _keys(k_ref, v_ref, queries, starts, j, block)
        logits = jnp.where(seen, plgpu.dot(q, k.T) * scale, UNSEEN)
        higher = jnp.maximum(highest, logits.max(axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(highest - higher)
        mixed = mixed * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return mixed, higher, total * shrink + weights.sum(axis=1)

    mixed = jnp.zeros((size, C), jnp.float32)
    start = (mixed, jnp.full(size, -jnp.inf), jnp.zeros(size, jnp.float32))
    mixed, highest, total = lax.fori_loop(*_key_blocks(starts, block), body, start)
    mixed_ref[...] = (mixed / total[:, None]).astype(mixed_ref.dtype)
    highest_ref[...] = highest + jnp.log2(total)


def _backward_q_kernel(q_ref, k_ref, v_ref, starts_ref, *refs, block, scale):
    *of_queries, dq_ref = refs
    size, C = q_ref.shape
    queries, starts, q = _places(size), starts_ref[...], q_ref[...]
    cotangent, highest, shared = (ref[...] for ref in of_queries)

    def body(j, dq):
        k, v, seen = _keys(k_ref, v_ref, queries, starts, j, block)
        logits = plgpu.dot(q, k.T) * (scale * LOG2_E)
        weights = jnp.where(seen, jnp.exp2(logits - highest[:, None]), 0.0)
        slope = weights * (plgpu.dot(cotangent, v.T) - shared[:, None])
        return dq + plgpu.dot(slope.astype(k.dtype), k)

    zero = jnp.zeros((size, C), jnp.float32)
    dq = lax.fori_loop(*_key_blocks(starts, block), body, zero)
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _backward_kv_kernel(q_ref, k_ref, v_ref, ends_ref, *refs, block, scale):
    """Rows of all matrices are keys and columns are queries, so nothing is transposed twice."""
    cotangent_ref, highest_ref, shared_ref, dk_ref, dv_ref = refs
    size, C = k_ref.shape
    G = q_ref.shape[1]
    keys, ends = _places(size), ends_ref[...]
    k, v = k_ref[...], v_ref[...]
    first = lax.div(pl.program_id(2) * size, block)
    count = lax.div(jnp.max(ends) + block, block) - first

    def body(step, carry):
        dk, dv = carry
        head, j = lax.div(step, count), first + lax.rem(step, count)
        window = pl.dslice(j * block, block)
        q = plgpu.load(q_ref.at[window, head, :])
        cotangent = plgpu.load(cotangent_ref.at[window, head, :])
        highest = plgpu.load(highest_ref.at[head, window])
        shared = plgpu.load(shared_ref.at[head, window])
        queries = j * block + jnp.arange(block)
        seen = (queries[None] >= keys[:, None]) & (queries[None] <= ends[:, None])
        logits = plgpu.dot(k, q.T) * (scale * LOG2_E)
        weights = jnp.where(seen, jnp.exp2(logits - highest[None]), 0.0)
        dv += plgpu.dot(weights.astype(v.dtype), cotangent)
        slope = weights * (plgpu.dot(v, cotangent.T) - shared[None])
        return dk + plgpu.dot(slope.astype(q.dtype), q), dv

    zero = jnp.zeros((size, C), jnp.float32)
    dk, dv = lax.fori_loop(0, G * count, body, (zero, zero))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
