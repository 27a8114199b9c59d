"""Logs of a training run: metrics.jsonl, TensorBoard scalars, a live console line, W&B.

Only the main process of a multi-host run writes or prints; on the others every call does nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_LINES_PER_RUN = 10
# Metrics that depend on the clock and the machine. All others are the same in every run of a config.
CLOCKED = (
    "time",
    "seconds_per_step",
    "tokens_per_second",
    "examples_per_second",
    "mfu",
    "data_wait",
    "goodput",
    "device_memory_gib",
)


class StepTimer:
    """Splits the wall-clock time of a run into named phases that never overlap.

    A phase entered inside another pauses the outer one, so the seconds of all phases and `other`
    add up to the total.

    Args:
      previous: `seconds` of the interrupted run that this one continues, so that the summary
        covers both.
    """

    def __init__(self, previous: Mapping[str, float] | None = None):
        self._seconds: dict[str, float] = dict(previous or {})
        self._running: list[str] = []
        self._mark = time.perf_counter()
        self._seconds.setdefault("other", 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the `with` body under `name`."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def data(self):
        """The wait for the next batch: what a faster input pipeline would save."""
        return self.phase("data")

    def step(self):
        """One optimiser step, up to the moment its metrics are on the host."""
        return self.phase("train step")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per phase so far; JSON-able, to be kept in a checkpoint and given back."""
        self._charge()
        return dict(self._seconds)

    def summary(self) -> dict[str, dict[str, float]]:
        """`{phase: {"seconds", "share"}}`, largest first, then `total`; the shares sum to 1."""
        seconds = self.seconds
        total = sum(seconds.values())
        ordered = sorted(seconds.items(), key=lambda item: -item[1])
        summary = {
            name: {"seconds": spent, "share": spent / total if total else 0.0}
            for name, spent in ordered
        }
        summary["total"] = {"seconds": total, "share": 1.0}
        return summary

    def _charge(self) -> None:
        """Books the time since the last mark on the innermost running phase."""
        now = time.perf_counter()
        name = self._running[-1] if self._running else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


class Window:
    """Metrics of the steps since the last log line.

    Its state is part of a checkpoint, so the first line after a restart covers the same steps as without one.
    """

    def __init__(self):
        self._steps: list[dict[str, float]] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        self._steps.append({name: float(value) for name, value in metrics.items()})

    def flush(self) -> dict[str, float]:
        """The metrics of a log line, of the steps since the last call.

        `loss` and `accuracy` per trained token and the mean `grad_norm` of all and of each part, over steps that were
        not skipped (NaN if all were); the numbers of `skipped_steps` and `loss_spikes`.
        """
        steps, self._steps = self._steps, []
        good = [step for step in steps if not step["skipped"]]
        tokens = sum(step["target_tokens"] for step in good)
        values = {
            name: sum(step[name] * step["target_tokens"] for step in good) / tokens
            if tokens
            else math.nan
            for name in ("loss", "accuracy")
        }
        for name in steps[0] if steps else ():
            if name.startswith("grad_norm"):
                values[name] = sum(s[name] for s in good) / len(good) if good else math.nan
        values["skipped_steps"] = sum(step["skipped"] for step in steps)
        values["loss_spikes"] = sum(step.get("loss_spikes", 0.0) for step in steps)
        return values

    def get_state(self) -> list[dict[str, float]]:
        return list(self._steps)

    def set_state(self, state: list[dict[str, float]]) -> None:
        self._steps = list(state)


