"""The training loop: draw a batch, step, watch, log, save; leave when asked to."""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from pangea_jax import sharding
from pangea_jax.train.guards import Guard
from pangea_jax.train.resume import Checkpoints
from pangea_jax.train.state import TrainState
from pangea_jax.train.telemetry import Profiler, Speed, StepTimer, Telemetry, Window, gather


@dataclasses.dataclass
class Loop:
    """Steps from where a state is to `total_steps`.

    The host is one step ahead of the devices, no more: while they work on a step, it has read the metrics
    of the one before and draws the next batch. Nothing moves between host and devices but the batch, the
    metrics and checkpoints; an implicit transfer is an error.

    Attributes:
      step_fn: of `make_train_step`.
      log_every, save_every: in steps.
      extra: what a log line holds besides, given the step and the digest of this process's rows since the last
        line: the sum of the CRC-32 of the tokens of each, begun at its step. Summed over processes
        it is the same wherever the same rows came at the same steps.
      on_first_batch: sees this process's rows of the very first batch of a run.
      stop: asked after every step, which it is given, by all processes; true ends the loop after a save.
      stopped: whether `stop` has ended it, be it after the last step.
    """

    step_fn: Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]
    mesh: jax.sharding.Mesh
    total_steps: int
    log_every: int
    save_every: int
    checkpoints: Checkpoints
    telemetry: Telemetry
    timer: StepTimer
    speed: Speed
    guard: Guard
    extra: Callable[[int, int], Mapping[str, float]]
    on_first_batch: Callable[[Mapping[str, np.ndarray]], None]
    stop: Callable[[int], bool]
    profiler: Profiler
    window: Window = dataclasses.field(default_factory=Window)

    def __post_init__(self):
        self._unread = collections.deque()
        self._digest = 0
        self.stopped = False

    def run(self, state: TrainState, data: Iterator[Mapping[str, np.ndarray]]) -> TrainState:
        """The state after the last step, or after the one at which it was asked to stop: saved.

        Raises:
          BadStepsError: see `Guard`.
        """
        first = int(jax.device_get(state.step))
        with self.checkpoints, self.profiler, jax.transfer_guard("disallow"):
            for step in range(first, self.total_steps):
                self.profiler.at(step, state)
                with self.timer.data():
                    rows = next(data)
                    with jax.transfer_guard("allow"):
                        batch = sharding.to_global(rows, self.mesh)
                self._digest += sum(zlib.crc32(row.tobytes(), step) for row in rows["tokens"])
                if step == 0:
                    self.on_first_batch(rows)
                with self.timer.phase("compile") if step == first else self.timer.step():
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = self.step_fn(state, batch)
                    self._unread.append((step, rows, metrics))
                    self._read(0 if step == first else 1, timed=step > first)
                if step == first:
                    self.speed.flush()  # what the first batch took is no step's
                last = step + 1 == self.total_steps
                self.stopped = self.stop(step)
                if last or (step + 1) % self.log_every == 0:
                    self._log(step)
                if last or self.stopped or (step + 1) % self.save_every == 0:
                    self._save(state, data)
                if self.stopped:
                    break
            with self.timer.phase("checkpoint"):
                self.checkpoints.close()
        return state

    def _read(self, ahead: int, *, timed: bool = True) -> None:
        """Waits for all steps but the last `ahead`, and looks at what they brought."""
        while len(self._unread) > ahead:
            step, rows, metrics = self._unread.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            spike = self.guard.check(step, metrics, rows)
            self.window.add(metrics | {"loss_spikes": float(spike)})
            if timed:
                self.speed.add(metrics)

    def _log(self, step):
        with self.timer.step():
            self._read(0)
        with jax.transfer_guard("allow"):
            metrics = self.window.flush() | self.speed.flush()
            metrics |= self.extra(step, self._digest)
        self._digest = 0
        self.telemetry.log(step, metrics)

    def _save(self, state, data):
        with self.timer.step():
            self._read(0)
        with self.timer.phase("checkpoint"), jax.transfer_guard("allow"):
            self.checkpoints.save(state, data, self._progress())

    def _progress(self) -> dict[str, Any]:
        return {
            "clock": self.timer.seconds,
            "window": self.window.get_state(),
            "guard": self.guard.get_state(),
            "digest": gather({"digest": self._digest})["digest"],
        }

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        """Goes on where a checkpoint was saved; the clock belongs to the timer, which is made with it."""
        self.window.set_state(progress["window"])
        self.guard.set_state(progress["guard"])
        self._digest = int(progress["digest"]) if jax.process_index() == 0 else 0
