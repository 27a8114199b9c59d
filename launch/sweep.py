"""Runs all points of an ablation, one launch/train.py each, and draws what came out.

    python launch/sweep.py --config=configs/ablate_en_ratio.py --workdir=runs/en_ratio
    python launch/sweep.py --config=configs/ablate_en_ratio.py --workdir=runs/en_ratio --seeds=3 --jobs=2
    python launch/sweep.py report runs/en_ratio
    python launch/sweep.py report runs/en_ratio runs/popularity --page=docs/ablations.md
    python launch/sweep.py --config=configs/ablate_en_ratio.py:scale=pangea_7b --workdir=/shared/en_ratio \\
        --submit=tpu --submit_args="--cluster=NAME --tpu-type=v5p-64" --dry_run

Into the work directory: a folder for each run (that of launch/train.py, and log.txt), sweep.json, the figures and
summary.md. Started again, or with more seeds, it goes on: a run whose results are there is not repeated, one that was
killed resumes from its checkpoint. Overrides `--config.key=value` hold for every run.

`--submit` hands the runs to a cluster instead, xpk for TPUs and sbatch for Slurm, one job each, from a clone on a
file system that the jobs share; `report` draws whatever has finished.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.live import Live
from rich.table import Table

from eval.ablation import intervals, summary
from eval.ablation.intervals import RESULTS_FILE, SWEEP_FILE
from launch import common, distributed
from pangea_jax.work import atomic

CONFIG = common.define_config("configs/ablate_en_ratio.py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; default runs/<config>."
)
SEEDS = flags.DEFINE_integer("seeds", 1, "Runs a point, with seeds 0, 1, ...", lower_bound=1)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at once; each takes up to 2 GiB.", lower_bound=1)
POINTS = flags.DEFINE_list("points", [], "Names of the points to run; default all.")
SUBMIT = flags.DEFINE_enum("submit", None, ("tpu", "slurm"), "Hand the runs to a cluster.")
SUBMIT_ARGS = flags.DEFINE_string("submit_args", "", "Arguments for xpk or sbatch.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and run none.")
PAGE = flags.DEFINE_string(
    "page", None, "report: one page of all the sweeps named, figures beside."
)

TRAIN, SBATCH = "launch/train.py", "launch/gpu/train.sbatch"
RESTARTS = 50
ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 120


@dataclasses.dataclass
class Job:
    """One run of launch/train.py and how it stands."""

    point: str
    seed: int
    workdir: Path
    config: ConfigDict
    flags: tuple[str, ...]
    state: str = "waiting"
    process: subprocess.Popen | None = None
    started: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.workdir.name

    @property
    def is_finished(self) -> bool:
        return (self.workdir / RESULTS_FILE).exists()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the flags ask for: the ablation, and all its runs."""

    module: ModuleType
    path: str
    arg: str
    overrides: dict
    workdir: Path
    jobs: list[Job]

    @property
    def design(self) -> str:
        return dict(_pairs(self.arg)).get("design", next(iter(self.module.DESIGNS)))

    @property
    def command(self) -> str:
        config = f"{self.path}:{self.arg}" if self.arg else self.path
        overrides = _override_flags(self.overrides)
        words = ["python", "launch/sweep.py", f"--config={config}", f"--workdir={self.workdir}"]
        return shlex.join([*words, *overrides])


def make_plan() -> Plan:
    """The runs that the flags name, seed after seed.

    Raises:
      UserError: the config is no ablation, sets what the sweep sets, or has no such point.
    """
    holder = flags.FLAGS[CONFIG.name]
    path, _, arg = config_flags.get_config_filename(holder).partition(":")
    module = _module(path)
    if not hasattr(module, "points"):
        raise common.UserError(f"{path} has no points(); give one of configs/ablate_*.py")
    fixed = {"point", "seed"} & dict(_pairs(arg)).keys()
    if fixed:
        raise common.UserError(f"--config argument {min(fixed)}= is set by the sweep, run by run")
    overrides = config_flags.get_override_values(holder)
    known = module.points(arg)
    unknown = [point for point in POINTS.value if point not in known]
    if unknown:
        raise common.UserError(f"--points: {unknown[0]!r} is not one of {', '.join(known)}")
    workdir = Path(WORKDIR.value or common.default_workdir(CONFIG))
    jobs = []
    for seed in range(SEEDS.value):
        for point in dict.fromkeys(POINTS.value or known):
            full = ",".join(filter(None, (arg, f"point={point}", f"seed={seed}")))
            config = module.get_config(full)
            config.update_from_flattened_dict(overrides)
            words = (f"--config={path}:{full}", *_override_flags(overrides))
            jobs.append(Job(point, seed, workdir / f"{point}_seed{seed}", config, words))
    return Plan(module, path, arg, overrides, workdir, jobs)


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pairs(arg: str) -> Iterator[tuple[str, str]]:
    for item in filter(None, arg.split(",")):
        key, _, text = item.partition("=")
        yield key, text


