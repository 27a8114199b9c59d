"""A run in a bucket equals a run on a disk, bit for bit, also after a kill and a damaged checkpoint."""

import json
import signal
import time

import pytest

from pangea_jax import checkpoints
from pangea_jax.model.params import flatten
from pangea_jax.work import lease, paths, restart
from tests.launch.conftest import call

pytestmark = pytest.mark.slow
STEPS = 14


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The work directory of an undisturbed run on the disk."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(workdir, steps=STEPS)
    return workdir


@pytest.fixture(scope="module")
def disturbed(runs, emulator, tmp_path_factory):
    """The work directory of a run in the bucket that was killed and whose newest checkpoint was damaged; its log."""
    workdir = paths.path(f"{emulator.url}/run")
    log = tmp_path_factory.mktemp("logs") / "run.log"
    process = runs.start(workdir, steps=STEPS, log=log)
    complete = workdir / "checkpoints/10/commit_success.txt"
    wait(lambda: "lock" in paths.children(workdir), process)
    with pytest.raises(restart.WorkError, match=r"another process .* is writing gs://pangea/run"):
        restart.claim(workdir / "lock").__enter__()
    wait(complete.exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before the kill"
    newest = workdir / "checkpoints/10/state/d"
    for name in paths.sizes(newest):
        (newest / name).write_bytes(paths.read_bytes(newest / name)[:-100])
    begin = time.monotonic()
    process = runs.start(workdir, steps=STEPS, log=log)
    wait(lambda: "resumed from step 5" in log.read_text(), process)
    assert time.monotonic() - begin < 10 * lease.EXPIRES
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    return workdir, log.read_text()


def wait(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_metric_and_every_bit_is_the_same(runs, alone, disturbed):
    workdir, log = disturbed
    assert "checkpoint gs://pangea/run/checkpoints/10 is damaged" in log
    assert runs.metrics(workdir) == runs.metrics(alone)
    ours, theirs = runs.state(workdir, STEPS), runs.state(alone, STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].tobytes() == value.tobytes(), name
    assert runs.data_state(workdir, STEPS) == runs.data_state(alone, STEPS)


def test_the_bucket_holds_what_the_disk_holds(alone, disturbed):
    workdir, _ = disturbed
    mine, theirs = paths.sizes(workdir), paths.sizes(alone)
    models = {name for name in theirs if name.startswith("model/")}
    assert {name: mine.get(name) for name in models} == {name: theirs[name] for name in models}
    weights = "model/model.safetensors"
    assert paths.read_bytes(workdir / weights) == (alone / weights).read_bytes()
    kept = {name.split("/")[1] for name in mine if name.startswith("checkpoints/")}
    assert kept == {path.name for path in (alone / "checkpoints").iterdir()} | {"10.damaged"}
    top = {name.split("/")[0] for name in theirs} - {"lock"}
    assert {name.split("/")[0] for name in mine} == top
    starts = paths.read_bytes(workdir / "starts.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 5]
    results = [json.loads(paths.read_bytes(f / "results.json")) for f in (workdir, alone)]
    assert results[0]["seen"] == results[1]["seen"]


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_model_is_converted_and_read_there(alone, disturbed, tmp_path, form):
    workdir, _ = disturbed
    target = f"{workdir.parent}/converted-{form}"
    for source, to in ((workdir, target), (alone, tmp_path / form)):
        done = call("launch/convert.py", f"--from={source}", f"--to={to}", f"--format={form}")
        assert done.returncode == 0, done.stderr
    assert done.stdout.partition(":")[2] != ""
    assert "converted-hf.partial" not in paths.children(workdir.parent)
    if form == "hf":
        content = {
            n: paths.read_bytes(paths.path(target) / n) for n in paths.sizes(tmp_path / form)
        }
        assert content == {n: (tmp_path / form / n).read_bytes() for n in content}
    ours, theirs = (flatten(checkpoints.load(place)) for place in (target, tmp_path / form))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    again = call("launch/convert.py", f"--from={workdir}", f"--to={target}", f"--format={form}")
    assert again.returncode == 1 and f"{target} is there already" in again.stderr


def test_another_config_is_refused(runs, disturbed, tmp_path):
    workdir, _ = disturbed
    before = paths.sizes(workdir)
    said = runs.finish(workdir, "--config.seed=5", steps=STEPS, code=1, log=tmp_path / "a.log")
    assert "gs://pangea/run holds a run of another config (seed is 0 there and 5 here" in said
    assert paths.sizes(workdir) == before


def test_a_bucket_that_refuses_is_one_sentence(runs, bucket, tmp_path):
    bucket.fail(403, 99)
    said = runs.finish(f"{bucket.url}/refused", steps=STEPS, code=1, log=tmp_path / "a.log")
    assert "error: the bucket refuses access" in said and "Traceback" not in said
