"""Augmented views of small drawings: random affine warps, backgrounds, colours and missing parts.

Only the sample uses them. As in the paper, pictures of PangeaIns are not augmented.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8


@dataclasses.dataclass(frozen=True)
class Views:
    """How far random views may differ from the drawing. Half of them are mirrored.

    Attributes:
      smaller, larger: limits of the size, as logarithms: from exp(-larger) to exp(smaller) pixels of
        the drawing a pixel of the view.
      stretch: limit of the logarithm of width over height, halved.
      turn: limit of the angle, radians.
      shear: limit of the shift of a row, in heights.
      shift: limit of the shift, in sides.
      mix, contrast, brightness: standard deviations of the mixture of the three colours, of the
        logarithm of the contrast, and of the lightness of each colour.
      grey, hue, erased: shares of the views that are grey, whose hues are turned, and that lack a
        rectangle.
      largest_hole: limit of the sides of that rectangle, in sides of the view.
    """

    smaller: float = 0.25
    larger: float = 0.2
    stretch: float = 0.2
    turn: float = 0.35
    shear: float = 0.2
    shift: float = 0.08
    mix: float = 0.15
    contrast: float = 0.3
    brightness: float = 0.09
    grey: float = 0.1
    hue: float = 0.0
    erased: float = 0.0
    largest_hole: float = 0.5


MILD = Views()
STRONG = Views(
    smaller=0.4,
    larger=0.35,
    stretch=0.3,
    turn=0.5,
    shear=0.3,
    shift=0.12,
    mix=0.25,
    contrast=0.4,
    brightness=0.12,
    grey=0.2,
    hue=0.2,
    erased=0.3,
)


def augment(
    drawings: UInt8[Array, "B H W 4"], keys: PRNGKeyArray, *, size: int, how: Views = MILD
) -> UInt8[Array, "B size size 3"]:
    """One random view of each RGBA drawing, `size` pixels a side. A view depends on its drawing and its key.

    Do not call it inside of `jax.jit`. As one program, XLA computes each step anew for every pixel that the next step
    reads, which takes four times as long on a CPU.
    """
    warp_keys, colour_keys = _split(keys)
    return _paint(_warp(_premultiply(drawings), warp_keys, size, how), colour_keys, how)


@jax.jit
def _split(keys):
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


@jax.jit
def _premultiply(drawings: UInt8[Array, "B H W 4"]) -> Float[Array, "B H W 4"]:
    """Premultiplied alpha: interpolation must not spread the colour of transparent pixels."""
    rgba = drawings.astype(jnp.float32) / 255
    return jnp.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)


@functools.partial(jax.jit, static_argnames=("size", "how"))
def _warp(rgba: Float[Array, "B H W 4"], keys, size, how) -> Float[Array, "B size size 4"]:
    return jax.vmap(lambda one, key: _warp_one(one, key, size, how))(rgba, keys)


@functools.partial(jax.jit, static_argnames="how")
def _paint(rgba: Float[Array, "B S S 4"], keys, how) -> UInt8[Array, "B S S 3"]:
    def paint_one(rgba, key):
        colour_key, hole_key = jax.random.split(key)
        view = _recolour(rgba, colour_key, how)
        return _erase(view, hole_key, how) if how.erased else view

    return jnp.round(jax.vmap(paint_one)(rgba, keys) * 255).astype(jnp.uint8)


def _warp_one(rgba: Float[Array, "H W 4"], key, size, how) -> Float[Array, "size size 4"]:
    k = jax.random.split(key, 6)
    side = rgba.shape[0]
    scale = jnp.exp(jax.random.uniform(k[0], minval=-how.smaller, maxval=how.larger))
    stretch = jnp.exp(jax.random.uniform(k[1], minval=-how.stretch, maxval=how.stretch))
    angle = jax.random.uniform(k[2], minval=-how.turn, maxval=how.turn)
    shear = jax.random.uniform(k[3], minval=-how.shear, maxval=how.shear)
    shift = jax.random.uniform(k[4], (2,), minval=-how.shift, maxval=how.shift) * side
    mirror = jnp.where(jax.random.bernoulli(k[5]), -1.0, 1.0)
    axis = ((jnp.arange(size) + 0.5) / size - 0.5) * side
    y, x = jnp.meshgrid(axis, axis * mirror, indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_from = scale * stretch * (cos * x - sin * y + shear * y) + shift[0] + (side - 1) / 2
    y_from = scale / stretch * (sin * x + cos * y) + shift[1] + (side - 1) / 2
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=(y_from, x_from), order=1, mode="constant"
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(rgba)


def _recolour(rgba: Float[Array, "S S 4"], key, how) -> Float[Array, "S S 3"]:
    k = jax.random.split(key, 8)
    white = jax.random.bernoulli(k[0])
    background = jnp.where(white, 1.0, jax.random.uniform(k[1], (3,)))
    rgb = rgba[..., :3] + (1 - rgba[..., 3:]) * background
    # One 3 x 3 matrix does all: grey, the turn of hues about the grey axis, and the random mixture.
    grey = jnp.where(jax.random.bernoulli(k[2], how.grey), jnp.full((3, 3), 1 / 3), jnp.eye(3))
    angle = jax.random.uniform(k[6], maxval=2 * jnp.pi) * jax.random.bernoulli(k[7], how.hue)
    mix = jnp.eye(3) + how.mix * jax.random.normal(k[3], (3, 3))
    contrast = jnp.exp(how.contrast * jax.random.normal(k[4]))
    brightness = how.brightness * jax.random.normal(k[5], (3,))
    colours = grey @ _hue_turn(angle) @ mix * contrast
    return jnp.clip((rgb - 0.5) @ colours + 0.5 + brightness, 0, 1)


def _hue_turn(angle) -> Float[Array, "3 3"]:
    """The rotation of colours about the grey axis (Rodrigues)."""
    axis = jnp.full((3,), 3**-0.5)
    cross = jnp.cross(jnp.eye(3), axis)
    turned = jnp.cos(angle) * jnp.eye(3) + jnp.sin(angle) * cross
    return turned + (1 - jnp.cos(angle)) * jnp.outer(axis, axis)


def _erase(view: Float[Array, "S S 3"], key, how) -> Float[Array, "S S 3"]:
    """Fills a rectangle with one random colour in `how.erased` of the views."""
    k = jax.random.split(key, 4)
    size = view.shape[0]
    sides = jax.random.uniform(k[0], (2,), minval=0.1, maxval=how.largest_hole) * size
    start = jax.random.uniform(k[1], (2,)) * (size - sides)
    rows, columns = (
        (jnp.arange(size) >= start[axis]) & (jnp.arange(size) < start[axis] + sides[axis])
        for axis in range(2)
    )
    hole = rows[:, None] & columns & jax.random.bernoulli(k[2], how.erased)
    return jnp.where(hole[..., None], jax.random.uniform(k[3], (3,)), view)
