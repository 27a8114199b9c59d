"""Loss and token accuracy on held-back examples, overall and per language; which step was the best."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int32

from pangea_jax.batch import Batch
from pangea_jax.model import params as model_params
from pangea_jax.model.attention import AttentionImpl
from pangea_jax.sharding import BATCH_SPEC, row_shards
from pangea_jax.train.loss import cross_entropy
from pangea_jax.train.state import TrainState

Score = Callable[[dict, dict, Batch, Int[Array, " B"]], Float[Array, "languages 3"]]


def make_score(
    graphdef: nnx.GraphDef,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    languages: int,
    *,
    max_targets: int | None = None,
    impl: AttentionImpl | str = "auto",
) -> Score:
    """Makes `score(trainable, frozen, batch, language)`: sums of losses, trained tokens and hits per language.

    Args:
      languages: how many there are; `language` has the number of each row's.
      max_targets, impl: see `make_train_step`.
    """

    def score(trainable, frozen, batch, language):
        model = model_params.merge(graphdef, trainable | frozen)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hidden = model.hidden(batch, impl=impl)
            sums = cross_entropy(
                model.language,
                hidden,
                batch.targets,
                batch.weights,
                max_targets=max_targets,
                per_row=True,
            )
        return jax.nn.one_hot(language, languages).T @ jnp.stack(sums, axis=1)

    rows = NamedSharding(mesh, BATCH_SPEC)
    return jax.jit(
        score,
        in_shardings=(shardings.trainable, shardings.frozen, rows, rows),
        out_shardings=NamedSharding(mesh, P()),
    )


@dataclasses.dataclass
class Validator:
    """Scores the state of a run, and remembers the best step.

    Attributes:
      batches: gives this process's rows of every batch, and the number of each row's language.
      languages: their codes.
      every: steps between two validations; the last step is always validated.
    """

    score: Score
    batches: Iterable[tuple[Batch, Int32[np.ndarray, " B"]]]
    languages: Sequence[str]
    mesh: jax.sharding.Mesh
    every: int

    def __post_init__(self):
        self._kept: dict[str, Any] = {"before": None, "best": None, "last": None}

    def due(self, step: int) -> bool:
        """Whether the state after `step` is validated."""
        return (step + 1) % self.every == 0

    def run(self, state: TrainState, step: int) -> dict[str, float]:
        """`validation/loss` and `validation/accuracy` of the state after `step`, and per language as .../CODE.

        Every trained token has the same weight. `step` is -1 before training.
        """
        total = np.zeros((len(self.languages), 3))
        for rows, language in self.batches:
            sums = self.score(state.trainable, state.frozen, *self._place(rows, language))
            total += np.asarray(jax.device_get(sums), np.float64)
        metrics = _means("", total.sum(axis=0))
        for code, sums in zip(self.languages, total, strict=True):
            if sums[1]:  # none of its records could be scored
                metrics |= _means(f"/{code}", sums)
        self._note(step, metrics)
        return metrics

    def _place(self, rows, language):
        missing = -len(rows) % max(1, row_shards(self.mesh) // jax.process_count())
        placed = NamedSharding(self.mesh, BATCH_SPEC)
        labels = jax.make_array_from_process_local_data(placed, np.pad(language, (0, missing)))
        return rows.place(self.mesh), labels

    def _note(self, step, metrics) -> None:
        values = {"step": step + 1} | metrics
        if step < 0:
            self._kept["before"] = values
            return
        self._kept["last"] = values
        best, loss = self._kept["best"], metrics["validation/loss"]
        # A first loss that is NaN is not the best for ever.
        if best is None or (not best["validation/loss"] <= loss and not math.isnan(loss)):
            self._kept["best"] = values

    @property
    def best_step(self) -> int | None:
        """Number of steps after which the loss was lowest; None if no step was validated yet."""
        return self._kept["best"] and self._kept["best"]["step"]

    def results(self) -> dict[str, Any]:
        """The metrics before training, after the best and after the last validated step, each with `step`."""
        return dict(self._kept)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `results` of the run that this one continues."""
        self._kept = dict(state)

    def advice(self, workdir: str | os.PathLike, adapters: bool) -> str | None:
        """How to take the best step, if it is not the last, in which case there is nothing to say."""
        best, last = self._kept["best"], self._kept["last"]
        if not best or best["step"] == last["step"]:
            return None
        what = "the adapters" if adapters else "the model"
        form = " --format=peft" if adapters else ""
        return (
            f"The validation loss was {best['validation/loss']:.4f} after step {best['step']}, and "
            f"{last['validation/loss']:.4f} at the end. For {what} of step {best['step']}: python launch/convert.py "
            f"--from={workdir}/checkpoints/{best['step']} --to=DIR{form}"
        )

    def describe(self, metrics: Mapping[str, float]) -> str:
        """One line for the console."""
        text = f"validation loss {metrics['validation/loss']:.4f}, token accuracy "
        text += f"{metrics['validation/accuracy']:.1%}"
        if self._kept["last"] is None:
            return f"before training: {text}"
        best = self._kept["best"]
        step = self._kept["last"]["step"]
        if best["step"] == step:
            return f"after step {step}: {text}, the best so far"
        return f"after step {step}: {text}; the best was {best['validation/loss']:.4f} after step {best['step']}"


def _means(suffix: str, sums) -> dict[str, float]:
    loss, count, hits = map(float, sums)
    count = count or math.nan
    return {f"validation/loss{suffix}": loss / count, f"validation/accuracy{suffix}": hits / count}
