"""Logs of a training run: metrics.jsonl, TensorBoard scalars, a live console line, W&B.

Only the main process of a multi-host run writes or prints; on the others every call does nothing.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from absl import logging
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from pangea_jax.work import distributed
from pangea_jax.work.atomic import write_bytes
from pangea_jax.work.untrusted import parse_json

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_id.txt"
# What a run that continues reads, changes or appends to.
APPENDED = (METRICS_FILE, STARTS_FILE, WANDB_FILE)
PLAIN_LINES_PER_RUN = 10
# Metrics on the console.
SHOWN = {
    "loss": lambda value: f"loss {_loss(value)}",
    "validation/loss": lambda value: f"validation {_loss(value)}",
    "tokens_per_second": lambda value: f"{readable(value)} tokens/s",
    "examples_per_second": lambda value: f"{readable(value)} examples/s",
    "mfu": lambda value: f"MFU {value:.1%}" if value >= 0.01 else f"MFU {readable(100 * value)}%",
}
# Metrics that depend on the clock and the machine. All others are the same in every run of a config.
CLOCKED = ("time", "seconds_per_step", "tokens_per_second", "examples_per_second")
CLOCKED += ("mfu", "data_wait", "goodput", "device_memory_gib")


class StepTimer:
    """Splits the wall-clock time of a run into named phases that never overlap.

    A phase that begins inside another pauses the outer one. So the seconds of all phases and of `other` add up to
    the total.

    Args:
      previous: `seconds` of the interrupted run that this one continues; the summary covers both.
    """

    def __init__(self, previous: Mapping[str, float] | None = None):
        self._seconds = {"other": 0.0, **(previous or {})}
        self._running = ["other"]
        self._mark = time.perf_counter()

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
        """Seconds of each phase so far. A checkpoint keeps them for `previous`."""
        self._charge()
        return dict(self._seconds)

    def summary(self) -> dict[str, dict[str, float]]:
        """`{phase: {"seconds", "share"}}`, largest first, then `total`; the shares sum to 1."""
        seconds = dict(sorted(self.seconds.items(), key=lambda item: -item[1]))
        total = sum(seconds.values())
        shares = {name: spent / total if total else 0.0 for name, spent in seconds.items()}
        summary = {name: {"seconds": seconds[name], "share": shares[name]} for name in seconds}
        return summary | {"total": {"seconds": total, "share": 1.0}}

    def _charge(self) -> None:
        """Adds the time since the last call to the innermost running phase."""
        now, name = time.perf_counter(), self._running[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


class Window:
    """Metrics of the steps since the last log line.

    Checkpoints hold its state. So the first line after a restart covers the same steps as in a run without restart.
    """

    def __init__(self):
        self._steps: list[dict[str, float]] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        self._steps.append({name: float(value) for name, value in metrics.items()})

    def flush(self) -> dict[str, float]:
        """The metrics of a log line about the steps since the last call.

        `loss` and `accuracy` are means over trained tokens, and each `grad_norm` is a mean over steps. Skipped steps
        do not count; if all steps were skipped, the values are NaN. `skipped_steps` and `loss_spikes` are numbers of
        steps.
        """
        steps, self._steps = self._steps, []
        good = [step for step in steps if not step["skipped"]]
        tokens = sum(step["target_tokens"] for step in good) or math.nan
        values = {
            name: sum(step[name] * step["target_tokens"] for step in good) / tokens
            for name in ("loss", "accuracy")
        }
        for name in steps[0] if steps else ():
            if name.startswith("grad_norm"):
                values[name] = sum(step[name] for step in good) / (len(good) or math.nan)
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
      timer: its phases "train step" and "data" are the time of a step. Compiling, saving and evaluating do not count.
      flops_per_step: model FLOPs of `pangea_jax.train.flops`; None if unknown.
      peak_flops: FLOPs a second of all devices together; None if unknown.
      started: `time.time()` of the very first start of the run; None if unknown.
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
        self._counts = Counter()
        self._before = timer.seconds

    def add(self, metrics: Mapping[str, float]) -> None:
        """Counts a completed step. Leave out steps that waited for the compiler."""
        self._counts.update(steps=1, tokens=metrics["tokens"], examples=metrics["examples"])

    def flush(self) -> dict[str, float]:
        """The metrics of a log line about the steps since the last call, without those that are unknown.

        - `seconds_per_step`, `tokens_per_second` (without padding), `examples_per_second`
        - `mfu`: see `pangea_jax.train.flops`. Padding counts, because it is computed
        - `data_wait`: share of the time in which the host waited for a batch. An accelerator may still have been
          busy with the step before
        - `goodput`: time in steps over the time since the run began, including restarts, pauses and lost work
        - `device_memory_gib`: peak memory of the fullest device
        """
        now, counts = self._timer.seconds, self._counts
        spent = {
            name: now.get(name, 0) - self._before.get(name, 0) for name in ("train step", "data")
        }
        seconds = sum(spent.values())
        self._before, self._counts = now, Counter()
        values = {}
        # A CPU has no statistics.
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        if peak := max(stat.get("peak_bytes_in_use", 0) for stat in stats):
            values["device_memory_gib"] = peak / 2**30
        if self._started is not None:
            # A clock that was set back may say that less time has passed than the timer has counted.
            wall = max(time.time() - self._started, sum(now.values()))
            values["goodput"] = now.get("train step", 0.0) / wall if wall else 0.0
        if counts["steps"] and seconds:
            step = seconds / counts["steps"]
            values["seconds_per_step"] = step
            values["tokens_per_second"] = counts["tokens"] / seconds
            values["examples_per_second"] = counts["examples"] / seconds
            values["data_wait"] = spent["data"] / seconds
            if self._share:
                values["mfu"] = self._share / step
        return values


def gather(metrics: Mapping[str, float], *, mean: Collection[str] = ()) -> dict[str, float]:
    """Sums the metrics of all processes; names in `mean` are averaged.

    All processes must call it; their names may differ.
    """
    parts = distributed.gather(dict(metrics))
    total = Counter()
    for part in parts:
        total.update(part)
    return {name: total[name] / (len(parts) if name in mean else 1) for name in total}


def record_start(workdir: Path, step: int) -> float | None:
    """Adds a line to starts.jsonl: the run starts or continues at `step`.

    Returns:
      `time.time()` of its first start; now if that lies in the future, because a clock was wrong; None, with a warning,
      if the first line is damaged.
    """
    path, now = workdir / STARTS_FILE, time.time()
    line = {"time": now, "step": step}
    line |= {"processes": jax.process_count(), "devices": jax.device_count()}
    # A kill may have left a line without its end.
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")
    with path.open("rb") as file:
        return _first_start(path, file.readline(), now)


def _first_start(path: Path, line: bytes, now: float) -> float | None:
    try:
        started = parse_json(line)["time"]
        if isinstance(started, bool) or not math.isfinite(started):
            raise ValueError(started)
    except (ValueError, TypeError, KeyError, OverflowError):
        logging.warning("%s, line 1: no start of a run (%.60r); goodput is not logged", path, line)
        return None
    if started > now:
        ahead = timedelta(seconds=round(min(started - now, 1e9)))
        said = "%s: the run began %s in the future, as a clock was wrong; goodput counts from this start on"
        logging.warning(said, path, ahead)
        return now
    return started


class Profiler:
    """Traces a window of steps into a folder, for TensorBoard's profiler, XProf or Perfetto.

    Args:
      window: "START:STOP" for the steps from START up to STOP - 1; "" for none.

    Raises:
      ValueError: `window` has another form.
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
            self.__exit__()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class Telemetry:
    """Writes the metrics of a run and shows its progress; a context manager.

    Args:
      workdir: the folder of the run, in which `metrics.jsonl` and `tensorboard/` are written.
      total_steps: optimiser steps of the whole run, including those before a resume.
      start_step: the first step that this process will log. Lines and events of a killed run from that step on are
        dropped, so the logs equal those of an uninterrupted run.
      is_main: False on all but one process of a multi-host run.
      console: where the progress goes; standard output by default.
      wandb: arguments of `wandb.init`, such as project and name, to log to Weights & Biases as well.

    Raises:
      ValueError: this class did not write the existing metrics.jsonl, or wandb is not installed.
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
            # Without the suffix a resume within the same second would overwrite the first file.
            filename_suffix=f".from_step_{start_step}",
        )
        self._wandb = _start_wandb(workdir, wandb) if wandb else None
        self._console = console or Console()
        self._latest: dict[str, float] = {}  # shown until the next validation
        display = _LiveLine if self._console.is_terminal else _PlainLines
        self._display = display(self._console, total_steps, start_step)

    def __enter__(self) -> Telemetry:
        if self._is_main:
            self._display.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._is_main:
            return
        self._display.stop()
        self._lines.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step and shows some of them on the console (`SHOWN`).

        JSON has no NaN or infinity: such values are null in metrics.jsonl.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = {"step": step, "time": time.time()} | finite
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, global_step=step)
        if self._wandb:
            self._wandb.log(values, step=step)
        self._latest |= {name: value for name, value in values.items() if name == "validation/loss"}
        self._display.update(step, self._latest | values)

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
    path = workdir / WANDB_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return wandb.init(id=path.read_text().strip(), resume="allow", dir=str(workdir), **options)


def trim_metrics(path: Path, start_step: int) -> None:
    """Drops the lines of steps from `start_step` on, and a last line that a kill left incomplete.

    Raises:
      ValueError: any other line is not a JSON object with an integer "step".
    """
    if not path.exists():
        return
    text = path.read_bytes().decode(
        "utf-8", "replace"
    )  # what is replaced is named as a damaged line
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = [line for i, line in enumerate(lines, 1) if _line_step(path, i, line) < start_step]
    write_bytes(path, "".join(kept).encode())


def _line_step(path: Path, number: int, line: str) -> int:
    try:
        step = parse_json(line)["step"]
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
            TextColumn("[dim]{task.fields[left]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = {"total": total_steps, "completed": start_step, "numbers": "", "left": ""}
        self._pace = _Pace(total_steps)

    def start(self) -> None:
        self._progress.add_task("train", **self._task)
        self._progress.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = {"numbers": _numbers(metrics), "left": self._pace.left(step + 1)}
        self._progress.update(self._progress.task_ids[0], completed=step + 1, **shown)

    def stop(self) -> None:
        self._progress.stop()


class _PlainLines:
    """About ten plain lines per run, for logs and pipes: no control characters."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._console, self._total = console, total_steps
        self._pace = _Pace(total_steps)
        self._every = max(1, total_steps // PLAIN_LINES_PER_RUN)
        self._next = start_step + 1  # the first step shows that the run is alive
        self._begin = time.monotonic()

    def start(self) -> None:
        self._begin = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        done = step + 1
        left = self._pace.left(done)
        if done < min(self._next, self._total):
            return
        self._next = (done // self._every + 1) * self._every
        elapsed = timedelta(seconds=round(time.monotonic() - self._begin))
        self._console.print(
            f"step {done}/{self._total} ({done / self._total:.0%})  {_numbers(metrics)}"
            f"  elapsed {elapsed}  {left}".rstrip(),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def stop(self) -> None:
        """There is nothing to end."""


class _Pace:
    """Estimates the time that is left, from the steps after the first log line.

    The time before that line does not count: it has the compiler in it, and the steps of earlier starts.
    """

    def __init__(self, total_steps: int):
        self._total, self._first = total_steps, None

    def left(self, done: int) -> str:
        """ "left 0:01:30", or nothing if no pace is known yet."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        steps, seconds = done - self._first[0], now - self._first[1]
        if done < self._total and not steps:
            return ""
        rest = seconds / max(1, steps) * (self._total - done)
        return f"left {timedelta(seconds=round(rest))}"


def _numbers(metrics: Mapping[str, float]) -> str:
    return "  ".join(form(metrics[name]) for name, form in SHOWN.items() if name in metrics)


def _loss(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def readable(value: float) -> str:
    """A number with at least two digits that say something.

    >>> [readable(value) for value in (12345.6, 43.21, 4.321, 0.4321, 0.004321)]
    ['12,346', '43', '4.3', '0.43', '0.0043']
    """
    return f"{value:.2g}" if abs(value) < 9.95 else f"{value:,.0f}"