def _override_flags(overrides) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def write_plan(plan: Plan) -> None:
    """sweep.json: what the report needs to know of every run, those of earlier calls included.

    Raises:
      UserError: the directory holds another sweep.
    """
    module, path = plan.module, plan.workdir / SWEEP_FILE
    axis = module.AXIS[plan.design] if isinstance(module.AXIS, dict) else module.AXIS
    mine = {
        "ablation": Path(plan.path).stem,
        "command": plan.command,
        "design": plan.design,
        "question": module.DESIGNS[plan.design],
        "axis": axis,
        "points": module.points(plan.arg),
    }
    runs = {job.name: {"name": job.name, "point": job.point, "seed": job.seed} for job in plan.jobs}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if _asked(theirs["command"]) != _asked(mine["command"]):
            raise common.UserError(
                f"{plan.workdir} holds another sweep ({theirs['command']}); give another --workdir, or "
                "remove that one"
            )
        runs = {run["name"]: run for run in theirs["runs"]} | runs
    seeds = 1 + max(run["seed"] for run in runs.values())
    mine["command"] += f" --seeds={seeds}" if seeds > 1 else ""
    plan.workdir.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, mine | {"runs": list(runs.values())}, ensure_ascii=False)


def _asked(command: str) -> set[str]:
    """What makes it that sweep: not the name that its folder goes by, nor how many seeds there are."""
    return {w for w in shlex.split(command) if not w.startswith(("--workdir=", "--seeds="))}


