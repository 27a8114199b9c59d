"""The CLIP vision tower (Radford et al. 2021) as LLaVA uses it: patch features, no class token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from pangea_jax.model.attention import attention
from pangea_jax.model.layers import LayerNorm, checkpoint, linear, normal, stack_blocks, zeros
from pangea_jax.sharding import BATCH_SPEC, constrain

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; the defaults are openai/clip-vit-large-patch14-336.

    `feature_layer` counts as transformers' `vision_feature_layer` does: -1 is the output of the last block, -2 (LLaVA)
    is the output of the block before it.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    feature_layer: int = -2
    norm_eps: float = 1e-5
    scan_unroll: int = 1  # more is faster on a CPU, where a loop copies residuals

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def used_layers(self) -> int:
        """Blocks that the features depend on."""
        return self.layers + 1 + self.feature_layer

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision: image_size {self.image_size} is no multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"vision: width {self.width} does not divide into {self.heads} heads")
        if not -self.layers <= self.feature_layer <= -1:
            raise ValueError(
                f"vision: feature_layer {self.feature_layer} must lie in [-{self.layers}, -1]"
            )


def normalize(tiles: UInt8[Array, "... H W 3"], dtype=jnp.float32) -> Float[Array, "... H W 3"]:
    """uint8 pixels to CLIP's input: scaled to [0, 1], then standardised per channel.

    The device does this, so one byte per channel crosses the bus instead of four.
    """
    x = tiles.astype(jnp.float32) * (1 / 255)
    return ((x - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)).astype(dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's activation, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


class VisionBlock(nnx.Module):
    """Pre-norm transformer block: full attention over the patches of one tile, QuickGELU MLP."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, dtype):
        D, H, F = config.width, config.heads, config.mlp
        C = D // H
        self.attention_norm = LayerNorm(D, config.norm_eps, dtype)
        self.q_kernel_dhc = normal(rngs, (D, H, C), D**-0.5, dtype)
        self.k_kernel_dhc = normal(rngs, (D, H, C), D**-0.5, dtype)
        self.v_kernel_dhc = normal(rngs, (D, H, C), D**-0.5, dtype)
        self.q_bias_hc = zeros((H, C), dtype)
        self.k_bias_hc = zeros((H, C), dtype)
        self.v_bias_hc = zeros((H, C), dtype)
        # Residual branches start small so that the sum of 2 * layers of them keeps unit scale.
        depth_scale = (2 * config.layers) ** -0.5
        self.o_kernel_hcd = normal(rngs, (H, C, D), D**-0.5 * depth_scale, dtype)
        self.o_bias_d = zeros((D,), dtype)
        self.mlp_norm = LayerNorm(D, config.norm_eps, dtype)
        self.up_kernel_df = normal(rngs, (D, F), D**-0.5, dtype)
        self.up_bias_f = zeros((F,), dtype)
        self.down_kernel_fd = normal(rngs, (F, D), F**-0.5 * depth_scale, dtype)
        self.down_bias_d = zeros((D,), dtype)

    def __call__(self, x: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        y = self.attention_norm(x)
        q = checkpoint_name(linear(y, self.q_kernel_dhc, self.q_bias_hc), "q")
        k = checkpoint_name(linear(y, self.k_kernel_dhc, self.k_bias_hc), "k")
        v = checkpoint_name(linear(y, self.v_kernel_dhc, self.v_bias_hc), "v")
        # Plain JAX: there is no mask, so a kernel would skip nothing, but it would pad 577 tokens to 640. The logits of
        # one tile fit in memory. cuDNN's kernel needs an even number of tokens.
        mixed = attention(q, k, v, impl="xla")
        y = linear(mixed, self.o_kernel_hcd, self.o_bias_d, inputs=2)
        x = x + checkpoint_name(y, "o")
        up = linear(self.mlp_norm(x), self.up_kernel_df, self.up_bias_f)
        y = quick_gelu(checkpoint_name(up, "up"))
        return x + linear(y, self.down_kernel_fd, self.down_bias_d)


class VisionTower(nnx.Module):
    """CLIP ViT up to `config.feature_layer`, with a class token; returns the patch features only.

    The blocks after the feature layer (`tail_blocks`) and CLIP's final norm (`post_norm`) do not change the features.
    They are here because public checkpoints hold them, and what we write must hold them too.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        D, p = config.width, config.patch_size
        self.patch_kernel_hwcd = normal(rngs, (p, p, 3, D), (3 * p * p) ** -0.5, dtype)
        self.class_embedding_d = normal(rngs, (D,), D**-0.5, dtype)
        self.position_embedding_sd = normal(rngs, (config.patches + 1, D), D**-0.5, dtype)
        self.pre_norm = LayerNorm(D, config.norm_eps, dtype)
        self.blocks = stack_blocks(
            lambda r: VisionBlock(config, r, dtype), config.used_layers, rngs
        )
        tail = config.layers - config.used_layers
        self.tail_blocks = (
            stack_blocks(lambda r: VisionBlock(config, r, dtype), tail, rngs) if tail else None
        )
        self.post_norm = LayerNorm(D, config.norm_eps, dtype)

    def __call__(
        self, tiles: Float[Array, "N H W 3"], *, keep: str = "all"
    ) -> Float[Array, "N P D"]:
        """Features of normalised tiles, one per patch in row-major order; `keep`: a key of `layers.KEEP`."""
        p = self.config.patch_size
        x = jax.lax.conv_general_dilated(
            tiles,
            constrain(self.patch_kernel_hwcd[...].astype(tiles.dtype), P()),
            window_strides=(p, p),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x.reshape(x.shape[0], self.config.patches, self.config.width)
        cls = jnp.broadcast_to(
            self.class_embedding_d[...].astype(x.dtype), (x.shape[0], 1, x.shape[2])
        )
        x = jnp.concatenate([cls, x], axis=1) + self.position_embedding_sd[...].astype(x.dtype)
        x = self.pre_norm(constrain(x, BATCH_SPEC))

        # Without `constrain` XLA splits the channels like the kernels and runs all tiles on every device.
        def body(x, block):
            return block(constrain(x, BATCH_SPEC)), None

        x, _ = jax.lax.scan(checkpoint(body, keep), x, self.blocks, unroll=self.config.scan_unroll)
        return constrain(x[:, 1:], BATCH_SPEC)
