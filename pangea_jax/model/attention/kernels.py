"""Flash attention (Dao 2023) of packed causal rows: one kernel for each kind of device.

All kernels mask by segment and by index. None holds a [T, T] array or repeats the key heads for the query heads that
share them. Under a mesh every device computes its own rows and heads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pangea_jax.model.attention import blockwise
from pangea_jax.model.attention.segments import RESIDUALS
from pangea_jax.sharding import BATCH_SPEC, row_shards


def run(
    impl,
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Attention of every token to itself and to the tokens before it in its segment.

    `impl` is an `AttentionImpl` with the name of one of `KERNELS` and without `obstacle`. Results of padding (segment
    0) are finite but meaningless: it sees itself, and in some kernels the padding before it.
    """
    T = q.shape[1]
    block_q, block_kv, length = _blocks(impl, T)
    kernel = functools.partial(
        KERNELS[impl.name].call, block_q=block_q, block_kv=block_kv, interpret=impl.interpret
    )
    padding = [(0, 0), (0, length - T)]
    q, k, v = (jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, padding)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows = BATCH_SPEC[0]
        heads = P(rows, None, "tensor", None)
        # Pallas does not say how outputs vary over the mesh, so JAX cannot check it.
        kernel = jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(heads, heads, heads, P(rows, None)),
            out_specs=heads,
            check_vma=False,
        )
    return kernel(q, k, v, segment_ids)[:, :T]


def obstacle(impl, q: Array, k: Array, packed: bool) -> str | None:
    """Why the kernel that `impl` names cannot serve a call, or None. `packed`: rows have segment ids and positions."""
    kernel = KERNELS[impl.name]
    if not packed:
        return "it takes segment_ids and positions"
    found = platform()
    if found != kernel.platform and not impl.interpret:
        return f"it runs on {kernel.platform}, this is {found}"
    if kernel.head_widths and q.shape[3] not in kernel.head_widths:
        return f"head width {q.shape[3]} is not one of {kernel.head_widths}"
    if kernel.dtypes and q.dtype not in kernel.dtypes and not impl.interpret:
        return f"it takes {' or '.join(kernel.dtypes)}, not {q.dtype}"
    for name in ("block_q", "block_kv"):
        block = getattr(impl, name)
        if block is not None and (block not in kernel.blocks):
            return f"{name} {block} is not one of {', '.join(map(str, kernel.blocks))}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        for count, what, parts in (
            (q.shape[0], "rows", row_shards(mesh)),
            (k.shape[2], "key heads", mesh.shape["tensor"]),
        ):
            if count % parts:
                return f"{count} {what} do not divide over {parts} devices of the mesh"
    return None


def platform() -> str:
    """The platform that the traced code will run on: that of the mesh in context, or else JAX's default.

    The mesh may be one for ahead-of-time compilation.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def unknown_placement() -> str | None:
    """Why `auto` must not choose a kernel, or None. XLA cannot split a kernel over devices by itself."""
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "there are several devices and no mesh in context (jax.set_mesh)"
    return None


def _blocks(impl, T: int) -> tuple[int, int, int]:
    """Sizes of the blocks, at most the row, and the padded length of the row, a multiple of both."""
    kernel = KERNELS[impl.name]
    longest = _round_up(T, min(kernel.blocks))
    least_padding = min(kernel.blocks, key=lambda size: -T % size)
    block_q = min(impl.block_q or kernel.block_q or least_padding, longest)
    block_kv = min(impl.block_kv or kernel.block_kv or least_padding, longest)
    return block_q, block_kv, _round_up(T, math.lcm(block_q, block_kv))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _splash(q, k, v, segment_ids, *, block_q, block_kv, interpret):
    """TPU: JAX's splash attention, which skips the blocks above the diagonal."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, H, C = q.shape
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * H),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * C**-0.5, k, v))
    mixed = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return mixed.swapaxes(1, 2)


def _triton(q, k, v, segment_ids, *, block_q, block_kv, interpret):
    """NVIDIA GPUs: our own kernel, which also skips the blocks of other segments.

    JAX's Triton kernel computes these blocks and then masks them, and it is deprecated. JAX's cuDNN attention needs a
    [T, T] mask for segments.
    """
    from pangea_jax.model.attention import triton  # imports Pallas, which others do not need

    blocks = triton.Blocks(block_q, block_kv, interpret=interpret)
    return triton.attention(q, k, v, segment_ids, blocks)


def _blockwise(q, k, v, segment_ids, *, block_q, block_kv, interpret):
    """CPUs: plain JAX that skips the blocks of other segments."""
    del interpret  # it runs on every device
    return blockwise.attention(q, k, v, segment_ids, block_q=block_q, block_kv=block_kv)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The platform, limits and default block sizes of a kernel.

    Attributes:
      head_widths, dtypes: what it supports; empty means everything.
      blocks: block sizes it supports.
      block_q, block_kv: default block sizes. None stands for the first of `blocks` that pads a row least.
      shortest: for rows with fewer tokens plain JAX is faster.
    """

    call: Callable[..., Array]
    platform: str
    blocks: tuple[int, ...]
    block_q: int | None = None
    block_kv: int | None = None
    head_widths: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    shortest: int = 0


KERNELS = {
    "splash": Kernel(
        _splash,
        platform="tpu",
        head_widths=(64, 128),
        dtypes=("bfloat16", "float32"),
        blocks=tuple(range(128, 2048 + 1, 128)),
        block_q=1024,
        block_kv=1024,
    ),
    "triton": Kernel(
        _triton,
        platform="gpu",
        head_widths=(32, 64, 128),
        dtypes=("bfloat16", "float16"),  # float32 outgrows the shared memory of a multiprocessor
        blocks=(64, 128),
        block_q=128,
        block_kv=128,
    ),
    "blockwise": Kernel(_blockwise, platform="cpu", blocks=(64, 48, 80), shortest=385),
}
