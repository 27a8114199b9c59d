"""Flax NNX modules: parameters and arithmetic, nothing else.

Shapes, einsums and parameter names use the same letters: B batch, T tokens, N tiles, P patches, D model width, E width
of the tower (where both occur), H heads, K kv heads, G query heads per kv head, C channels per head, F ffn, V
vocabulary, L layers, S keys or cache slots. In adapters: R rank, I inputs, O outputs.
"""

from pangea_jax.model.attention import AttentionImpl
from pangea_jax.model.language import Decoder, KVCache, LanguageConfig
from pangea_jax.model.lora import LoraConfig
from pangea_jax.model.pangea import PINPOINTS, Pangea, PangeaConfig
from pangea_jax.model.rope import RopeScaling
from pangea_jax.model.vision import VisionConfig, VisionTower

__all__ = [
    "PINPOINTS",
    "AttentionImpl",
    "Decoder",
    "KVCache",
    "LanguageConfig",
    "LoraConfig",
    "Pangea",
    "PangeaConfig",
    "RopeScaling",
    "VisionConfig",
    "VisionTower",
]
