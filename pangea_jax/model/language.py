"""The Qwen2 decoder (Yang et al. 2024): grouped keys, QKV bias, rotary positions, RMSNorm, SwiGLU.

Without the QKV bias the same module is a Llama or Mistral decoder.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pangea_jax.model.attention import AttentionImpl, attention, cached_attention
from pangea_jax.model.layers import (
    RMSNorm,
    checkpoint,
    kernel,
    linear,
    run_blocks,
    stack_blocks,
    unstack_blocks,
    zeros,
)
from pangea_jax.model.lora import Lora, LoraConfig
from pangea_jax.model.quantized import Quantized, check_form, product
from pangea_jax.model.rope import RopeScaling, rope_angles, rotate
from pangea_jax.sharding import BATCH_SPEC, constrain


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the decoder; the defaults are Qwen/Qwen2-7B-Instruct.

    `final_norm_scale` is the initial scale of the final norm. The first logits of a narrow model with a tied head are
    too flat to learn from quickly, so such a model uses 4; all others use 1.

    `weights` is the form of the blocks' kernels (`pangea_jax.model.quantized.FORMS`); embedding and head are then in 8
    bits. "" is the dtype of the parameters.
    """

    vocab_size: int = 152064
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    head_width: int = 128
    mlp: int = 18944
    rope_theta: float = 1e6
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied_head: bool = False
    max_positions: int = 32768
    final_norm_scale: float = 1.0
    lora: LoraConfig = LoraConfig()
    weights: str = ""
    scan_unroll: int = 1  # more is faster on a CPU, where a loop copies residuals

    def __post_init__(self):
        if isinstance(self.lora, Mapping):  # of a config file
            object.__setattr__(self, "lora", LoraConfig(**self.lora))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        check_form(self.weights)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"language: {self.heads} heads do not divide over {self.kv_heads} kv_heads"
            )
        if self.head_width % 2:
            raise ValueError(
                f"language: rotary positions need an even head_width, not {self.head_width}"
            )


@struct.dataclass
class KVCache:
    """Keys and values of all tokens so far, one slot per token.

    The layers are stacked, or a tuple with one array per layer, like the decoder's blocks. Rows are axis -4 of both.
    Slots are the last axis of keys and the last but one of values, as `attention._mix` multiplies them.

    All rows fill the same slots. `segment_ids` 0 marks empty slots and padding; `positions` orders the others.
    """

    k: Float[Array, "L B K C S"] | tuple[Float[Array, "B K C S"], ...]
    v: Float[Array, "L B K S C"] | tuple[Float[Array, "B K S C"], ...]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]  # slots in use

    def map(self, function, *others: "KVCache"):
        """New keys and values: `function(x, *y, axis)` of each array x, the same arrays y of `others`, and x's slot
        axis."""
        caches = (self, *others)
        k = jax.tree.map(lambda *x: function(*x, -1), *(cache.k for cache in caches))
        v = jax.tree.map(lambda *x: function(*x, -2), *(cache.v for cache in caches))
        return k, v

    def repeat(self, copies: int) -> "KVCache":
        """Every row `copies` times in succession."""
        k, v = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=-4), (self.k, self.v))
        ids, positions = (jnp.repeat(x, copies, axis=0) for x in (self.segment_ids, self.positions))
        return KVCache(k, v, ids, positions, self.length)


def _written(cache, new, layer, at):
    """Keys or values of a cache after `new` ones of the same layout are written at `at`, an index of four axes."""
    if isinstance(cache, tuple):
        here = jax.lax.dynamic_update_slice(cache[layer], new.astype(cache[layer].dtype), at)
        return (*cache[:layer], here, *cache[layer + 1 :])
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), (layer, *at))


def _of_layer(cache, layer):
    if isinstance(cache, tuple):
        return cache[layer]
    return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)


