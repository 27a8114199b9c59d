"""The dress rehearsal of a pod: an ablation from a bucket to its figure, with a kill in training and one in evaluation.

One command trains two points of the English share, each in a job of two processes of four devices, from records and
documents in a bucket. A stand-in for xpk starts the jobs, and starts them again after a crash. The scores and figures
equal those of the same sweep on this machine's disk, in one process, undisturbed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pangea_jax.sample import emoji
from pangea_jax.work import paths
from tests.launch.conftest import call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "PANGEA_REHEARSAL" not in os.environ,
        reason="takes several minutes and has not passed from start to end yet; PANGEA_REHEARSAL=1 runs it",
    ),
]
ROOT = Path(__file__).parents[2]
KILLED = "en_020_seed0"
POINTS = "--points=en_020,en_060"
# The 0.5B ablation at toy size.
TOY = {
    "data.tokenizer": "emoji",
    "pretrained": "()",
    "model.dtype": "float32",
    "model.pinpoints": "((16,32),(32,16))",
    "model.vision.image_size": 16,
    "model.vision.patch_size": 8,
    "model.vision.width": 16,
    "model.vision.layers": 2,
    "model.vision.heads": 2,
    "model.vision.mlp": 32,
    "model.language.vocab_size": 5200,
    "model.language.width": 32,
    "model.language.layers": 1,
    "model.language.heads": 4,
    "model.language.kv_heads": 4,
    "model.language.head_width": 8,
    "model.language.mlp": 32,
    "model.language.max_positions": 2048,
    "pipeline.rows": 8,
    "pipeline.row_tokens": 256,
    "pipeline.row_tiles": 6,
    "pipeline.max_targets": 128,
    "pipeline.threads": 2,
    "accumulation": 1,
    "keep": "none",
    "optimizer.learning_rate": 3e-3,
    "optimizer.eps": 1e-3,
    "log_every": 2,
    "checkpoint.every": 4,
    "eval.bench.tasks": "xgqa_en,xgqa_de,m3exam_en,m3exam_zh",
    "eval.bench.every": 6,
    "eval.bench.every_limit": 2,
    "eval.bench.batch_size": 4,
    "eval.bench.max_new_tokens": 4,
}
STEPS = 12

# Starts the job of `xpk workload create` in the background: two processes of four devices, one job after the other.
XPK = """#!{python}
import fcntl, os, shlex, socket, subprocess, sys, time
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[3:])
folder = os.path.join(os.environ["JOBS"], options["workload"])
os.makedirs(folder)
if os.fork():
    sys.exit()