@contextlib.contextmanager
def only_sweep(workdir: Path, console: Console) -> Iterator[IO]:
    """Holds the directory's lock, and gives it, so that runs can hold it as well: those of a sweep
    that was killed may still be at work, and are waited for."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"{workdir} is in use by another sweep or its runs; waiting for them to end"
            console.print(said, soft_wrap=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def run_jobs(jobs: Sequence[Job], at_once: int, lock: IO, console: Console) -> bool:
    """Runs what is not finished; returns whether it was asked to stop before the end."""
    for job in jobs:
        common.claim_workdir(job.workdir, job.config)
        job.state = "finished" if job.is_finished else "waiting"
    stop = distributed.StopSignal()
    view = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with view or contextlib.nullcontext(), stop:
        try:
            told = False
            while True:
                _collect(jobs, console)
                running = [job for job in jobs if job.state == "running"]
                if stop.requested and not told:
                    told = True
                    _signal(running, signal.SIGINT)
                waiting = [] if told else [job for job in jobs if job.state == "waiting"]
                for job in waiting[: at_once - len(running)]:
                    _start(job, lock)
                    running.append(job)
                if view:
                    view.update(status_table(jobs), refresh=True)
                if not running:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            _end(jobs)
    if not view:
        console.print(status_table(jobs))
    return told


def _start(job: Job, lock: IO) -> None:
    log = (job.workdir / "log.txt").open("a", encoding="utf-8")
    with log:
        job.process = subprocess.Popen(
            [sys.executable, str(ROOT / TRAIN), *job.flags, f"--workdir={job.workdir}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C in a terminal comes to this process alone, which passes it on
            pass_fds=(lock.fileno(),),
        )
    job.state, job.started = "running", time.monotonic()


def _collect(jobs: Sequence[Job], console: Console) -> None:
    """Notes which runs have ended."""
    for job in jobs:
        if job.state != "running":
            continue
        job.seconds = time.monotonic() - job.started
        code = job.process.poll()
        if code is None:
            continue
        done = code == 0 and job.is_finished
        job.state = "finished" if done else "stopped" if code in common.EXIT_STOPPED else "failed"
        if not console.is_terminal:
            console.print(f"{job.name}: {job.state} after {job.seconds / 60:.1f} min")


def _signal(jobs: Sequence[Job], number: signal.Signals) -> None:
    for job in jobs:
        if job.process.poll() is None:
            job.process.send_signal(number)


def _end(jobs: Sequence[Job]) -> None:
    """No run outlives the sweep, whatever ends it."""
    running = [job for job in jobs if job.process and job.process.poll() is None]
    _signal(running, signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for job in running:
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def status_table(jobs: Sequence[Job]) -> Table:
    """How every run stands."""
    table = Table(
        title=f"{sum(job.state == 'finished' for job in jobs)} of {len(jobs)} runs finished"
    )
    for name in ("run", "state"):
        table.add_column(name)
    for name in ("step", "loss", "minutes", "English", "others"):
        table.add_column(name, justify="right")
    for job in jobs:
        row = _progress(job) if job.state != "waiting" else ("", "")
        minutes = f"{job.seconds / 60:.1f}" if job.seconds else ""
        scores = _scores(job) if job.state == "finished" else ("", "")
        colour = {"finished": "green", "running": "bold", "failed": "red"}.get(job.state)
        table.add_row(job.name, job.state, *row, minutes, *scores, style=colour)
    return table


def _progress(job: Job) -> tuple[str, str]:
    """(steps done, loss) by the last whole line of metrics.jsonl."""
    path = job.workdir / "metrics.jsonl"
    if not path.exists():
        return "", ""
    with path.open("rb") as file:
        # A line counts every language and source.
        file.seek(max(0, path.stat().st_size - 2**18))
        lines = file.read().split(b"\n")[:-1]
    if not lines:
        return "", ""
    last = json.loads(lines[-1])
    loss = last["loss"]  # null if every step was skipped
    return f"{last['step'] + 1:,}", "not finite" if loss is None else f"{loss:.3f}"


def _scores(job: Job) -> tuple[str, str]:
    """(English, others) in percent on the last split."""
    splits = json.loads((job.workdir / RESULTS_FILE).read_text(encoding="utf-8"))["splits"]
    rows = list(splits.values())[-1] if splits else {}
    cells = []
    for who in (intervals.ENGLISH, intervals.OTHERS):
        scored = next(
            (rows[who][m] for m in intervals.METRICS if rows.get(who) and m in rows[who]), None
        )
        cells.append("" if scored is None else f"{100 * scored:.1f}")
    return cells[0], cells[1]


def submit_command(job: Job, kind: str, extra: str) -> list[str]:
    """The command that hands a run to xpk or Slurm; stopped, it is started again and resumes."""
    train = ["python", TRAIN, *job.flags, f"--workdir={job.workdir}"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{job.workdir.parent.name}-{job.name}".lower())
    name = name.strip("-")[-40:].strip("-")  # as Kubernetes wants it
    if kind == "slurm":
        # Handed over twice, a run waits for itself.
        words = ["sbatch", f"--job-name={name}", "--dependency=singleton"]
        return [*words, *shlex.split(extra), SBATCH, *train[2:]]
    # By itself xpk starts a workload again only if it ends with 42 or above 126, as a stopped run does.
    words = ["xpk", "workload", "create", f"--workload={name}", f"--max-restarts={RESTARTS}"]
    return [*words, *shlex.split(extra), f"--command={shlex.join(train)}"]


def submit(plan: Plan, console: Console) -> None:
    """Hands over every run that has no results yet.

    Raises:
      UserError: the launcher is not installed, or refused.
    """
    if not DRY_RUN.value:
        write_plan(plan)
    for job in plan.jobs:
        if job.is_finished:
            continue
        command = submit_command(job, SUBMIT.value, SUBMIT_ARGS.value)
        console.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)
        if DRY_RUN.value:
            continue
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise common.UserError(
                f"{command[0]} is not installed; --dry_run prints the commands"
            ) from None
        except subprocess.CalledProcessError as error:
            raise common.UserError(
                f"{command[0]} refused {job.name} with exit code {error.returncode}; the runs before it are handed over"
            ) from None


def report(directories: Sequence[str], page: str | None, console: Console) -> None:
    """Figures and summary.md of every sweep, or one page of them all."""
    if not directories:
        raise common.UserError("report needs the --workdir of a sweep, or several")
    sweeps = [intervals.load(Path(directory)) for directory in directories]
    if page:
        summary.write_document(sweeps, Path(page))
        console.print(f"written: {page}", soft_wrap=True)
        return
    for sweep in sweeps:
        written = summary.write(sweep, sweep.directory)
        console.print(f"written: {written}", soft_wrap=True)


def run_sweep(plan: Plan, console: Console) -> None:
    with only_sweep(plan.workdir, console) as lock:
        write_plan(plan)
        stopped = run_jobs(plan.jobs, JOBS.value, lock, console)
    finished = [job for job in plan.jobs if job.state == "finished"]
    failed = [job for job in plan.jobs if job.state == "failed"]
    if finished and plan.jobs[0].config.eval:
        report([str(plan.workdir)], None, console)
    if failed:
        last = (failed[0].workdir / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        said = next((line for line in reversed(last) if "PANGEA_DEBUG" not in line), "nothing")
        raise common.UserError(
            f"{len(failed)} of {len(plan.jobs)} runs failed; {failed[0].name} said: {said} "
            f"({failed[0].workdir / 'log.txt'}). The same command tries them again"
        )
    if stopped or len(finished) < len(plan.jobs):
        print(
            f"stopped: {len(finished)} of {len(plan.jobs)} runs are finished, the others have saved; "
            "the same command goes on",
            file=sys.stderr,
        )
        sys.exit(common.EXIT_INTERRUPTED)


def main(argv):
    console = Console()
    if argv[1:2] == ["report"]:
        report(argv[2:], PAGE.value, console)
        return
    if len(argv) > 1:
        raise common.UserError(
            f"unexpected argument {argv[1]!r}; there is `report DIR` and no other"
        )
    plan = make_plan()
    if SUBMIT.value:
        submit(plan, console)
    elif DRY_RUN.value:
        for job in plan.jobs:
            words = ["python", TRAIN, *job.flags, f"--workdir={job.workdir}"]
            console.print(shlex.join(words), soft_wrap=True, highlight=False, markup=False)
    else:
        run_sweep(plan, console)


if __name__ == "__main__":
    common.run(main)
