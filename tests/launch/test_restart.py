"""A run that is killed or stopped and then continued equals an undisturbed run."""

import json
import random
import signal
import time

import numpy as np
import pytest


def assert_equal(runs, workdir, other, steps):
    """Compares every metric, every bit of parameters and optimiser, and the position in the data."""
    ours, theirs = runs.metrics(workdir), runs.metrics(other)
    assert [line["step"] for line in ours] == list(range(1, steps, 2))
    assert ours == theirs
    digests = [line["data/digest"] for line in ours]
    assert len(set(digests)) == len(digests)
    ours, theirs = runs.state(workdir, steps), runs.state(other, steps)
    assert ours.keys() == theirs.keys()
    assert any("opt_state" in name and "nu" in name for name in ours)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].tobytes() == value.tobytes(), name
    assert runs.data_state(workdir, steps) == runs.data_state(other, steps)


def kill_and_continue(runs, workdir, *, kills, steps, seed):
    """Kills the run at random moments. Every fourth kill may come while the process still starts.

    Returns:
      The steps at which it was started.
    """
    moments = random.Random(seed)
    starts, lines = workdir / "starts.jsonl", workdir / "metrics.jsonl"
    for number in range(kills):
        before = len(starts.read_text().splitlines()) if starts.exists() else 0
        process = runs.start(workdir, steps=steps)
        if number % 4 == 3:
            time.sleep(moments.uniform(0, 6))
        else:
            runs.wait_for_line(starts, process, before + 1)
            begun = json.loads(starts.read_text().splitlines()[-1])["step"]
            runs.wait_for_line(lines, process, begun // 2 + moments.randint(1, 12))
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before the kill"
    runs.finish(workdir, steps=steps)
    return [json.loads(line)["step"] for line in starts.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The work directory of an undisturbed run of 100 steps."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(workdir, steps=100)
    return workdir


@pytest.mark.slow
def test_four_kills(runs, alone, tmp_path):
    """`python -m tests.soak` kills more often."""
    started_at = kill_and_continue(runs, tmp_path / "run", kills=4, steps=100, seed=1)
    # At least one of them came after a checkpoint; on a slow machine the first ones come before it is complete.
    assert len(set(started_at)) > 1
    assert all(step % 5 == 0 for step in started_at)
    assert_equal(runs, tmp_path / "run", alone, 100)


def test_asked_to_stop_it_saves_and_says_so(runs, alone, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, steps=100)
    runs.wait_for_line(workdir / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    saved = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert 0 < saved < 100
    assert f"stopped after step {saved} of 100 and saved" in (tmp_path / "run.log").read_text()
    assert f"resumed from step {saved} of 100" in runs.finish(workdir, steps=100)
    assert_equal(runs, workdir, alone, 100)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # Goodput is the time in steps divided by the time since the first start, which includes the second start-up.
    assert 0 < lines[-1]["goodput"] < 0.9
    first, second = map(json.loads, (workdir / "starts.jsonl").read_text().splitlines())
    assert second["time"] - first["time"] > 1
    assert (first["step"], second["step"]) == (0, saved)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(runs, tmp_path):
    workdir = tmp_path / "run"
    runs.finish(workdir, steps=12)
    arrays = (workdir / "checkpoints" / "12" / "state" / "ocdbt.process_0" / "d").iterdir()
    file = max(arrays, key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    said = runs.finish(workdir, steps=12)
    assert f"checkpoint {workdir / 'checkpoints' / '12'} is damaged" in said
    assert "resumed from step 10 of 12" in said
    assert (workdir / "checkpoints" / "12.damaged").is_dir()


def test_not_finite(runs, tmp_path):
    """With a far too high learning rate, bad steps are skipped, and then the run ends and writes the batch."""
    flags = ("--config.optimizer.learning_rate=1e38", "--config.guards.max_bad_steps=3")
    said = runs.finish(tmp_path / "run", *flags, code=1)
    assert "no update" in said
    assert "not finite in 3 steps in a row" in said
    assert "Traceback" not in said
    (file,) = (tmp_path / "run").glob("bad_batch_*.npz")
    batch = np.load(file, allow_pickle=False)
    assert batch["tokens"].shape == (8, 224)
    assert str(file) in said
    assert "&lt;|im_start|&gt;assistant" in file.with_suffix(".html").read_text()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