class Speed:
    """Speed of the steps since the last log line.

    Args:
      timer: its phases "train step" and "data" are the time of a step, without compiling, saving, evaluating.
      flops_per_step: model FLOPs of `pangea_jax.train.flops`; None: unknown.
      peak_flops: FLOPs a second of all devices together; None: unknown.
      started: when the run began, by `time.time()`, before any restart; None: unknown.
    """

    def __init__(
        self,
        timer: StepTimer,
        *,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        started: float | None = None,
    ):
        self._timer, self._started = timer, started
        self._share = flops_per_step / peak_flops if flops_per_step and peak_flops else None
        self._counts = self._zero()
        self._before = timer.seconds

    @staticmethod
    def _zero() -> dict[str, float]:
        return {"steps": 0.0, "tokens": 0.0, "examples": 0.0}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Counts a completed step. Leave out steps that waited for the compiler."""
        self._counts["steps"] += 1
        self._counts["tokens"] += float(metrics["tokens"])
        self._counts["examples"] += float(metrics["examples"])

    def flush(self) -> dict[str, float]:
        """The metrics of a log line, of the steps since the last call; unknown ones are left out.

        - `seconds_per_step`, `tokens_per_second` (without padding), `examples_per_second`
        - `mfu`: see `pangea_jax.train.flops`; padding is computed, so it counts
        - `data_wait`: share of the time in which the host waited for a batch (an accelerator may still have been
          busy with the step before)
        - `goodput`: time in steps over the time since the run began, including restarts, pauses and lost work
        - `device_memory_gib`: peak memory of a device
        """
        now, counts = self._timer.seconds, self._counts
        spent = {
            name: now.get(name, 0) - self._before.get(name, 0) for name in ("train step", "data")
        }
        seconds = sum(spent.values())
        self._before, self._counts = now, self._zero()
        values = _device_memory()
        if self._started is not None:
            wall = max(time.time() - self._started, 1e-9)
            values["goodput"] = now.get("train step", 0.0) / wall
        if not counts["steps"] or not seconds:
            return values
        step = seconds / counts["steps"]
        values |= {
            "seconds_per_step": step,
            "tokens_per_second": counts["tokens"] / seconds,
            "examples_per_second": counts["examples"] / seconds,
            "data_wait": spent["data"] / seconds,
        }
        return values | ({"mfu": self._share / step} if self._share else {})


def _device_memory() -> dict[str, float]:
    # A CPU has no statistics.
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max((stat.get("peak_bytes_in_use", 0) for stat in stats), default=0)
    return {"device_memory_gib": peak / 2**30} if peak else {}


def gather(metrics: Mapping[str, float], *, mean: Collection[str] = ()) -> dict[str, float]:
    """Sums the metrics of all processes; names in `mean` are averaged.

    All processes must call it; their names may differ.
    """
    if jax.process_count() == 1:
        return dict(metrics)
    text = np.frombuffer(json.dumps(metrics).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    parts = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value / (len(parts) if name in mean else 1)
    return total


def record_start(workdir: Path, step: int) -> float:
    """Notes in starts.jsonl that the run starts or continues at `step`; returns the `time.time()` of its first
    start."""
    path = workdir / STARTS_FILE
    line = {"time": time.time(), "step": step}
    line |= {"processes": jax.process_count(), "devices": jax.device_count()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())["time"]


class Profiler:
    """Traces a window of steps into a folder, for TensorBoard's profiler, XProf or Perfetto.

    Args:
      window: "START:STOP", the steps from START up to STOP; "" for none.

    Raises:
      ValueError: it is not of that form.
    """

    def __init__(self, window: str, folder: Path):
        self._folder, self._running = folder, False
        match = re.fullmatch(r"(\d+):(\d+)", window)
        if window and not (match and int(match[1]) < int(match[2])):
            raise ValueError(f"a profile of steps {window!r}: expected START:STOP, such as 20:25")
        self._start, self._stop = map(int, match.groups()) if match else (None, None)

    def at(self, step: int, state: Any) -> None:
        """Starts or stops the trace before `step`; `state` is the state after the step before."""
        if step == self._start or (self._running and step == self._stop):
            jax.block_until_ready(state)
        if step == self._start:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step == self._stop:
            self._end()

    def _end(self):
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_) -> None:
        self._end()


class Telemetry:
    """Writes the metrics of a run and shows its progress; a context manager.

    Args:
      workdir: the folder of the run; gets `metrics.jsonl` and `tensorboard/`.
      total_steps: optimiser steps of the whole run, those before a resume included.
      start_step: the first step that this process will log. Later lines and events of a killed run are dropped,
        so the logs equal those of an uninterrupted run.
      is_main: False on all but one process of a multi-host run.
      console: where the progress goes; standard output by default.
      wandb: arguments of `wandb.init`, such as project and name, to log to Weights & Biases as well.

    Raises:
      OSError: the files cannot be written.
      ValueError: an existing metrics.jsonl is not what this class writes, or wandb is not installed.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        *,
        start_step: int = 0,
        is_main: bool = True,
        console: Console | None = None,
        wandb: Mapping[str, Any] | None = None,
    ):
        self._is_main = is_main
        if not is_main:
            return
        import tensorboardX  # it imports torch, which takes two seconds

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        trim_metrics(path, start_step)
        self._lines = path.open("a", buffering=1, encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / TENSORBOARD_FOLDER),
            purge_step=start_step,
            flush_secs=10,
            # Without it a resume within the same second would overwrite the first file.
            filename_suffix=f".from_step_{start_step}",
        )
        self._wandb = _start_wandb(workdir, wandb) if wandb else None
        self._console = console or Console()
        self._display: _LiveLine | _PlainLines
        if self._console.is_terminal:
            self._display = _LiveLine(self._console, total_steps, start_step)
        else:
            self._display = _PlainLines(self._console, total_steps, start_step)

    def __enter__(self) -> Telemetry:
        if self._is_main:
            self._display.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live line and writes out what is buffered; a second call does nothing."""
        if not self._is_main or self._lines.closed:
            return
        self._display.stop()
        self._lines.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step.

        `loss`, `tokens_per_second`, `examples_per_second` and `mfu` are shown on the console when
        present. JSON has no NaN or infinity: such values are null in metrics.jsonl.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line: dict[str, Any] = {"step": int(step), "time": time.time()}
        line |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, global_step=int(step))
        if self._wandb:
            self._wandb.log(values, step=int(step))
        self._display.update(int(step), values)

    def print(self, message: str) -> None:
        """Prints one line without disturbing the live one."""
        if self._is_main:
            self._console.print(message, markup=False, highlight=False)


def _start_wandb(workdir: Path, options: Mapping[str, Any]):
    """The Weights & Biases run of a work directory, new or continued."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            'config.wandb is set, but wandb is not installed: pip install "wandb>=0.19,<1", or set it to ""'
        ) from None
    path = workdir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return wandb.init(id=path.read_text().strip(), resume="allow", dir=str(workdir), **options)


