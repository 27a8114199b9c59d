"""Runs all points of an ablation, each with launch/train.py, and draws the results.

    python launch/sweep.py --config=configs/ablate_en_ratio.py --workdir=runs/en_ratio
    python launch/sweep.py --config=configs/ablate_en_ratio.py --workdir=runs/en_ratio --seeds=3 --jobs=2
    python launch/sweep.py report runs/en_ratio
    python launch/sweep.py report runs/en_ratio runs/popularity --page=docs/ablations.md
    python launch/sweep.py --config=configs/ablate_en_ratio.py:scale=pangea_7b,root=gs://BUCKET \\
        --workdir=gs://BUCKET/runs/en_ratio --submit=tpu --submit_args="--cluster=NAME --tpu-type=v5p-64"
    python launch/sweep.py status gs://BUCKET/runs/en_ratio

The work directory gets a folder for each run (the work directory of launch/train.py, and log.txt), sweep.json, the
figures and summary.md. The same command, also with more seeds, continues a sweep: it does not repeat finished runs, and
stopped runs continue from their checkpoints. Overrides `--config.key=value` apply to every run.

For a smaller sweep, `num_examples=` in the config argument keeps the design. `--config.steps` and other overrides that
shorten or change the runs put a note into the figures and the page. If a point has too few examples for its steps, the
sweep is refused before any run starts.

`--submit` submits each run to a cluster as one job, with xpk for TPUs or sbatch for Slurm, waits until all have ended,
and draws the results. Ctrl-C ends the waiting and not the runs; the same command waits again and submits only what has
failed. `--resubmit` submits all that is not finished, if jobs were cancelled. Use a bucket, or start it in a clone
on a file system that the jobs share. `status` shows what runs, what failed and why, and the chip-hours so far, without
the time in queues. `report` draws the finished runs.
"""

import contextlib
import dataclasses
import importlib.util
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import IO

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from eval.ablation import intervals, summary
from eval.ablation.intervals import RESULTS_FILE, SWEEP_FILE
from launch import attempts, common
from pangea_jax import experiment, typed_config
from pangea_jax.experiment import Experiment
from pangea_jax.figures import inert
from pangea_jax.work import atomic, distributed, mirror, paths, restart

common.define_config("configs/ablate_en_ratio.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all results; default runs/<config>.")
SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Number of runs of each point, with seeds 0, 1, ...", lower_bound=1
)
JOBS = flags.DEFINE_integer(
    "jobs", 1, "Number of runs at the same time; each needs up to 2 GiB.", lower_bound=1
)
POINTS = flags.DEFINE_list("points", [], "Names of the points to run; by default all.")
SUBMIT = flags.DEFINE_enum("submit", None, ("tpu", "slurm"), "Submit the runs to a cluster.")
SUBMIT_ARGS = flags.DEFINE_string("submit_args", "", "Arguments for xpk or sbatch.")
RESUBMIT = flags.DEFINE_bool("resubmit", False, "Submit unfinished runs again.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands; run nothing.")
PAGE = flags.DEFINE_string(
    "page", None, "report: write one page of all named sweeps, with figures beside it."
)

LOG_FILE, SUBMITTED_FILE = "log.txt", "submitted.json"
TRAIN, SBATCH = "launch/train.py", "launch/gpu/train.sbatch"
RESTARTS = 50
ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5
# The table of a sweep in a bucket is drawn less often, because every row is read there.
REMOTE_POLL_SECONDS = 15
PATIENCE_SECONDS = 120


@dataclasses.dataclass
class Job:
    """One run of launch/train.py and its state."""

    point: str
    seed: int
    workdir: Path
    config: Experiment
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
    """The ablation that the flags name, and all its runs."""

    module: ModuleType
    path: str
    arg: str
    overrides: dict
    workdir: Path
    jobs: list[Job]

    @property
    def design(self) -> str:
        return _pairs(self.arg).get("design", next(iter(self.module.DESIGNS)))

    @property
    def command(self) -> str:
        config = f"{self.path}:{self.arg}" if self.arg else self.path
        words = ["python", "launch/sweep.py", f"--config={config}", f"--workdir={self.workdir}"]
        return shlex.join([*words, *_override_flags(self.overrides)])


