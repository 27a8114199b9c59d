"""Text from a model: prefill, then one token at a time from a KV cache."""

from pangea_jax.generate.decode import greedy

__all__ = ["greedy"]