class DecoderBlock(nnx.Module):
    """One layer of the decoder."""

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs, dtype):
        D, H, K, C, F = config.width, config.heads, config.kv_heads, config.head_width, config.mlp
        depth_scale, form = (2 * config.layers) ** -0.5, config.weights
        self.attention_norm = RMSNorm(D, config.norm_eps, dtype)
        self.q_kernel_dhc = kernel(rngs, (D, H, C), D**-0.5, dtype, form)
        self.k_kernel_dkc = kernel(rngs, (D, K, C), D**-0.5, dtype, form)
        self.v_kernel_dkc = kernel(rngs, (D, K, C), D**-0.5, dtype, form)
        self.q_bias_hc = zeros((H, C), dtype) if config.qkv_bias else None
        self.k_bias_kc = zeros((K, C), dtype) if config.qkv_bias else None
        self.v_bias_kc = zeros((K, C), dtype) if config.qkv_bias else None
        self.o_kernel_hcd = kernel(
            rngs, (H, C, D), (H * C) ** -0.5 * depth_scale, dtype, form, inputs=(0, 1)
        )
        self.mlp_norm = RMSNorm(D, config.norm_eps, dtype)
        self.gate_kernel_df = kernel(rngs, (D, F), D**-0.5, dtype, form)
        self.up_kernel_df = kernel(rngs, (D, F), D**-0.5, dtype, form)
        self.down_kernel_fd = kernel(rngs, (F, D), F**-0.5 * depth_scale, dtype, form)
        sizes = {"q": (D, H * C), "k": (D, K * C), "v": (D, K * C), "o": (H * C, D)}
        sizes |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
        for target, (inputs, outputs) in sizes.items():
            has_one = config.lora.rank and target in config.lora.targets
            lora = Lora(config.lora, inputs, outputs, rngs, dtype) if has_one else None
            setattr(self, f"{target}_lora", lora)

    def qkv(self, x: Float[Array, "B T D"]):
        """Queries [B, T, H, C], keys and values [B, T, K, C] of the normed input."""
        y = self.attention_norm(x)
        return (
            linear(y, self.q_kernel_dhc, self.q_bias_hc, lora=self.q_lora),
            linear(y, self.k_kernel_dkc, self.k_bias_kc, lora=self.k_lora),
            linear(y, self.v_kernel_dkc, self.v_bias_kc, lora=self.v_lora),
        )

    def finish(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B T H C"]
    ) -> Float[Array, "B T D"]:
        """Output projection and MLP, each with its residual."""
        y = linear(mixed, self.o_kernel_hcd, inputs=2, lora=self.o_lora)
        x = x + checkpoint_name(y, "o")
        y = self.mlp_norm(x)
        gate = checkpoint_name(linear(y, self.gate_kernel_df, lora=self.gate_lora), "gate")
        up = checkpoint_name(linear(y, self.up_kernel_df, lora=self.up_lora), "up")
        return x + linear(jax.nn.silu(gate) * up, self.down_kernel_fd, lora=self.down_lora)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores(hidden, head, axes):
    return jnp.einsum(f"...D,{axes}->...V", hidden, head, preferred_element_type=jnp.float32)


def _scores_fwd(hidden, head, axes):
    return _scores(hidden, head, axes), (hidden, head)


def _scores_bwd(axes, kept, cotangent):
    """In the dtype of the hidden states: products with a float32 cotangent are several times slower on an
    accelerator."""
    _, pull = jax.vjp(lambda *both: jnp.einsum(f"...D,{axes}->...V", *both), *kept)
    return pull(cotangent.astype(kept[0].dtype))


_scores.defvjp(_scores_fwd, _scores_bwd)


