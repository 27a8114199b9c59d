"""Augmented views of small drawings: random affine warps, backgrounds and colours.

Only the sample uses them. As in the paper, pictures of PangeaIns are not augmented.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8


@functools.partial(jax.jit, static_argnames="size")
def augment(
    drawings: UInt8[Array, "B H W 4"], keys: PRNGKeyArray, *, size: int
) -> UInt8[Array, "B size size 3"]:
    """One random view of each RGBA drawing, `size` pixels a side.

    The drawing is scaled (0.8 to 1.3), stretched, turned (up to 20 degrees), sheared and shifted; half
    of the views are mirrored. The background is white or a random colour. The colours are mixed and
    shifted; one view in ten is grey.

    Args:
      keys: one random key for each drawing.
    """
    views = jax.vmap(functools.partial(_augment_one, size=size))(drawings, keys)
    return jnp.round(views * 255).astype(jnp.uint8)


def _augment_one(drawing, key, size):
    warp_key, colour_key = jax.random.split(key)
    alpha = drawing[..., 3:].astype(jnp.float32) / 255
    # Premultiplied alpha: interpolation must not spread the colour of transparent pixels.
    rgba = jnp.concatenate([drawing[..., :3] / 255 * alpha, alpha], -1)
    return _recolour(_warp(rgba, warp_key, size), colour_key)


def _warp(rgba: Float[Array, "H W 4"], key, size) -> Float[Array, "size size 4"]:
    k = jax.random.split(key, 6)
    side = rgba.shape[0]
    scale = jnp.exp(jax.random.uniform(k[0], minval=-0.25, maxval=0.2))
    stretch = jnp.exp(jax.random.uniform(k[1], minval=-0.2, maxval=0.2))
    angle = jax.random.uniform(k[2], minval=-0.35, maxval=0.35)
    shear = jax.random.uniform(k[3], minval=-0.2, maxval=0.2)
    shift = jax.random.uniform(k[4], (2,), minval=-0.08, maxval=0.08) * side
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


def _recolour(rgba: Float[Array, "S S 4"], key) -> Float[Array, "S S 3"]:
    k = jax.random.split(key, 6)
    white = jax.random.bernoulli(k[0])
    background = jnp.where(white, 1.0, jax.random.uniform(k[1], (3,)))
    rgb = rgba[..., :3] + (1 - rgba[..., 3:]) * background
    rgb = jnp.where(jax.random.bernoulli(k[2], 0.1), rgb.mean(-1, keepdims=True), rgb)
    mix = jnp.eye(3) + 0.15 * jax.random.normal(k[3], (3, 3))
    contrast = jnp.exp(0.3 * jax.random.normal(k[4]))
    brightness = 0.09 * jax.random.normal(k[5], (3,))
    return jnp.clip((rgb - 0.5) @ mix * contrast + 0.5 + brightness, 0, 1)
