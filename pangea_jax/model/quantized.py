"""Weights in 8 and 4 bits: how a kernel is rounded, stored and multiplied. Activations stay as they are.

A kernel becomes two arrays, `codes` and `scale`; its values are codes * scale.

    int8    codes from -127 to 127, and one scale for each output
    int4    codes from -7 to 7, two in a byte, and one scale for each output and group of 128 inputs
    nf4     the same with 16 numbers at the quantiles of a normal distribution (Dettmers et al. 2023, appendix E)

A group is smaller if 128 does not divide the inputs. A byte holds two inputs of one group, i and i + half a group. So
the lower halves of all bytes meet one half of the inputs, the upper halves the other, and nothing is interleaved.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

FORMS = ("int8", "int4", "nf4")
GROUPS = (128, 64, 32, 16, 8)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# On a CPU, products with at most so many rows widen the codes piece by piece, so that a piece stays in the cache.
_FEW_ROWS, _PIECE_BYTES = 32, 4 << 20
_STRIP = 1 << 18  # values that are rounded at once


def check_form(form: str | None) -> None:
    """
    Raises:
      ValueError: `form` is neither None, "" nor one of `FORMS`.
    """
    if form and form not in FORMS:
        raise ValueError(f"weights {form!r} is not one of {', '.join(FORMS)}")


def group_size(inputs: int, name: str = "a kernel") -> int:
    """Inputs that share a scale in 4 bits: the largest of `GROUPS` that divides the last input axis.

    Raises:
      ValueError: none does.
    """
    size = next((size for size in GROUPS if inputs % size == 0), None)
    if size is None:
        raise ValueError(
            f"{name} has {inputs} inputs, which no group of {', '.join(map(str, GROUPS))} divides; choose "
            "weights='int8', which has no groups"
        )
    return size


def shapes(
    kernel: tuple[int, ...], inputs: Sequence[int], form: str, name: str = "a kernel"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and the scale of a kernel.

    Args:
      inputs: the axes that a product contracts. Groups lie along the last of them.
    """
    codes, scale = list(kernel), list(kernel)
    if form == "int8":
        for axis in inputs:
            scale[axis] = 1
    else:
        last = inputs[-1]
        scale[last] //= group_size(kernel[last], name)
        codes[last] //= 2
    return tuple(codes), tuple(scale)


def dtypes(form: str) -> tuple[np.dtype, np.dtype]:
    """Types of the codes and the scale. A scale per group is in bfloat16: its rounding is far below that of 4 bits."""
    if form == "int8":
        return np.dtype(np.int8), np.dtype(np.float32)
    return np.dtype(np.uint8), np.dtype(jnp.bfloat16)


