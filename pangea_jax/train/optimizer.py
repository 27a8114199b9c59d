"""AdamW, Adafactor or Muon with warm-up and cosine decay; learning rates depend on parameter names."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import optax
from optax import contrib

from pangea_jax.model import params as model_params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters; the defaults are Pangea's fine-tuning stage (paper, Table 1 and section 4.1).

    Attributes:
      name: `adamw`, `adafactor` (Shazeer and Stern 2018) or `muon` (Jordan et al. 2024). Adafactor keeps only the row
        and column means of a kernel's second moments and no first moments: 4 bytes per parameter instead of Adam's 12.
        The relative step of its paper is off, so learning rates mean the same as Adam's. Muon makes the steps of
        kernels orthogonal; Adam takes the other parameters.
      mu_dtype: dtype of Adam's first moments; None is that of the parameters. bfloat16 saves 2 bytes per parameter.
      lr_scale: (pattern, factor) pairs. The factor multiplies the learning rate of the parameters that the pattern
        fully matches; the first match counts. Pangea's tower learns at a tenth: (("vision\\..*", 0.1),).
      schedule_steps: length of the schedule; None is the steps of the run. With a longer schedule the run ends in the
        state that a longer run has at that step.
      weight_decay: acts on kernels and embeddings, not on norms and biases.
      clip_norm: largest norm of all gradients together; inf turns clipping off.

    Raises:
      ValueError: an unknown optimiser, or a value out of range.
    """

    learning_rate: float = 2e-5
    warmup_ratio: float = 0.03
    final_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    mu_dtype: str | None = None
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    lr_scale: Sequence[tuple[str, float]] = ()
    schedule_steps: int | None = None
    name: str = "adamw"

    def __post_init__(self):
        if self.name not in _SCALERS:
            raise ValueError(f"optimizer.name {self.name!r} is not one of {', '.join(_SCALERS)}")
        if not self.clip_norm > 0:
            raise ValueError(
                f"optimizer.clip_norm is {self.clip_norm}, but must be above 0; inf turns clipping off"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"optimizer.warmup_ratio must lie in [0, 1], not {self.warmup_ratio}")


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then cosine to `final_ratio` of the peak.

    Raises:
      ValueError: the schedule is shorter than the run.
    """
    if (config.schedule_steps or total_steps) < total_steps:
        raise ValueError(
            f"optimizer.schedule_steps is {config.schedule_steps}, but the run has {total_steps} steps"
        )
    total_steps = config.schedule_steps or total_steps
    warmup = max(1, round(config.warmup_ratio * total_steps))
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(total_steps, warmup + 1), peak * config.final_ratio
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Adafactor, decoupled decay, then the learning rate of each parameter."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _SCALERS[config.name](config),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        _scale_by_name(dict(config.lr_scale)),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def _adam(config):
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)


def _adafactor(config):
    # As in the paper, updates are capped at a root mean square of 1, because the second moments lag behind.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _muon(config):
    kernels = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=_kernel_axes), optax.stateless(_like_adam)
    )
    return optax.partition(
        {"kernel": kernels, "other": _adam(config)},
        lambda params: {n: "kernel" if _KERNEL.search(n) else "other" for n in params},
    )


# Kernels between hidden layers, and the letters of their axes. The head is an embedding turned around.
_KERNEL = re.compile(r"(?<!head)_kernel_([a-z]+)$")


def _kernel_axes(params):
    """Which axes of each kernel go in and which go out; an axis before them counts the layers."""

    def axes(name, kernel):
        letters = _KERNEL.search(name)[1]
        ends = range(kernel.ndim - len(letters), kernel.ndim)
        inputs = len(letters) - 1 if letters.endswith("d") else 1
        return contrib.MuonDimensionNumbers(tuple(ends[:inputs]), tuple(ends[inputs:]))

    # `partition` hides the parameters of other transformations, which then have no axes.
    return {n: axes(n, x) if hasattr(x, "ndim") else x for n, x in params.items()}


def _like_adam(updates, _):
    """Scales orthogonal steps to a root mean square of 0.2, which is usual for Adam's.

    As in Liu et al. 2025 (arXiv:2502.16982). So learning rate and decay mean the same as Adam's.
    """

    def scale(step, axes):
        longer = max(
            math.prod(step.shape[axis] for axis in side)
            for side in (axes.reduction_axis, axes.output_axis)
        )
        return 0.2 * longer**0.5 * step

    axes = _kernel_axes(updates)
    return {n: scale(x, axes[n]) if hasattr(x, "ndim") else x for n, x in updates.items()}


_SCALERS = {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}


def _decays(params):
    return {
        name: bool(re.search(r"(kernel_|embedding_|_lora\.[ab]_)\w+$", name)) for name in params
    }


def _scale_by_name(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def factor(name):
        return next((f for pattern, f in factors.items() if re.fullmatch(pattern, name)), 1.0)

    def init(params):
        try:
            model_params.select(params, factors)  # a pattern that matches nothing is a typo
        except ValueError as error:
            raise ValueError(f"optimizer.lr_scale, among what trains: {error}") from None
        return optax.EmptyState()

    def update(updates, state, params=None):
        return {name: factor(name) * u for name, u in updates.items()}, state

    return optax.GradientTransformation(init, update)
