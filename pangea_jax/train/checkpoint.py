"""Checkpoints with Orbax: model, optimiser, step, data iterator and clock in one; saved in the background."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from pangea_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one run, in `directory`/<step>/; the newest `keep` stay.

    Restoring continues the run exactly: the same state, and the batch after the last one trained on.
    """

    def __init__(self, directory: str | Path, *, keep: int):
        newest = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            Path(directory).absolute(), preservation_policy=newest
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, if any."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, data: Iterator, clock: Mapping[str, float]) -> None:
        """Copies the state to the host, then writes in the background.

        Args:
          data: the Grain iterator, not yet advanced past the batch of this step.
          clock: seconds spent per phase so far.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest_step:
            return
        parts = {"state": state, "data": data, "clock": dict(clock)}
        # Without force Orbax skips a save, the last of a run included, while another is being written.
        self._orbax.save_checkpointables_async(step, parts, force=True)

    def restore(
        self, abstract_state: TrainState, data: Iterator
    ) -> tuple[TrainState, dict[str, float]]:
        """The newest checkpoint onto the shardings of `abstract_state`; `data` is set in place."""
        wanted = {"state": abstract_state, "data": data, "clock": None}
        restored = self._orbax.load_checkpointables(self.latest_step, wanted)
        return restored["state"], {name: float(spent) for name, spent in restored["clock"].items()}

    def close(self) -> None:
        """Waits for what is still being written."""
        self._orbax.close()