def trim_metrics(path: Path, start_step: int) -> None:
    """Drops the lines of steps >= `start_step`, and a last line that a kill cut short.

    The file is replaced in one move: a kill meanwhile leaves the old or the new one.

    Raises:
      ValueError: any other line is not a JSON object with an integer "step".
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = [line for i, line in enumerate(lines, 1) if _line_step(path, i, line) < start_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _line_step(path: Path, number: int, line: str) -> int:
    try:
        step = json.loads(line)["step"]
        if isinstance(step, int):
            return step
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f'{path}, line {number}: expected a JSON object with an integer "step", got '
        f"{line.strip()[:80]!r}. Move the file away or choose another work directory."
    )


class _LiveLine:
    """One line at the foot of a terminal, redrawn in place."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[dim]elapsed"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._total, self._start = total_steps, start_step
        self._task: TaskID | None = None

    def start(self) -> None:
        self._task = self._progress.add_task(
            "train", total=self._total, completed=self._start, numbers=""
        )
        self._progress.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=step + 1, numbers=_numbers(metrics))

    def stop(self) -> None:
        self._progress.stop()


class _PlainLines:
    """About ten plain lines per run, for logs and pipes: no control characters."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._console = console
        self._total, self._start = total_steps, start_step
        self._every = max(1, total_steps // PLAIN_LINES_PER_RUN)
        self._next = start_step + 1  # the first step shows that the run is alive
        self._begin = time.monotonic()

    def start(self) -> None:
        self._begin = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        done = step + 1
        if done < min(self._next, self._total):
            return
        self._next = (done // self._every + 1) * self._every
        elapsed = time.monotonic() - self._begin
        left = elapsed / max(1, done - self._start) * (self._total - done)
        self._console.print(
            f"step {done}/{self._total} ({done / self._total:.0%})  {_numbers(metrics)}"
            f"  elapsed {_clock(elapsed)}  left {_clock(left)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def stop(self) -> None:
        pass


def _numbers(metrics: Mapping[str, float]) -> str:
    shown = (
        ("loss", "loss {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("examples_per_second", "{:,.0f} examples/s"),
        ("mfu", "MFU {:.1%}"),
    )
    return "  ".join(form.format(metrics[name]) for name, form in shown if name in metrics)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
