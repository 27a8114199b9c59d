"""LLaVA-NeXT (Liu et al. 2024) as Pangea trains it: tower, projector, newline, gather, decoder."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from pangea_jax.batch import Batch
from pangea_jax.model.attention import AttentionImpl
from pangea_jax.model.language import Decoder, KVCache, LanguageConfig
from pangea_jax.model.layers import linear, normal, zeros
from pangea_jax.model.vision import VisionConfig, VisionTower, normalize
from pangea_jax.sharding import BATCH_SPEC, constrain

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclasses.dataclass(frozen=True)
class PangeaConfig:
    """The whole model; the defaults are Pangea-7B.

    Attributes:
      pinpoints: the any-resolution canvases as (width, height). Without any, every picture is one tile.
      newline: False for LLaVA-1.5, which has no newline vector and no pinpoints.
      dtype: of activations and frozen parameters. Parameters that train have their own.
    """

    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
    newline: bool = True
    dtype: str = "bfloat16"


class Projector(nnx.Module):
    """LLaVA's `mlp2x_gelu`: two linear layers with the exact (erf) GELU between them."""

    def __init__(self, vision_width: int, width: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.in_kernel_ed = normal(rngs, (vision_width, width), vision_width**-0.5, dtype)
        self.in_bias_d = zeros((width,), dtype)
        self.out_kernel_dd = normal(rngs, (width, width), width**-0.5, dtype)
        self.out_bias_d = zeros((width,), dtype)

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... D"]:
        x = jax.nn.gelu(linear(x, self.in_kernel_ed, self.in_bias_d), approximate=False)
        return linear(x, self.out_kernel_dd, self.out_bias_d)


class Pangea(nnx.Module):
    """Pictures and text to hidden states and logits.

    The host decides where each picture feature goes (`pangea_jax.anyres`). The decision is `image_index`, int32 per
    token: -1 for a word, 0 for the newline vector, 1 + n * P + p for patch p of tile n of the same row. The device does
    one gather: static shapes, no scatter, exact LLaVA order.
    """

    def __init__(self, config: PangeaConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        D = config.language.width
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config.vision.width, D, rngs=rngs, dtype=dtype)
        self.newline_d = normal(rngs, (D,), D**-0.5, dtype) if config.newline else None
        self.language = Decoder(config.language, rngs=rngs, dtype=dtype)

    def encode(
        self, tiles: UInt8[Array, "B N H W 3"], *, keep: str = "all"
    ) -> Float[Array, "B N P E"]:
        """Tower features of uint8 tiles."""
        B, N, *pixels = tiles.shape
        flat = normalize(tiles.reshape(B * N, *pixels), self.config.dtype)
        features = self.vision(flat, keep=keep)
        return features.reshape(B, N, *features.shape[1:])

    def embed(
        self,
        tokens: Int[Array, "B T"],
        image_index: Int[Array, "B T"],
        features: Float[Array, "B N P E"],
    ) -> Float[Array, "B T D"]:
        """Decoder input: word embeddings, and picture features where `image_index` says so."""
        B, N, P, _ = features.shape
        features = constrain(features.astype(self.config.dtype), BATCH_SPEC)
        projected = self.projector(features).reshape(B, N * P, self.config.language.width)
        projected = constrain(projected, BATCH_SPEC)
        # A model without newline vector never uses index 0, but keeps its place.
        newline = jnp.zeros(()) if self.newline_d is None else self.newline_d[...]
        newline = jnp.broadcast_to(newline.astype(projected.dtype), (B, 1, projected.shape[-1]))
        table = jnp.concatenate([newline, projected], axis=1)
        picture = jnp.take_along_axis(table, jnp.maximum(image_index, 0)[..., None], axis=1)
        words = self.language.embed(tokens, projected.dtype)
        return jnp.where((image_index >= 0)[..., None], picture, words)

    def inputs(self, batch: Batch, keep: str = "all") -> Float[Array, "B T D"]:
        """The decoder's input: what `embed` gives for the pictures of a batch."""
        features = batch.features
        if features is None:
            features = self.encode(batch.tiles, keep=keep)
        return self.embed(batch.tokens, batch.image_index, features)

    def hidden(
        self,
        batch: Batch,
        *,
        keep: str = "all",
        impl: AttentionImpl | str = "auto",
    ) -> Float[Array, "B T D"]:
        """Hidden states of every token.

        Args:
          keep: what a block keeps for the backward pass, a key of `layers.KEEP`.
          impl: the decoder's attention.
        """
        x = self.inputs(batch, keep)
        return self.language(x, batch.positions, batch.segment_ids, keep=keep, impl=impl)

    def __call__(self, batch: Batch, **kwargs) -> Float[Array, "B T V"]:
        """float32 logits at every position, for checks and scoring, not for training."""
        return self.language.logits(self.hidden(batch, **kwargs))

    def prefill(
        self, batch: Batch, slots: int, *, impl: AttentionImpl | str = "auto"
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads the prompts into a new cache of `slots` >= T."""
        x = self.inputs(batch)
        cache = self.language.empty_cache(len(x), slots, x.dtype)
        return self.language.extend(
            x, batch.positions, batch.segment_ids, cache, first=True, impl=impl
        )