def make_plan() -> Plan:
    """Plans the runs that the flags name, in the order of the seeds.

    Raises:
      UserError: the config is not an ablation, sets point or seed, or lacks a point of --points.
    """
    holder = flags.FLAGS["config"]
    path, _, arg = config_flags.get_config_filename(holder).partition(":")
    module = _module(path)
    if not hasattr(module, "points"):
        raise common.UserError(f"{path} has no points(); choose one of configs/ablate_*.py")
    fixed = {"point", "seed"} & _pairs(arg).keys()
    if fixed:
        raise common.UserError(
            f"remove {min(fixed)}= from --config: the sweep sets {min(fixed)}= for each run"
        )
    overrides = common.overrides()
    known = module.points(arg)
    unknown = [point for point in POINTS.value if point not in known]
    if unknown:
        raise common.UserError(f"--points: {unknown[0]!r} is not one of {', '.join(known)}")
    workdir = common.folder(WORKDIR.value or common.default_workdir(), "--workdir")
    jobs = []
    for seed in range(SEEDS.value):
        for point in dict.fromkeys(POINTS.value or known):
            full = ",".join(filter(None, (arg, f"point={point}", f"seed={seed}")))
            config = module.get_config(full)
            config.update_from_flattened_dict(overrides)
            config = typed_config.build(Experiment, config)
            words = (f"--config={path}:{full}", *_override_flags(overrides))
            jobs.append(Job(point, seed, workdir / f"{point}_seed{seed}", config, words))
    return Plan(module, path, arg, overrides, workdir, jobs)


def check_sizes(jobs: Sequence[Job]) -> None:
    """Chooses the records of each unfinished run, before any of them trains.

    Raises:
      UserError: a run has too few examples for its steps. ValueError: see `experiment.choose_records`.
    """
    for job in {job.point: job for job in jobs if not job.is_finished}.values():
        exp, rows = job.config, job.config.pipeline
        store, _ = experiment.open_data(exp)
        found = len(experiment.choose_records(exp, store).rows)
        there = found // (rows.rows * rows.examples_per_row)
        if rows.packing in ("none", "balanced") and (exp.steps or 1) > there:
            raise common.UserError(
                f"{job.name}: its {found:,} examples make {there:,} steps of {rows.rows * rows.examples_per_row}, "
                f"not {exp.steps or 1:,}; lower config.steps or pipeline.rows, or raise num_examples= in --config. "
                "No run has been started"
            )


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pairs(arg: str) -> dict[str, str]:
    """The argument of a config, such as "design=rotate,scale=pangea_7b", as a dict."""
    return dict(item.partition("=")[::2] for item in filter(None, arg.split(",")))


