"""Rotary positions (Su et al. 2021) and the scalings of their frequencies, as transformers computes them.

A scaling stretches the positions of a decoder beyond the length of its pretraining. Only those are here whose
frequencies are the same for every input.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

KINDS = ("default", "linear", "llama3", "proportional", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are scaled. Fields that a kind does not name have no effect on it.

    Attributes:
      kind: one of `KINDS`, transformers' `rope_type`. "default": no scaling.
      factor: by what frequencies are divided (all kinds but "default").
      original_positions: the context of the pretraining, in tokens ("llama3", "yarn").
      attention_factor: by what cosines and sines are multiplied ("yarn").
      beta_fast, beta_slow: rotations within `original_positions` from which on a channel keeps its frequency, and up
        to which the frequency is divided; between them is a ramp ("yarn", Peng et al. 2023).
      truncate: round the ends of this ramp to whole channels ("yarn").
      low_freq_factor, high_freq_factor: the same two numbers of rotations, with another ramp ("llama3").
      rotary_share: share of the channels that rotate at all ("proportional").

    Raises:
      ValueError: an unknown kind, or a number out of range.
    """

    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotary_share: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling.kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.factor > 0:
            raise ValueError(f"rope_scaling.factor must be above 0, not {self.factor}")
        if self.kind in ("llama3", "yarn") and self.original_positions < 1:
            raise ValueError(
                f'rope_scaling.kind "{self.kind}" needs original_positions, the context of the pretraining'
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}"
            )


def rope_angles(
    positions: Int[Array, "B T"],
    head_width: int,
    theta: float,
    scaling: RopeScaling = RopeScaling(),  # noqa: B008 - it is frozen
) -> tuple[Float[Array, "B T C2"], Float[Array, "B T C2"]]:
    """cos and sin of the rotary angles, float32, one per pair of channels, times `scaling.attention_factor`."""
    if scaling.kind == "default":
        frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    else:
        frequency = scaled_frequencies(head_width, theta, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequency
    angles = jnp.cos(angles), jnp.sin(angles)
    if scaling.kind == "yarn":
        angles = tuple(scaling.attention_factor * x for x in angles)
    # Without the barrier XLA's CPU backend computes the angles again for every head of every unrolled layer. Only for a
    # single token is that cheaper than the barrier.
    return angles if positions.shape[1] == 1 else jax.lax.optimization_barrier(angles)


def scaled_frequencies(
    head_width: int, theta: float, scaling: RopeScaling
) -> Float32[np.ndarray, " C2"]:
    """Radians per position of every pair of channels."""
    rotated = head_width // 2
    if scaling.kind == "proportional":
        rotated = int(scaling.rotary_share * head_width // 2)
    # In float32 as in the reference; only the power is rounded once, where that depends on the library.
    exponent = (np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(head_width)).astype(
        float
    )
    wavelength = (theta**exponent).astype(np.float32)  # over 2 pi, in positions
    frequency = np.float32(1) / wavelength
    if scaling.kind == "yarn":
        return _yarn(frequency, wavelength, theta, scaling)
    if scaling.kind == "llama3":
        return _llama3(frequency, scaling)
    still = np.zeros(head_width // 2 - rotated, np.float32)
    return np.concatenate([frequency, still]) / np.float32(scaling.factor)


def _yarn(frequency, wavelength, theta, scaling):
    channels = 2 * len(frequency)

    def channel(rotations):
        """The channel that makes so many rotations within the context of the pretraining."""
        turns = scaling.original_positions / (rotations * 2 * np.pi)
        return channels * np.log(turns) / (2 * np.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(len(frequency), dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - ramp.clip(0, 1)
    divided = np.float32(1) / (np.float32(scaling.factor) * wavelength)
    return divided * (np.float32(1) - kept) + frequency * kept


def _llama3(frequency, scaling):
    factor, turns = (
        np.float32(scaling.factor),
        scaling.original_positions * frequency / np.float32(2 * np.pi),
    )
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return (np.float32(1) - kept) * frequency / factor + kept * frequency


def rotate(
    x: Float[Array, "B T H C"], cos: Float[Array, "B T C2"], sin: Float[Array, "B T C2"]
) -> Float[Array, "B T H C"]:
    """Rotates channel pairs (c, c + C/2), the half-split pairing of the public checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
