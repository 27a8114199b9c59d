"""Low-rank adapters (LoRA, Hu et al. 2021): the product of two thin matrices trains beside a frozen kernel W.

A layer computes x W + (alpha / rank) (x A) B. A starts random and B starts at zero, so training starts from the
pretrained model. At the end both can be merged into W, which gives an ordinary checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# Patterns for `config.frozen` that match all parameters except the adapters.
FROZEN = (r"(vision|projector)\..*", r"newline_d", r"language\.(?!.*_lora\.).*")
_A, _B = "_lora.a_ir", "_lora.b_ro"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of the decoder's blocks.

    Attributes:
      rank: inner width R of every adapter; 0 means no adapters.
      alpha: the product is multiplied by alpha / rank, so the same learning rate suits other ranks.
      targets: which of `TARGETS` have an adapter.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: Sequence[str] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = set(self.targets) - set(TARGETS)
        if self.rank < 0 or unknown or (self.rank and not self.targets):
            raise ValueError(
                f"lora: rank {self.rank} is not 0 or more, or targets {self.targets} are not some of "
                f"{', '.join(TARGETS)}"
            )


class Lora(nnx.Module):
    """The adapter of one kernel. Inputs and outputs are one axis each."""

    def __init__(self, config: LoraConfig, inputs: int, outputs: int, rngs: nnx.Rngs, dtype):
        a = inputs**-0.5 * jax.random.normal(rngs.params(), (inputs, config.rank), dtype)
        self.a_ir = nnx.Param(a)
        self.b_ro = nnx.Param(jnp.zeros((config.rank, outputs), dtype))
        self.scale = config.alpha / config.rank

    def __call__(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """The term that is added to the product of `x` with the kernel."""
        return self.scale * ((x @ self.a_ir[...].astype(x.dtype)) @ self.b_ro[...].astype(x.dtype))


def merge(params: Mapping[str, Array], config: LoraConfig) -> dict[str, Array]:
    """The parameters without adapters: each adapter is added to its kernel, in the kernel's dtype."""
    merged = {name: value for name, value in params.items() if "_lora." not in name}
    for name in params:
        if not name.endswith(_A):
            continue
        stem = name.removesuffix(_A)
        kernel = next(n for n in merged if n.startswith(f"{stem}_kernel_"))
        b = params[stem + _B]
        merged[kernel] = _add(merged[kernel], params[name], b, config.alpha / config.rank)
    return merged


@jax.jit
def _add(kernel, a, b, scale):
    """The merged kernel of stacked layers. The sum is computed in float32 and then rounded."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST).reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