def _override_flags(overrides) -> list[str]:
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def write_plan(plan: Plan) -> None:
    """Writes sweep.json for the report, and keeps the runs of earlier calls in it.

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
        theirs = atomic.read_json(path)
        if _asked(theirs["command"]) != _asked(mine["command"]):
            raise common.UserError(
                f"{plan.workdir} holds another sweep ({theirs['command']}); choose another --workdir "
                "or remove this one"
            )
        runs = {run["name"]: run for run in theirs["runs"]} | runs
    seeds = 1 + max(run["seed"] for run in runs.values())
    mine["command"] += f" --seeds={seeds}" if seeds > 1 else ""
    paths.make_folder(plan.workdir)
    atomic.write_json(path, mine | {"runs": list(runs.values())}, ensure_ascii=False)


def _asked(command: str) -> set[str]:
    """The words that identify a sweep: all but the folder and the number of seeds."""
    return {w for w in shlex.split(command) if not w.startswith(("--workdir=", "--seeds="))}


def run_jobs(
    jobs: Sequence[Job], at_once: int, lock: IO | None, logs: Path, console: Console
) -> bool:
    """Runs the unfinished jobs. Returns whether a signal stopped the sweep before the end.

    Args:
      lock: the locked file that the runs inherit, if there is one.
      logs: their output goes to log.txt in a folder of this folder.
    """
    for job in jobs:
        common.claim_workdir(job.workdir, job.config)
        job.state = "finished" if job.is_finished else "waiting"
    stop, interrupted = distributed.StopSignal(), False
    view = Live(console=console, auto_refresh=False) if console.is_terminal else None
    seconds = REMOTE_POLL_SECONDS if paths.is_remote(jobs[0].workdir) else POLL_SECONDS
    drawn = -seconds
    with view or contextlib.nullcontext(), stop:
        try:
            while True:
                _collect(jobs, console)
                if stop.requested and not interrupted:
                    interrupted = True
                    _interrupt(jobs)
                running = sum(job.state == "running" for job in jobs)
                waiting = [] if interrupted else [job for job in jobs if job.state == "waiting"]
                for job in waiting[: at_once - running]:
                    _start(job, lock, logs)
                if view and time.monotonic() - drawn >= seconds:
                    drawn = time.monotonic()
                    view.update(status_table(jobs), refresh=True)
                if not any(job.state == "running" for job in jobs):
                    break
                time.sleep(POLL_SECONDS)
        finally:
            _end(jobs)
    if not view:
        console.print(status_table(jobs))
    return interrupted


def _start(job: Job, lock: IO | None, logs: Path) -> None:
    (logs / job.name).mkdir(exist_ok=True)
    with (logs / job.name / LOG_FILE).open("a", encoding="utf-8") as log:
        job.process = subprocess.Popen(
            [sys.executable, str(ROOT / TRAIN), *job.flags, f"--workdir={job.workdir}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches only this process, which passes it on
            pass_fds=(lock.fileno(),) if lock else (),
        )
    job.state, job.started = "running", time.monotonic()


def _collect(jobs: Sequence[Job], console: Console) -> None:
    """Updates the state of the running jobs."""
    for job in (job for job in jobs if job.state == "running"):
        job.seconds = time.monotonic() - job.started
        code = job.process.poll()
        if code is None:
            continue
        done = code == 0 and job.is_finished
        job.state = "finished" if done else "stopped" if code in common.EXIT_STOPPED else "failed"
        if not console.is_terminal:
            console.print(f"{job.name}: {job.state} after {job.seconds / 60:.1f} min")


def _interrupt(jobs: Sequence[Job]) -> list[Job]:
    """Asks the running jobs to save and stop, and returns them."""
    running = [job for job in jobs if job.process and job.process.poll() is None]
    for job in running:
        job.process.send_signal(signal.SIGINT)
    return running


def _end(jobs: Sequence[Job]) -> None:
    """Stops all jobs, so that none outlives the sweep."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for job in _interrupt(jobs):
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


def status_table(jobs: Sequence[Job]) -> Table:
    """One row per run: state, progress, time and scores."""
    finished = sum(job.state == "finished" for job in jobs)
    names = ("step", "loss", "minutes", "chip-hours", "English", "others")
    hours = {job.name: attempts.device_hours(job.workdir) for job in jobs}
    table = Table(
        "run",
        "state",
        *(Column(name, justify="right") for name in names),
        title=f"{finished} of {len(jobs)} runs finished, {sum(hours.values()):.2f} chip-hours",
    )
    for job in jobs:
        row = _progress(job) if job.state != "waiting" else ("", "")
        minutes = f"{job.seconds / 60:.1f}" if job.seconds else ""
        scores = _scores(job) if job.state == "finished" else ("", "")
        colour = {"finished": "green", "running": "bold", "failed": "red"}.get(job.state)
        cost = f"{hours[job.name]:.2f}" if hours[job.name] else ""
        table.add_row(job.name, job.state, *row, minutes, cost, *scores, style=colour)
    return table


def _progress(job: Job) -> tuple[str, str]:
    """(steps done, loss) from the last complete line of metrics.jsonl."""
    # Lines can be long, because they count every language and source.
    lines = paths.tail(job.workdir / "metrics.jsonl", 2**18).split(b"\n")[:-1]
    if not lines:
        return "", ""
    last = json.loads(lines[-1])
    loss = last["loss"]  # null if every step was skipped
    return f"{last['step'] + 1:,}", "not finite" if loss is None else f"{loss:.3f}"


def _scores(job: Job) -> list[str]:
    """(English, others) in percent on the last split; empty if not scored."""
    splits = atomic.read_json(job.workdir / RESULTS_FILE)["splits"]
    last = list(splits.values())[-1] if splits else {}
    rows = [last.get(who) or {} for who in (intervals.ENGLISH, intervals.OTHERS)]
    scores = [[row[metric] for metric in intervals.METRICS if metric in row] for row in rows]
    return [f"{100 * found[0]:.1f}" if found else "" for found in scores]