class Quantized(nnx.Module):
    """A kernel in 8 or 4 bits.

    Its first values are random, with the standard deviation `stddev` of the kernel that they stand for.

    Args:
      shape: of the kernel.
      inputs: the axes that a product contracts.
    """

    def __init__(self, rngs: nnx.Rngs, shape, inputs: Sequence[int], form: str, stddev: float):
        check_form(form)
        code_shape, scale_shape = shapes(shape, inputs, form)
        code_dtype, scale_dtype = dtypes(form)
        bits = jax.random.bits(rngs.params(), code_shape, jnp.uint8)
        # The standard deviation of codes that are all equally likely.
        spread = 73.9 if form == "int8" else 4.6 if form == "int4" else 0.55
        self.codes = nnx.Param(bits.view(code_dtype) if form == "int8" else bits)
        self.scale = nnx.Param(jnp.full(scale_shape, stddev / spread, scale_dtype))
        self.form = form

    def product(self, x: Float[Array, "N I"], inputs: int, dtype=None) -> Float[Array, "N O"]:
        """x times the kernel, whose first `inputs` axes are contracted.

        Args:
          dtype: of the result; by default that of x. Sums are float32.
        """
        codes, scale = self.codes[...], self.scale[...]
        codes = codes.reshape(math.prod(codes.shape[:inputs]), -1)
        scale = scale.reshape(math.prod(scale.shape[:inputs]), -1)
        return product(x, codes, scale, self.form, dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(
    x: Float[Array, "N I"], codes: Int[Array, "J O"], scale: Float[Array, "G O"], form: str, dtype
) -> Float[Array, "N O"]:
    """x times a kernel of [I, O]; J is I, or I / 2 in 4 bits. The kernel gets no gradient.

    The backward pass keeps the codes, not the values: a copy of all kernels would be as large as the model in bfloat16.
    """
    cpu = _in_pieces if len(x) <= _FEW_ROWS else _on_cpu
    return jax.lax.platform_dependent(
        *(x, codes, scale),
        cpu=functools.partial(cpu, form=form, dtype=dtype),
        default=functools.partial(_at_once, form=form, dtype=dtype),
    )


def _product_fwd(x, codes, scale, form, dtype):
    return product(x, codes, scale, form, dtype), (jnp.zeros((0, *x.shape), x.dtype), codes, scale)


def _product_bwd(form, dtype, kept, cotangent):
    empty, codes, scale = kept
    like = jax.ShapeDtypeStruct(empty.shape[1:], empty.dtype)
    codes = _after(codes, cotangent)
    pull = jax.linear_transpose(lambda x: _at_once(x, codes, scale, form, x.dtype), like)
    return *pull(cotangent.astype(like.dtype)), None, None


product.defvjp(_product_fwd, _product_bwd)


def _after(codes, x):
    """The codes, which on a CPU are not used before x is computed, see `layers._in_turn`."""
    return jax.lax.platform_dependent(
        *(codes, x),
        cpu=lambda *both: jax.lax.optimization_barrier(both)[0],
        default=lambda codes, x: codes,
    )


def _dot(x, kernel):
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _at_once(x, codes, scale, form, dtype):
    """One product, in which the compiler widens the codes as they are read."""
    if form == "int8":
        return (_dot(x, codes.astype(x.dtype)) * scale).astype(dtype)
    groups = len(scale)
    halves = x.reshape(len(x), groups, 2, -1)
    y = jnp.float32(0)
    for half in (0, 1):
        values = _values(codes, half, form, x.dtype).reshape(groups, -1, codes.shape[-1])
        kernel = (values * scale[:, None].astype(x.dtype)).reshape(codes.shape)
        y += _dot(halves[:, :, half].reshape(len(x), -1), kernel)
    return y.astype(dtype)


def _on_cpu(x, codes, scale, form, dtype):
    x, codes = jax.lax.optimization_barrier((x, codes))
    return _at_once(x, codes, scale, form, dtype)


def _in_pieces(x, codes, scale, form, dtype):
    """The same in a loop over inputs: few rows wait for the memory, so nothing wide is written there."""
    width, outputs = codes.shape
    x, codes = jax.lax.optimization_barrier((x, codes))
    x = x.astype(jnp.float32)
    if form == "int8":
        most = max(8, _PIECE_BYTES // (4 * outputs))
        piece = max(d for d in range(1, min(width, most) + 1) if width % d == 0)

        def body(i, y):
            part = jax.lax.dynamic_slice_in_dim(codes, i * piece, piece).astype(jnp.float32)
            return y + _dot(jax.lax.dynamic_slice_in_dim(x, i * piece, piece, 1), part)

        y = jax.lax.fori_loop(0, width // piece, body, jnp.zeros((len(x), outputs), jnp.float32))
        return (y * scale).astype(dtype)
    groups = len(scale)
    piece = width // groups
    halves = x.reshape(len(x), groups, 2, piece)

    def body(i, y):
        part = jax.lax.dynamic_slice_in_dim(codes, i * piece, piece)
        mine = jax.lax.dynamic_index_in_dim(halves, i, 1, keepdims=False)
        sums = sum(_dot(mine[:, half], _values(part, half, form, jnp.float32)) for half in (0, 1))
        return y + sums * jax.lax.dynamic_slice_in_dim(scale, i, 1).astype(jnp.float32)

    y = jax.lax.fori_loop(0, groups, body, jnp.zeros((len(x), outputs), jnp.float32))
    return y.astype(dtype)


def _values(codes: Int[Array, "J O"], half: int, form: str, dtype) -> Float[Array, "J O"]:
    """The lower (0) or upper (1) halves of bytes as numbers."""
    if form == "nf4":
        return jnp.array(_NF4, dtype)[codes >> 4 if half else codes & 15]
    signed = codes.view(jnp.int8)
    signed = signed if half else jax.lax.shift_left(signed, jnp.int8(4))
    return jax.lax.shift_right_arithmetic(signed, jnp.int8(4)).astype(dtype)


def quantize(
    kernel: Float[np.ndarray, "I O"], form: str, group: int
) -> tuple[Int[np.ndarray, "J O"], Float[np.ndarray, "G O"]]:
    """Codes and scale of a kernel on the host, in strips of outputs that fit the processor's cache.

    Args:
      group: number of inputs that share a scale; for int8 all inputs.
    """
    inputs, outputs = kernel.shape
    code_dtype, scale_dtype = dtypes(form)
    scale = np.empty((inputs // group, outputs), scale_dtype)
    codes = np.empty((inputs if form == "int8" else inputs // 2, outputs), code_dtype)
    strip, half = max(512, _STRIP // group), group // 2
    for first in range(0, outputs, strip):
        here = slice(first, first + strip)
        for i in range(len(scale)):
            part = _float32(kernel[i * group : (i + 1) * group, here])
            largest = np.maximum(part.max(0), -part.min(0))
            scale[i, here] = largest / (127 if form == "int8" else 7 if form == "int4" else 1)
            part *= _inverse(scale[i, here])
            if form == "int8":
                codes[:, here] = np.rint(part, out=part)
            else:
                near = _nearest_nf4(part) if form == "nf4" else _nearest_int4(part)
                codes[i * half : (i + 1) * half, here] = near[:half] & 15 | near[half:] << 4
    return codes, scale


def _float32(x: np.ndarray) -> Float[np.ndarray, "..."]:
    """A copy in float32. The bits of bfloat16 are its upper half, which is many times faster than NumPy's own way."""
    if x.dtype != jnp.bfloat16:
        return x.astype(np.float32)
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _inverse(scale) -> Float[np.ndarray, " O"]:
    """1 / scale, and 0 where all values are 0."""
    wide = scale.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)


def _nearest_int4(x):
    return np.clip(np.rint(x), -7, 7).astype(np.int8).view(np.uint8)


def _nearest_nf4(x):
    between = (np.array(_NF4[1:], np.float32) + np.array(_NF4[:-1], np.float32)) / 2
    near = np.zeros(x.shape, np.uint8)
    for edge in between:
        near += x > edge
    return near


def dequantize(
    codes: Int[Array, "J O"], scale: Float[Array, "G O"], form: str
) -> Float[Array, "I O"]:
    """The kernel's values in float32."""
    if form == "int8":
        return codes.astype(jnp.float32) * scale
    groups = len(scale)
    halves = [
        _values(codes, half, form, jnp.float32).reshape(groups, -1, codes.shape[-1])
        for half in (0, 1)
    ]
    values = jnp.concatenate(halves, axis=1) * scale[:, None].astype(jnp.float32)
    return values.reshape(-1, codes.shape[-1])