os.setsid()
for number in (0, 1, 2):
    os.dup2(os.open(os.path.join(folder, "runner.log"), os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
with open(os.path.join(folder, "runner"), "w") as file:
    file.write(str(os.getpid()))
queue = open(os.path.join(os.environ["JOBS"], "queue"), "w")
fcntl.flock(queue, fcntl.LOCK_EX)
command = [sys.executable, *shlex.split(options["command"])[1:]]
for attempt in range(1 + int(options["max-restarts"])):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = "localhost:%d" % free.getsockname()[1]
    job = []
    for index in range(2):
        environment = dict(os.environ, COORDINATOR_ADDRESS=address, NUM_PROCESSES="2", PROCESS_ID=str(index))
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        environment["TMPDIR"] = os.path.join(folder, "disk%d-%d" % (attempt, index))
        os.makedirs(environment["TMPDIR"])
        job.append(subprocess.Popen(command, env=environment))
    with open(os.path.join(folder, "pids.partial"), "w") as file:
        file.write(" ".join(str(process.pid) for process in job))
    os.rename(file.name, os.path.join(folder, "pids"))
    while not any(process.poll() for process in job) and None in [process.poll() for process in job]:
        time.sleep(0.1)
    codes = [process.poll() for process in job]
    for process in job:  # a job ends whole
        process.kill()
        process.wait()
    print("attempt", attempt, "ended with", codes, flush=True)
    if codes == [0, 0] or 1 in codes:
        break
"""


def write_release(folder):
    """Records in the form of PangeaIns, in three languages."""
    (folder / "general/set").mkdir(parents=True)
    rng, records = np.random.default_rng(0), []
    words = {"en": ("What is this?", "A cat"), "sw": ("Ni nini?", "Paka"), "ru": ("Что?", "Кот")}
    for code, (question, answer) in words.items():
        for n in range(40):
            image = f"general/set/{code}{n}.png"
            pixels = rng.integers(0, 256, (12 + n % 9, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / image)
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": f"{answer} {n % 4}"},
            ]
            row = {"id": f"{code}{n}", "image": image, "conversations": turns, "language": code}
            records.append(row)
    (folder / "PangeaIns.json").write_text(json.dumps(records))


def write_documents(folder):
    """Documents of xGQA and M3Exam, as `eval/run.py fetch` writes them."""
    for name in ("xgqa", "m3exam"):
        (folder / name / "images").mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (30, 20 + n), (80 * n, 9, 9)).save(folder / name / f"images/{n}.png")
    for code in ("en", "de"):
        rows = [
            {"id": str(n), "question": f"Is it {n}?", "answer": "yes", "images": [f"images/{n % 3}.png"]}
            for n in range(8)
        ]  # fmt: skip
        write_lines(folder / f"xgqa/{code}.jsonl", rows)
    for code in ("en", "zh"):
        own = {"options": ["A. x", "B. y"], "subject": "art", "background": [], "images": []}
        rows = [
            {"id": str(n), "question": f"Which {n}?", "answer": "AB"[n % 2]} | own for n in range(8)
        ]
        write_lines(folder / f"m3exam/{code}.jsonl", rows)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sweep_flags(root):
    arguments = f"scale=pangea_0_5b,root={root},languages=en+sw+ru,num_examples={16 * STEPS}"
    toy = [f"--config.{key}={value}" for key, value in TOY.items()]
    config = f"--config=configs/ablate_en_ratio.py:{arguments}"
    return [config, f"--workdir={root}/runs/en_ratio", POINTS, *toy]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with the data and the finished sweep of this machine."""
    root = tmp_path_factory.mktemp("local")
    write_release(root / "release")
    made = call(
        "launch/build_data.py",
        "pangeains",
        f"--source={root / 'release'}",
        f"--out={root / 'data/pangeains'}",
        "--workers=1",
        f"--tokenizer={emoji.DIRECTORY}",
    )
    assert made.returncode == 0, made.stderr
    write_documents(root / "data/pangeabench")
    eight = "--xla_force_host_platform_device_count=8"
    done = call("launch/sweep.py", *sweep_flags(root), timeout=600, XLA_FLAGS=eight)
    logs = "".join(path.read_text()[-3000:] for path in root.glob("runs/*/*/log.txt"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    return root


@pytest.fixture(scope="module")
def pod(local, emulator, tmp_path_factory):
    """The same sweep in a bucket, with two kills: its folder there, what it printed, and the log of the killed job."""
    root, jobs = paths.path(f"{emulator.url}/rehearsal"), tmp_path_factory.mktemp("jobs")
    paths.store(root).put(f"{local / 'data'}/", f"{root}/data/", recursive=True)
    (jobs / "bin").mkdir()
    (jobs / "bin/xpk").write_text(XPK.format(python=sys.executable))
    (jobs / "bin/xpk").chmod(0o755)
    environment = os.environ | {"JOBS": str(jobs), "PATH": f"{jobs / 'bin'}:{os.environ['PATH']}"}
    log = jobs / "sweep.log"
    with log.open("w") as out:
        sweep = subprocess.Popen(
            [sys.executable, "launch/sweep.py", *sweep_flags(root), "--submit=tpu"],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    workdir = root / "runs/en_ratio" / KILLED
    try:
        folder = wait(sweep, log, lambda: next(jobs.glob("*en-020*"), None))
        saved = workdir / "checkpoints/4/commit_success.txt"
        wait(sweep, log, saved.exists)
        kill_one(folder)
        wait(sweep, log, lambda: len(list(folder.glob("disk*-1"))) == 2)
        answered = "disk1-1/pangea-*/pangeabench/responses/process_1/*.jsonl"
        wait(sweep, log, lambda: next(folder.glob(answered), None))
        kill_one(folder)
        assert sweep.wait(timeout=600) == 0, log.read_text()[-3000:]
    except BaseException:
        print(*(path.read_text()[-6000:] for path in jobs.glob("*/runner.log")), sep="\n=====\n")
        raise
    finally:
        sweep.kill()
        for pids in (*jobs.glob("*/runner"), *jobs.glob("*/pids")):  # who starts others comes first
            for pid in map(int, pids.read_text().split()):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
    yield root / "runs/en_ratio", log.read_text(), (folder / "runner.log").read_text()
    shutil.rmtree(jobs)


def wait(sweep, log, condition):
    deadline = time.monotonic() + 400
    while not (found := condition()):
        assert sweep.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def kill_one(folder):
    """Kills the second process of the job without a warning."""
    pid = int((folder / "pids").read_text().split()[1])
    assert "launch/train.py" in Path(f"/proc/{pid}/cmdline").read_text()
    os.kill(pid, signal.SIGKILL)


def read(path):
    return json.loads(paths.read_bytes(path))


def test_figures_and_scores_are_those_of_this_machine(local, pod):
    ours, theirs = pod[0], local / "runs/en_ratio"
    for name in ("curve.png", "curve.svg", "languages.png", "languages.svg"):
        assert paths.read_bytes(ours / name) == (theirs / name).read_bytes(), name
    for run in (KILLED, "en_060_seed0"):
        mine, other = (read(folder / run / "results.json") for folder in (ours, theirs))
        assert mine.pop("timing").keys() >= {"evaluate"} <= other.pop("timing").keys()
        assert mine == other
        splits = mine["splits"]
        assert list(splits) == ["xgqa", "m3exam", "average"]
        assert splits["average"]["english"]["score"] == np.mean(
            [splits[name]["english"]["score"] for name in ("xgqa", "m3exam")]
        )
        bench = f"{run}/pangeabench/results.json"
        assert read(ours / bench) == read(theirs / bench)


def test_it_was_killed_twice_and_asked_nothing_twice(pod):
    root, _, log = pod
    assert log.count("ended with") == 3
    starts = paths.read_bytes(root / KILLED / "starts.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 4, STEPS]
    responses = root / KILLED / "pangeabench/responses"
    names = list(paths.sizes(responses))
    assert sorted(names) == [f"{t}.jsonl" for t in sorted(TOY["eval.bench.tasks"].split(","))]
    assert all(len(paths.read_bytes(responses / n).splitlines()) == 8 for n in names)


def test_the_run_draws_curves_of_its_scores(local, pod):
    lines = paths.read_bytes(pod[0] / KILLED / "metrics.jsonl").splitlines()
    found = {line["step"] + 1: line for line in map(json.loads, lines) if "bench/xgqa/en" in line}
    assert list(found) == [6, 12]
    assert {"bench/m3exam/mul", "bench/average_multimodal/en"} <= found[12].keys()


def test_the_table_says_what_it_cost(pod):
    root, printed, _ = pod
    assert "2 of 2 runs finished" in printed and "chip-hours" in printed
    said = call("launch/sweep.py", "status", str(root))
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("finished") == 3
    attempts = read(root / KILLED / "attempts.json")
    assert [one["ended"] for one in attempts] == [None, None, "finished"]
    assert {one["devices"] for one in attempts} == {8}