def job_command(job: Job, kind: str | None, extra: str) -> list[str]:
    """The command that trains a run here, or submits it to xpk or Slurm. Both restart a stopped run."""
    train = ["python", TRAIN, *job.flags, f"--workdir={job.workdir}"]
    if kind is None:
        return train
    name = re.sub(r"[^a-z0-9]+", "-", f"{job.workdir.parent.name}-{job.name}".lower())
    name = name.strip("-")[-40:].strip("-")  # a valid name in Kubernetes
    if kind == "slurm":
        # If a run is submitted twice, the second job waits for the first.
        words = ["sbatch", f"--job-name={name}", "--dependency=singleton"]
        return [*words, *shlex.split(extra), SBATCH, *train[2:]]
    # xpk restarts a workload that exits with code 42 or a code above 126, as a stopped run does.
    words = ["xpk", "workload", "create", f"--workload={name}", f"--max-restarts={RESTARTS}"]
    return [*words, *shlex.split(extra), f"--command={shlex.join(train)}"]


def submit(plan: Plan, console: Console) -> None:
    """Submits the unfinished runs, waits until all have ended, and draws the results.

    With --dry_run it prints the commands and does nothing.

    Raises:
      UserError: xpk or sbatch is not installed or failed, or a run has failed.
    """
    if DRY_RUN.value:
        for job in (job for job in plan.jobs if not job.is_finished):
            _print_command(job, console)
        if SUBMIT.value:
            for verb in ("status", "report"):
                words = ["python", "launch/sweep.py", verb, str(plan.workdir)]
                console.print(shlex.join(words), soft_wrap=True, highlight=False, markup=False)
        return
    write_plan(plan)
    path = plan.workdir / SUBMITTED_FILE
    submitted = atomic.read_json(path) if path.exists() else {}
    for job in plan.jobs:
        _look(job, submitted)
        again = RESUBMIT.value or job.state == "failed" or job.name not in submitted
        if job.state != "finished" and again:
            _submit_one(job, console)
            submitted[job.name] = time.time()
            atomic.write_json(path, submitted)
    _wait(plan.jobs, submitted, console)
    if any(job.state == "finished" for job in plan.jobs):
        report([str(plan.workdir)], None, console)
    _raise_failed(plan.jobs)


def _print_command(job: Job, console: Console) -> list[str]:
    command = job_command(job, SUBMIT.value, SUBMIT_ARGS.value)
    console.print(shlex.join(command), soft_wrap=True, highlight=False, markup=False)
    return command


def _submit_one(job: Job, console: Console) -> None:
    command = _print_command(job, console)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise common.UserError(
            f"{command[0]} is not installed; --dry_run prints the commands"
        ) from None
    except subprocess.CalledProcessError as error:
        raise common.UserError(
            f"{command[0]} failed for {job.name} with exit code {error.returncode}; earlier runs are submitted"
        ) from None


def _look(job: Job, submitted: dict[str, float]) -> None:
    """Finds the state of a run of another machine."""
    if job.is_finished:
        job.state = "finished"
    else:
        job.state = attempts.state(job.workdir, since=submitted.get(job.name, 0.0))


def _wait(jobs: Sequence[Job], submitted: dict[str, float], console: Console) -> None:
    """Shows the runs until each is finished or has failed.

    Raises:
      Interrupted: Ctrl-C ended the waiting.
    """
    seconds = REMOTE_POLL_SECONDS if paths.is_remote(jobs[0].workdir) else POLL_SECONDS
    view = Live(console=console, auto_refresh=False) if console.is_terminal else None
    try:
        with view or contextlib.nullcontext():
            while True:
                for job in jobs:
                    _look(job, submitted)
                if view:
                    view.update(status_table(jobs), refresh=True)
                if all(job.state in ("finished", "failed") for job in jobs):
                    break
                time.sleep(seconds)
    except KeyboardInterrupt:
        console.print("the runs go on; the same command waits for them and draws the results")
        sys.exit(common.EXIT_INTERRUPTED)
    if not view:
        console.print(status_table(jobs))


