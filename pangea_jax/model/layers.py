"""Small pieces that the vision tower and the decoder share."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype) -> nnx.Param:
    """A parameter drawn from N(0, stddev^2)."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, dtype))


def zeros(shape: tuple[int, ...], dtype) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype))


def stack_blocks(block, num_layers: int, rngs: nnx.Rngs):
    """`num_layers` independently initialised copies of `block(rngs)`, every parameter with a leading L.

    One stacked module instead of a list keeps the compiled program, and the time to compile it,
    independent of depth: the layers run as one `jax.lax.scan`.
    """
    make = nnx.vmap(block, in_axes=(0,), transform_metadata={nnx.PARTITION_NAME: None})
    return make(rngs.split(num_layers))


def linear(
    x: Float[Array, "... D"],
    kernel: nnx.Param,
    bias: nnx.Param | None = None,
    *,
    inputs: int = 1,
) -> Float[Array, "..."]:
    """Contracts the last `inputs` axes of x with as many leading axes of the kernel, in x's dtype.

    Written as one matrix product: XLA's CPU backend runs a product with more free axes about three
    times slower; for an accelerator the two are the same.
    """
    kernel = kernel[...].astype(x.dtype)
    contracted, features = kernel.shape[:inputs], kernel.shape[inputs:]
    width = math.prod(contracted)
    y = x.reshape(-1, width) @ kernel.reshape(width, -1)
    y = y.reshape(*x.shape[: x.ndim - inputs], *features)
    return y if bias is None else y + bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float, dtype):
        self.scale = ones((width,), dtype)
        self.bias = zeros((width,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float, dtype, *, scale: float = 1.0):
        self.scale = nnx.Param(jnp.full((width,), scale, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)
