"""Detects steps with a loss or gradients that are not finite, and spikes of the loss."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from pangea_jax.batch import Batch
from pangea_jax.data import batch_view
from pangea_jax.data.tokenizer import Tokenizer

# The median of fewer losses means little.
_FEWEST = 16
# Median absolute deviation of a normal distribution, in standard deviations.
_MAD = 0.6745


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When to warn, and when to end the run.

    Attributes:
      max_bad_steps: the run ends after so many skipped steps in a row (loss or gradients that are not finite).
      spike: a loss more than this many robust standard deviations above the median is logged.
      window: number of recent losses for the median.
    """

    max_bad_steps: int = 5
    spike: float = 8.0
    window: int = 128


class BadStepsError(RuntimeError):
    """Too many consecutive steps were not finite; names the file with the last batch."""


class Guard:
    """Checks the metrics of every step, in order.

    Args:
      dump: writes this process's rows of a step's batch and returns the path.
    """

    def __init__(self, config: GuardConfig, dump: Callable[[int, Batch], Path]):
        self._config, self._dump = config, dump
        self._bad = 0
        self._losses = collections.deque(maxlen=config.window)

    def check(self, step: int, metrics: Mapping[str, float], rows: Batch) -> bool:
        """Returns whether the loss of this step is a spike.

        Args:
          metrics: of `pangea_jax.train.step`, on the host.
          rows: of the step's batch.

        Raises:
          BadStepsError: the last `max_bad_steps` steps were all skipped.
        """
        loss = float(metrics["loss"])
        if not metrics["skipped"]:
            self._bad = 0
            return self._is_spike(step, loss)
        self._bad += 1
        norm = float(metrics["grad_norm"])
        logging.warning("step %d: loss %g, gradient norm %g: no update", step, loss, norm)
        if self._bad >= self._config.max_bad_steps:
            place = self._dump(step, rows)
            raise BadStepsError(
                f"the loss or the gradients were not finite in {self._bad} steps in a row, the last of "
                f"them step {step} (loss {loss:g}, gradient norm {norm:g}); its batch is in {place}. "
                "Look at it, lower optimizer.learning_rate or optimizer.clip_norm, and start again: the "
                "run continues from its last checkpoint"
            )
        return False

    def _is_spike(self, step, loss):
        before = np.array(self._losses)
        self._losses.append(loss)
        if len(before) < _FEWEST:
            return False
        median = np.median(before)
        # If all losses are nearly equal, a small difference is not a spike.
        spread = max(np.median(np.abs(before - median)) / _MAD, 1e-3 * abs(median))
        above = (loss - median) / spread if spread else 0.0
        if above <= self._config.spike:
            return False
        logging.warning(
            f"step {step}: the loss is {loss:.3f}, {above:.0f} robust standard deviations above the median "
            f"{median:.3f} of the last {len(before)} steps"
        )
        return True

    def get_state(self) -> dict[str, Any]:
        return {"bad": self._bad, "losses": list(self._losses)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._bad = state["bad"]
        self._losses.extend(state["losses"])


def dump_batch(rows: Batch, step: int, tokenizer: Tokenizer, patches: int, workdir: Path) -> Path:
    """Writes this process's rows of a batch; returns the path of the first file.

    The files are bad_batch_<step>.npz with the arrays, .html with the words, and .png with the tiles if there are any.
    """
    name = f"bad_batch_{step}"
    if jax.process_count() > 1:
        name += f"_process_{jax.process_index()}"
    path = workdir / f"{name}.npz"
    np.savez(path, **{k: v for k, v in vars(rows).items() if v is not None})
    batch_view.save_batch(rows, tokenizer, patches, workdir, rows=len(rows), name=name)
    return path
