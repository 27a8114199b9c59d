"""Layers and functions that the vision tower and the decoder share."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pangea_jax.model.lora import Lora
from pangea_jax.model.quantized import Quantized

# Values of `keep=`, and what each keeps of a block's forward pass for the backward pass: the values with these
# `checkpoint_name`s, or every value (None). The backward pass computes the rest again; under "products" the rest has no
# matrix product. Each line needs more memory than the one before, but "offload" uses the host's memory.
KEEP = {
    "none": (),
    "attention": ("attention",),
    "qkv": ("q", "k", "v", "attention"),
    "offload": ("q", "k", "v", "attention"),
    "products": ("q", "k", "v", "attention", "o", "gate", "up"),
    "all": None,
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype) -> nnx.Param:
    """A parameter drawn from N(0, stddev^2)."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype))


def kernel(
    rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype, form: str, inputs=(0,)
) -> nnx.Param | Quantized:
    """`normal`, or the same in a form of `pangea_jax.model.quantized`; `inputs`: the contracted axes."""
    if form:
        return Quantized(rngs, shape, inputs, form, stddev)
    return normal(rngs, shape, stddev, dtype)


def zeros(shape: tuple[int, ...], dtype) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype))


def stack_blocks(block, num_layers: int, rngs: nnx.Rngs):
    """`num_layers` copies of `block(rngs)`, each initialised on its own; every parameter gets a leading axis L.

    The layers run as one `jax.lax.scan`, so program size and compile time do not depend on the depth.
    """
    make = nnx.vmap(block, in_axes=(0,), transform_metadata={nnx.PARTITION_NAME: None})
    return make(rngs.split(num_layers))


def unstack_blocks(blocks) -> nnx.List:
    """Stacked blocks as a list. Each stacked parameter is freed as soon as it is split."""
    graphdef, state = nnx.split(blocks)
    state = nnx.to_flat_state(state)
    layers: list[list] = [[] for _ in range(len(state[0][1].get_value()))]
    for path, variable in state:
        stacked = variable.get_value()
        for layer, found in enumerate(layers):
            found.append((path, variable.replace(stacked[layer])))
        if not isinstance(stacked, jax.core.Tracer):
            jax.block_until_ready([found[-1][1].get_value() for found in layers])
            stacked.delete()
    return nnx.List([nnx.merge(graphdef, nnx.from_flat_state(found)) for found in layers])


def run_blocks(body, carry, blocks, *, unroll: int = 1):
    """Runs `carry = body(carry, block, layer)` for all blocks, stacked or unstacked, and returns the last carry."""
    if isinstance(blocks, nnx.List):
        for layer, block in enumerate(blocks):
            carry = body(carry, block, layer)
        return carry

    def step(carry, stacked):
        return body(carry, *stacked), None

    layers = jnp.arange(len(jax.tree.leaves(blocks)[0]))
    return jax.lax.scan(step, carry, (blocks, layers), unroll=unroll)[0]


def checkpoint(body, keep: str):
    """`body`, the code of a block, which then keeps only what `keep` (a key of `KEEP`) says and recomputes the rest.

    Raises:
      ValueError: an unknown `keep`.
    """
    if keep not in KEEP:
        raise ValueError(f"keep {keep!r} is not one of {', '.join(KEEP)}")
    names = KEEP[keep]
    if names is None:
        return body
    if keep == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
    # Forward and backward pass are two loops. XLA does not merge across loops, so `prevent_cse` is not needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _in_turn(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Returns both unchanged. On a CPU the kernel is not used before x is computed.

    XLA's CPU backend multiplies bfloat16 in float32. Without the barrier it widens the kernels of all layers before the
    first product, which takes twice the model's size in memory.
    """
    if x.dtype == jnp.float32:
        return x, kernel
    return jax.lax.platform_dependent(
        x, kernel, cpu=lambda *both: jax.lax.optimization_barrier(both), default=lambda *both: both
    )


def linear(
    x: Float[Array, "... D"],
    kernel: nnx.Param | Quantized,
    bias: nnx.Param | None = None,
    *,
    inputs: int = 1,
    lora: Lora | None = None,
) -> Float[Array, "..."]:
    """Contracts the last `inputs` axes of x with the first `inputs` axes of the kernel, in x's dtype.

    The adapter's product and the bias are added. It is written as one matrix product, because XLA's CPU backend runs a
    product with more free axes about three times slower. On an accelerator both are equally fast.
    """
    rows = x.shape[: x.ndim - inputs]
    width = math.prod(x.shape[x.ndim - inputs :])
    if isinstance(kernel, Quantized):
        features = kernel.codes.shape[inputs:]
        x = x.reshape(math.prod(rows), width)
        y = kernel.product(x, inputs)
    else:
        x, values = _in_turn(x, kernel[...].astype(x.dtype))
        features = values.shape[inputs:]
        # Not -1, which cannot be inferred for an array without rows (text without tiles).
        x = x.reshape(math.prod(rows), width)
        y = x @ values.reshape(width, math.prod(features))
    if lora is not None:
        y += lora(x)
    y = y.reshape(*rows, *features)
    return y if bias is None else y + bias[...].astype(x.dtype)


def _rows(x: Array) -> Array:
    """[..., D] to float32 [rows, D], because XLA's CPU backend is ten times slower on sums over [1, T, D]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(jnp.float32)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float, dtype):
        self.scale = ones((width,), dtype)
        self.bias = zeros((width,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        rows = _rows(x)
        centred = rows - rows.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype).reshape(x.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float, dtype, *, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full((width,), scale, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        rows = _rows(x)
        normed = rows * jax.lax.rsqrt(jnp.square(rows).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype).reshape(x.shape)
