"""Text from a model: prefill, then one token at a time from a KV cache."""

from pangea_jax.generate.decode import Sampling, complete

__all__ = ["Sampling", "complete"]
