"""The training loop: reads a batch, runs a step, checks, logs and saves; stops when asked to."""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jaxtyping import Array

from pangea_jax.batch import Batch
from pangea_jax.train.guards import Guard
from pangea_jax.train.resume import Checkpoints
from pangea_jax.train.state import TrainState
from pangea_jax.train.telemetry import Profiler, Speed, StepTimer, Telemetry, Window, gather
from pangea_jax.train.validation import Validator


@dataclasses.dataclass
class Loop:
    """Runs steps from the step of a state to `total_steps`.

    The host is at most one step ahead of the devices. While they compute a step, it reads the metrics of the step
    before and prepares the next batch. Only batches, metrics and checkpoints move between host and devices; an
    implicit transfer is an error.

    Attributes:
      step_fn: made by `make_train_step`.
      log_every, save_every: in steps.
      extra: gives more values for a log line. Its arguments are the step and a digest of this process's rows since
        the last line: the sum of the CRC-32 of each row's tokens, started at the step. The sum of the digests of all
        processes is equal in two runs that saw the same rows at the same steps.
      on_first_batch: called with this process's rows of the very first batch of a run.
      stop: all processes call it with the number of each finished step. If it returns true, the loop saves and ends.
      validator: scores held-back examples before the first step, when it is due, and after the last step. The
        checkpoint of the best step is kept.
      bench: asks a benchmark with `run(state, step)` after the steps that are `due`, and if it `has_curve` after the
        last one. The values are logged. None: nothing is asked.
      stopped: whether `stop` ended the loop, even after the last step.
    """

    step_fn: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]
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
    on_first_batch: Callable[[Batch], None]
    stop: Callable[[int], bool]
    profiler: Profiler
    window: Window = dataclasses.field(default_factory=Window)
    validator: Validator | None = None
    bench: Any = None

    def __post_init__(self):
        self._unread = collections.deque()
        self._digest = 0
        self.stopped = False

    def run(self, state: TrainState, data: Iterator[Batch]) -> TrainState:
        """Runs and saves; returns the state after the last step or after the requested stop.

        Raises:
          BadStepsError: see `Guard`.
          ValueError: the data ended before the last step.
        """
        first = int(jax.device_get(state.step))
        with self.checkpoints, self.profiler, jax.transfer_guard("disallow"):
            if self.validator and first == 0:
                self._validate(state, -1)
            for step in range(first, self.total_steps):
                self.profiler.at(step, state)
                with self.timer.data():
                    rows = self._next(data, step)
                    with jax.transfer_guard("allow"):
                        batch = rows.place(self.mesh)
                self._digest += sum(zlib.crc32(row.tobytes(), step) for row in rows.tokens)
                if step == 0:
                    self.on_first_batch(rows)
                with self.timer.phase("compile") if step == first else self.timer.step():
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = self.step_fn(state, batch)
                    self._unread.append((step, rows, metrics))
                    self._read(0 if step == first else 1, timed=step > first)
                if step == first:
                    self.speed.flush()  # the first batch also waits for the start of the data workers
                last = step + 1 == self.total_steps
                self.stopped = self.stop(step)
                due = bool(self.validator) and (last or self.validator.due(step))
                found = self._validate(state, step) if due else {}
                asked = bool(self.bench) and self.bench.has_curve and (last or self.bench.due(step))
                if asked:
                    found |= self._ask(state, step)
                if last or due or asked or (step + 1) % self.log_every == 0:
                    self._log(step, found)
                is_best = due and self.validator.best_step == step + 1
                if last or is_best or self.stopped or (step + 1) % self.save_every == 0:
                    self._save(state, data)
                if self.stopped:
                    break
            with self.timer.phase("checkpoint"):
                self.checkpoints.close()
        return state

    def _next(self, data: Iterator[Batch], step: int) -> Batch:
        try:
            return next(data)
        except StopIteration:
            raise ValueError(
                f"the data ended before step {step} of {self.total_steps}; lower config.steps"
            ) from None

    def _read(self, ahead: int = 0, *, timed: bool = True) -> None:
        """Waits for all steps except the last `ahead`; checks their metrics and adds them to the log line."""
        while len(self._unread) > ahead:
            step, rows, metrics = self._unread.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            spike = self.guard.check(step, metrics, rows)
            self.window.add(metrics | {"loss_spikes": float(spike)})
            if timed:
                self.speed.add(metrics)

    def _validate(self, state, step) -> dict[str, float]:
        with self.timer.step():
            self._read()
        with self.timer.phase("validation"), jax.transfer_guard("allow"):
            found = self.validator.run(state, step)
        self.checkpoints.keep_best(self.validator.best_step)
        self.telemetry.print(self.validator.describe(found))
        return found

    def _ask(self, state, step) -> dict[str, float]:
        with self.timer.step():
            self._read()
        with self.timer.phase("evaluate"), jax.transfer_guard("allow"):
            return self.bench.run(state, step)

    def _log(self, step, found):
        with self.timer.step():
            self._read()
        with jax.transfer_guard("allow"):
            metrics = self.window.flush() | self.speed.flush()
            metrics |= self.extra(step, self._digest) | found
        self._digest = 0
        self.telemetry.log(step, metrics)

    def _save(self, state, data):
        with self.timer.step():
            self._read()
        with self.timer.phase("checkpoint"), jax.transfer_guard("allow"):
            progress = {
                "clock": self.timer.seconds,
                "window": self.window.get_state(),
                "guard": self.guard.get_state(),
                "validation": self.validator and self.validator.results(),
                "digest": gather({"digest": self._digest})["digest"],
            }
            self.checkpoints.save(state, data, progress)

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        """Restores the progress of a checkpoint, except the clock, which the caller gives to the timer."""
        self.window.set_state(progress["window"])
        self.guard.set_state(progress["guard"])
        if self.validator and progress.get("validation"):
            self.validator.set_state(progress["validation"])
            self.checkpoints.keep_best(self.validator.best_step)
        self._digest = int(progress["digest"]) if jax.process_index() == 0 else 0