class Decoder(nnx.Module):
    """Token embeddings, the stacked blocks, the final norm and the output head."""

    def __init__(self, config: LanguageConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        D, V = config.width, config.vocab_size
        form, spread = "int8" if config.weights else "", D**-0.5 if config.tied_head else 0.02
        self.embedding_vd = kernel(rngs, (V, D), spread, dtype, form, inputs=(1,))
        self.blocks = stack_blocks(lambda r: DecoderBlock(config, r, dtype), config.layers, rngs)
        self.final_norm = RMSNorm(D, config.norm_eps, dtype, scale=config.final_norm_scale)
        untied = not config.tied_head
        self.head_kernel_dv = kernel(rngs, (D, V), D**-0.5, dtype, form) if untied else None

    def embed(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        table = self.embedding_vd
        if isinstance(table, Quantized):
            codes, scale = (jnp.take(x[...], tokens, axis=0) for x in (table.codes, table.scale))
            words = (codes * scale).astype(dtype)
        else:
            words = jnp.take(table[...], tokens, axis=0).astype(dtype)
        # Every device looks up its columns of all words. The columns then move to the devices of the rows. Without this
        # XLA gathers the table and its gradient on every device: 2 GiB each.
        words = constrain(words, P(BATCH_SPEC[0][0], None, BATCH_SPEC[0][1]))
        return constrain(words, BATCH_SPEC)

    def head(self, dtype) -> Float[Array, "..."] | tuple[Array, Array]:
        """The output head in `dtype`, gathered over all axes but `tensor`: [D, V], or [V, D] if it is the embedding.

        In 8 bits it is (codes [D, V], scale [1, V]), whatever `dtype` is.
        """
        tied = self.head_kernel_dv is None
        found = self.embedding_vd if tied else self.head_kernel_dv
        spec = P("tensor", None) if tied else P(None, "tensor")
        if not isinstance(found, Quantized):
            return constrain(found[...].astype(dtype), spec)
        both = constrain(found.codes[...], spec), found.scale[...]
        return tuple(x.T for x in both) if tied else both

    def logits(
        self,
        hidden: Float[Array, "... D"],
        head: Float[Array, "..."] | tuple[Array, Array] | None = None,
    ) -> Float[Array, "... V"]:
        """float32 scores of the next token. `head`: `self.head(hidden.dtype)`, if the caller has it already."""
        head = self.head(hidden.dtype) if head is None else head
        if isinstance(head, tuple):
            *rows, width = hidden.shape
            flat = hidden.reshape(math.prod(rows), width)
            return product(flat, *head, "int8", jnp.float32).reshape(*rows, -1)
        return _scores(hidden, head, "VD" if self.head_kernel_dv is None else "DV")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        *,
        keep: str = "all",
        impl: AttentionImpl | str = "auto",
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm, for training and scoring (no cache); `keep`: a key of `layers.KEEP`."""
        cos, sin = self._angles(positions)

        def body(x, block, _layer):
            x = constrain(x, BATCH_SPEC)
            q, k, v = block.qkv(x)
            mixed = attention(
                checkpoint_name(rotate(q, cos, sin), "q"),
                checkpoint_name(rotate(k, cos, sin), "k"),
                checkpoint_name(v, "v"),
                segment_ids=segment_ids,
                positions=positions,
                impl=impl,
            )
            return block.finish(x, mixed)

        x = run_blocks(checkpoint(body, keep), x, self.blocks, unroll=self.config.scan_unroll)
        return constrain(self.final_norm(x), BATCH_SPEC)

    def _angles(self, positions: Int[Array, "B T"]):
        c = self.config
        return rope_angles(positions, c.head_width, c.rope_theta, c.rope_scaling)

    def empty_cache(self, batch: int, slots: int, dtype) -> KVCache:
        """A cache with room for `slots` tokens in each row."""
        c = self.config
        rows = batch, c.kv_heads
        shapes = (*rows, c.head_width, slots), (*rows, slots, c.head_width)
        if isinstance(self.blocks, nnx.List):
            k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(c.layers)) for shape in shapes)
        else:
            k, v = (jnp.zeros((c.layers, *shape), dtype) for shape in shapes)
        ids = jnp.zeros((batch, slots), jnp.int32)
        return KVCache(k, v, ids, ids, jnp.int32(0))

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache,
        *,
        first: bool = False,
        impl: AttentionImpl | str = "auto",
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Reads T tokens after those in the cache: the prefill (T = prompt) and every step (T = 1).

        Args:
          first: the cache is empty, so the tokens see only each other, and `impl` says which code mixes the values.
            Otherwise they also see the cache, and plain JAX mixes the values.
        """
        cos, sin = self._angles(positions)
        start = (0, cache.length)
        kv_segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
        kv_positions = jax.lax.dynamic_update_slice(cache.positions, positions, start)
        queries = {"segment_ids": segment_ids, "positions": positions}
        slots = {"kv_segment_ids": kv_segment_ids, "kv_positions": kv_positions}

        # The caches are carried, not scanned over, so that XLA writes new slots in place.
        def body(carry, block, layer):
            x, keys, values = carry
            q, k, v = block.qkv(x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys = _written(keys, k.transpose(0, 2, 3, 1), layer, (0, 0, 0, cache.length))
            values = _written(values, v.swapaxes(1, 2), layer, (0, 0, cache.length, 0))
            if first:
                mixed = attention(q, k, v, **queries, impl=impl)
            else:
                k, v = (_of_layer(c, layer).astype(x.dtype) for c in (keys, values))
                mixed = cached_attention(q, k, v, **queries, **slots)
            return block.finish(x, mixed), keys, values

        x, k, v = run_blocks(body, (x, cache.k, cache.v), self.blocks)
        cache = KVCache(k, v, kv_segment_ids, kv_positions, cache.length + x.shape[1])
        return self.final_norm(x), cache

    def unstack(self) -> None:
        """Gives every layer its own arrays, for decoding on a CPU.

        There a loop over stacked layers copies the weights and the cache of a layer before it uses them.
        """
        self.blocks = unstack_blocks(self.blocks)
