"""The sweep as a user runs it: two points of a few steps, interrupted, continued, reported."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import call

ROOT = Path(__file__).parents[2]
SWEEP = (sys.executable, "launch/sweep.py")
EN_RATIO = "--config=configs/ablate_en_ratio.py"
# 6 steps of 8 examples, 2 questions per language.
SHORT = (
    "--config.mixture.num_examples=48",
    "--config.augmented_views=1",
    "--config.pipeline.rows=4",
    "--config.pipeline.examples_per_row=2",
    "--config.checkpoint.every=2",
    "--config.log_every=1",
    "--config.eval.limit=2",
    "--config.pretrained=('tower',)",
)
TWO = "--points=en_000,en_040"


# Prints the table of a sweep while its run in the folder sys.argv[1] trains.
TABLE = """
import sys
sys.path.insert(0, ".")
from launch import sweep
job = sweep.Job("en_000", 0, sweep.Path(sys.argv[1]), None, (), state="running")
sweep.Console(width=120).print(sweep.status_table([job]))
"""


# Writes the plan of a sweep into the folder sys.argv[1], with the overrides in sys.argv[2].
PLAN = """
import json, sys
sys.path.insert(0, ".")
from launch import common, sweep
path = "configs/ablate_en_ratio.py"
folder, overrides = sweep.Path(sys.argv[1]), json.loads(sys.argv[2])
jobs = [sweep.Job("en_000", 0, folder / "en_000_seed0", None, ())]
try:
    sweep.write_plan(sweep.Plan(sweep._module(path), path, "", overrides, folder, jobs))
except common.UserError as error:
    sys.exit(str(error))
"""


def start(*flags):
    one_device = "--xla_force_host_platform_device_count=1"
    environment = dict(os.environ, XLA_FLAGS=one_device, PYTHONUNBUFFERED="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*SWEEP, *flags], cwd=ROOT, env=environment, **pipes)


def run(*flags):
    """(exit code, standard output, standard error)."""
    process = start(*flags)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two points that was interrupted once and then ran to its end."""
    workdir = tmp_path_factory.mktemp("sweep") / "en"
    flags = (EN_RATIO, f"--workdir={workdir}", TWO, *SHORT)
    process = start(*flags)
    first = workdir / "en_000_seed0" / "results.json"
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None and not first.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    between = {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("*/results.json")}
    code, out, after = run(*flags)
    return workdir, flags, process.returncode, err, between, code, out, after


@pytest.mark.slow
def test_continues_without_repeating(swept):
    workdir, _, interrupted, err, between, code, out, after = swept
    assert interrupted == 130, err[-3000:]
    assert "the same command continues the sweep" in err
    assert list(between) == ["en_000_seed0"]
    assert code == 0, after[-3000:]
    assert "2 of 2 runs finished" in out
    first = workdir / "en_000_seed0" / "results.json"
    assert first.stat().st_mtime_ns == between["en_000_seed0"]
    for point, share in (("en_000", 0.0), ("en_040", 0.4)):
        folder = workdir / f"{point}_seed0"
        results, config = read(folder / "results.json"), read(folder / "config.json")
        assert config["mixture"]["en_ratio"] == share
        assert results["mixture"]["examples_per_language"]["en"] == round(48 * share)
        assert results["steps"] == 6
        assert results["splits"]["unseen_artwork"]["languages"]["ko"]["n"] == 2


@pytest.mark.slow
def test_killed_sweep_continues_with_the_same_numbers(swept, tmp_path):
    """The run of a killed sweep lives on and is not started twice. Results equal an undisturbed run."""
    workdir = tmp_path / "en"
    flags = (EN_RATIO, f"--workdir={workdir}", "--points=en_040", *SHORT)
    process = start(*flags)
    log = workdir / "en_040_seed0" / "log.txt"
    deadline = time.time() + 300
    while time.time() < deadline and not log.exists():
        time.sleep(0.05)
    time.sleep(0.5)  # until the sweep has started the run, which prints nothing for some seconds
    process.kill()
    process.wait()
    code, _, err = run(*flags)
    assert code == 0, err[-3000:]
    assert log.read_text(encoding="utf-8").count("mixture: ") == 1
    mine, theirs = (read(w / "en_040_seed0" / "results.json") for w in (workdir, swept[0]))
    assert mine["splits"] == theirs["splits"]
    assert mine["mixture"] == theirs["mixture"]


@pytest.mark.slow
def test_waits_for_another_sweep(swept):
    workdir, flags, *_ = swept
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(*flags)
        first = process.stdout.readline()
    out, err = process.communicate(timeout=300)
    assert "in use by another sweep or its runs; waiting" in first
    assert process.returncode == 0, err[-3000:]
    assert "2 of 2 runs finished" in out


