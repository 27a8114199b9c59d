"""What a training run tells while it runs: metrics.jsonl, TensorBoard scalars, a live console line.

Only the main process of a multi-host run writes or prints; on the others every call does nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorboardX
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
TENSORBOARD_FOLDER = "tensorboard"
PLAIN_LINES_PER_RUN = 10


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


class Telemetry:
    """Writes the metrics of a run and shows its progress; a context manager.

    Args:
      workdir: the folder of the run; gets `metrics.jsonl` and `tensorboard/`.
      total_steps: optimiser steps of the whole run, those before a resume included.
      start_step: the first step that this process will log. Lines and events of a killed run at
        or after it are dropped, so that the records equal those of an uninterrupted run.
      is_main: False on all but one process of a multi-host run.
      console: where the progress goes; standard output by default.

    Raises:
      OSError: the files cannot be written.
      ValueError: an existing metrics.jsonl is not what this class writes.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        *,
        start_step: int = 0,
        is_main: bool = True,
        console: Console | None = None,
    ):
        self._is_main = is_main
        if not is_main:
            return
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

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step.

        `loss`, `tokens_per_second` and `examples_per_second` are shown on the console when
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
        self._display.update(int(step), values)

    def print(self, message: str) -> None:
        """Prints one line without disturbing the live one."""
        if self._is_main:
            self._console.print(message, markup=False, highlight=False)


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
    )
    return "  ".join(form.format(metrics[name]) for name, form in shown if name in metrics)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