def _raise_failed(jobs: Sequence[Job]) -> None:
    """
    Raises:
      UserError: a run has failed; the message has its reason.
    """
    failed = [job for job in jobs if job.state == "failed"]
    if failed:
        raise common.UserError(
            f"{len(failed)} of {len(jobs)} runs failed; {failed[0].name} said: {attempts.error(failed[0].workdir)}. "
            "Run the same command to try again"
        )


def status(directories: Sequence[str], console: Console) -> None:
    """Prints what runs, what failed and why, and what it cost."""
    if not directories:
        raise common.UserError("status needs the --workdir of a sweep, or several")
    for name in directories:
        directory = common.folder(name, "status")
        if not (directory / SWEEP_FILE).exists():
            raise common.UserError(
                f"no {directory / SWEEP_FILE}: expected the --workdir of a sweep"
            )
        path = directory / SUBMITTED_FILE
        submitted = atomic.read_json(path) if path.exists() else {}
        jobs = []
        for run in atomic.read_json(directory / SWEEP_FILE)["runs"]:
            job = Job(run["point"], run["seed"], directory / run["name"], None, ())
            _look(job, submitted)
            jobs.append(job)
        console.print(status_table(jobs))
        for job in jobs:
            if job.state == "failed":
                said = f"{job.name} failed: {attempts.error(job.workdir)}"
                console.print(said, soft_wrap=True, highlight=False, markup=False)


def report(directories: Sequence[str], page: str | None, console: Console) -> None:
    """Writes figures and summary.md of each sweep, or one page of all sweeps."""
    if not directories:
        raise common.UserError("report needs the --workdir of a sweep, or several")
    sweeps = [intervals.load(common.folder(directory, "report")) for directory in directories]
    targets = [sweep.directory / "summary.md" for sweep in sweeps]
    if page:
        targets = [common.folder(page, "--page")]
        with mirror.mirrored(targets[0].parent) as files:
            summary.write_document(sweeps, files.folder / targets[0].name)
    else:
        for sweep in sweeps:
            with mirror.mirrored(sweep.directory) as files:
                summary.write(sweep, files.folder)
    for path in targets:
        console.print(f"written: {path}", soft_wrap=True)


def run_sweep(plan: Plan, console: Console) -> None:
    waiting = f"{plan.workdir} is in use by another sweep or its runs; waiting until they end"

    # The runs inherit the lock. If they outlive a killed sweep, the next sweep waits for them, too.
    def say():
        console.print(waiting, soft_wrap=True)

    logs = [f"{job.name}/{LOG_FILE}" for job in plan.jobs]
    with (
        restart.claim(plan.workdir / ".lock", on_wait=say) as lock,
        mirror.mirrored(plan.workdir, bring=logs) as files,
    ):
        check_sizes(plan.jobs)
        write_plan(plan)
        stopped = run_jobs(plan.jobs, JOBS.value, lock, files.folder, console)
    finished = [job for job in plan.jobs if job.state == "finished"]
    failed = [job for job in plan.jobs if job.state == "failed"]
    if finished and plan.jobs[0].config.eval:
        report([str(plan.workdir)], None, console)
    if failed:
        log = failed[0].workdir / LOG_FILE
        lines = paths.read_bytes(log).decode("utf-8", "replace").strip().splitlines()
        said = next((line for line in reversed(lines) if "PANGEA_DEBUG" not in line), "nothing")
        raise common.UserError(
            f"{len(failed)} of {len(plan.jobs)} runs failed; {failed[0].name} said: {said} "
            f"({log}). Run the same command to try again"
        )
    if stopped or len(finished) < len(plan.jobs):
        print(
            f"stopped: {len(finished)} of {len(plan.jobs)} runs are finished, the others have saved; "
            "the same command continues the sweep",
            file=sys.stderr,
        )
        sys.exit(common.EXIT_INTERRUPTED)


def main(argv):
    console = inert.console()
    if argv[1:2] == ["report"]:
        report(argv[2:], PAGE.value, console)
        return
    if argv[1:2] == ["status"]:
        status(argv[2:], console)
        return
    if len(argv) > 1:
        raise common.UserError(
            f"unexpected argument {argv[1]!r}; the commands are `report DIR` and `status DIR`"
        )
    plan = make_plan()
    if SUBMIT.value or DRY_RUN.value:
        submit(plan, console)
    else:
        run_sweep(plan, console)


if __name__ == "__main__":
    common.run(main)