@pytest.mark.slow
def test_reports(swept):
    workdir = swept[0]
    page = (workdir / "summary.md").read_text(encoding="utf-8")
    assert "2 of 6 points, one seed." in page
    assert "| 40 % | 6 | 48 | 19 |" in page
    for figure in ("curve", "languages"):
        assert f"({figure}.png)" in page
        assert (workdir / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert (workdir / f"{figure}.svg").exists()
    plan = read(workdir / "sweep.json")
    assert plan["command"].startswith("python launch/sweep.py --config=configs/ablate_en_ratio.py")
    assert [run["name"] for run in plan["runs"]] == ["en_000_seed0", "en_040_seed0"]


@pytest.mark.slow
def test_report_redraws(swept, tmp_path):
    workdir = swept[0]
    before = (workdir / "curve.png").read_bytes()
    (workdir / "curve.png").unlink()
    code, out, err = run("report", str(workdir))
    assert code == 0, err[-3000:]
    assert "summary.md" in out
    assert (workdir / "curve.png").read_bytes() == before
    page = tmp_path / "ablations.md"
    code, _, err = run("report", str(workdir), f"--page={page}")
    assert code == 0, err[-3000:]
    assert "figures/en_ratio_fixed_total/curve.png" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_another_sweep_is_refused(swept):
    flags = swept[1]
    code, _, err = run(*flags, "--config.eval.limit=3")
    assert code == 1
    assert "holds another sweep" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path):
    workdir = tmp_path / "en"
    flags = (f"--workdir={workdir}", "--points=en_100", *SHORT, "--config.mesh.data=3")
    code, _, err = run(EN_RATIO, *flags)
    assert code == 1
    assert "1 of 1 runs failed; en_100_seed0 said: error: mesh" in err
    assert "does not fill the 1 devices" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=configs/sample.py"], "has no points()"),
        ([f"{EN_RATIO}:seed=3"], "the sweep sets seed="),
        ([EN_RATIO, "--points=en_000,en_05"], "'en_05' is not one of en_000, en_020"),
        (["report"], "needs the --workdir"),
        (["report", "no/such"], "expected the --workdir of launch/sweep.py"),
        (["draw"], "unexpected argument 'draw'"),
    ],
)
def test_bad_input_is_one_sentence(flags, says):
    code, _, err = run(*flags)
    assert code == 1
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--config.steps=700"],
            "en_000_seed0: its 400 examples make 6 steps of 64, not 700; lower",
        ),
        (["--config.pipeline.rows=8000"], "make 0 steps of"),
        (["--config.mixture.languages=('xx',)"], "mixture.languages"),
    ],
)
def test_too_few_examples_are_refused_before_the_first_run(tmp_path, flags, says):
    workdir = tmp_path / "en"
    given = f"{EN_RATIO}:num_examples=400", f"--workdir={workdir}", *flags
    code, _, err = run(*given)
    assert code == 1 and says in err and "Traceback" not in err
    assert not list(workdir.glob("*_seed*"))


def test_a_sweep_is_known_by_what_it_runs(tmp_path):
    """A sweep is the same under another folder name or with its overrides in another order."""
    overrides = {"log_every": 1, "eval.limit": 2}
    other_order = dict(reversed(overrides.items()))
    (tmp_path / "link").symlink_to(tmp_path / "en")
    for folder, given, code in (
        ("en", overrides, 0),
        ("link", other_order, 0),
        ("en", {"log_every": 1}, 1),
    ):
        told = call("-c", PLAN, tmp_path / folder, json.dumps(given))
        assert told.returncode == code, told.stderr
    assert "holds another sweep" in told.stderr


def test_the_table_shows_any_line_of_metrics(tmp_path):
    """Counts of many sources make lines long. If every step was skipped, there is no loss."""
    sources = {f"data/examples_per_source/{n:050}": 1.0 for n in range(500)}
    lines = [json.dumps({"step": step, "loss": None} | sources) for step in (1, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n{")
    shown = call("-c", TABLE, tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "running │    4 │ not finite" in shown.stdout


@pytest.mark.parametrize("kind", ["tpu", "slurm"])
def test_submit_prints_every_command(kind, tmp_path):
    flags = [f"{EN_RATIO}:scale=pangea_7b", f"--workdir={tmp_path / 'en'}", "--seeds=2"]
    extra = {"tpu": "--cluster=c --tpu-type=v5p-64", "slurm": "--gpus-per-node=8"}[kind]
    code, out, err = run(*flags, f"--submit={kind}", f"--submit_args={extra}", "--dry_run")
    assert code == 0, err[-3000:]
    *commands, status, report = [shlex.split(line) for line in out.splitlines()]
    assert len(commands) == 12
    assert status == ["python", "launch/sweep.py", "status", str(tmp_path / "en")]
    assert report == ["python", "launch/sweep.py", "report", str(tmp_path / "en")]
    assert not (tmp_path / "en").exists()
    for command in commands:
        assert command[0] == {"tpu": "xpk", "slurm": "sbatch"}[kind]
        assert set(extra.split()) <= set(command)
    if kind == "tpu":
        assert "--max-restarts=50" in commands[-1]
        inner = shlex.split(commands[-1][-1].partition("=")[2])
        assert inner[:-2] == ["python", "launch/train.py"]
    else:
        inner = commands[-1]
        assert inner[-3] == "launch/gpu/train.sbatch"
        assert "--dependency=singleton" in inner
    assert inner[-2] == f"{EN_RATIO}:scale=pangea_7b,point=en_100,seed=1"
    assert inner[-1] == f"--workdir={tmp_path / 'en' / 'en_100_seed1'}"
    name = next(word for word in commands[0] if word.startswith(("--workload", "--job-name")))
    assert name.partition("=")[2] == "en-en-000-seed0"
