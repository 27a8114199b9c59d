"""Jobs of two processes on this machine, four simulated devices each."""

import signal
import socket
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from pangea_jax.work import distributed

STEPS = 12
# launch/train.py, except that the second process fails at its fourth batch.
FAILING = """
import sys
sys.path.insert(0, ".")
from launch import common, train
from pangea_jax.batch import Batch
place, calls = Batch.place, []
def fail_once(*args):
    calls.append(args)
    if len(calls) == 4 and train.jax.process_index() == 1:
        raise RuntimeError("the third step went wrong")
    return place(*args)
Batch.place = fail_once
common.run(train.main)
"""


def start_two(runs, workdir, **kwargs):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        runs.start(
            workdir,
            devices=4,
            log=Path(f"{workdir}.log{index}"),
            COORDINATOR_ADDRESS=address,
            NUM_PROCESSES="2",
            PROCESS_ID=str(index),
            **kwargs,
        )
        for index in range(2)
    ]


def end(processes, workdir, codes=(0, 0)):
    """Waits for the processes, checks their exit codes, and returns what they printed."""
    try:
        found = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [Path(f"{workdir}.log{index}").read_text() for index in range(2)]
    assert found == list(codes), "\n".join(text[-3000:] for text in said)
    return said


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The work directory of a run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    runs.finish(workdir, steps=STEPS, devices=8)
    return workdir


def assert_close(runs, workdir, other):
    ours, theirs = runs.metrics(workdir), runs.metrics(other)
    assert len(ours) == len(theirs) == STEPS // 2
    for line, wanted in zip(ours, theirs, strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            # The rows are the same. Values computed from them differ by rounding.
            exact = name.startswith("data/examples") or name in ("step", "examples", "data/digest")
            assert line[name] == value if exact else line[name] == pytest.approx(value, rel=1e-4)
    ours, theirs = runs.state(workdir, STEPS), runs.state(other, STEPS)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=2e-5, err_msg=name)


def test_two_processes_train_as_one_does(runs, alone, tmp_path):
    workdir = tmp_path / "run"
    end(start_two(runs, workdir, steps=STEPS), workdir)
    assert_close(runs, workdir, alone)
    assert (workdir / "model" / "model.safetensors").is_file()
    assert (workdir / "loss.png").is_file()


@pytest.mark.slow
def test_both_stop_at_the_same_step_and_one_process_continues(runs, alone, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(runs, workdir, steps=STEPS)
    runs.wait_for_line(workdir / "metrics.jsonl", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    said = end(processes, workdir, codes=(143, 143))
    saved = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert 0 < saved < STEPS
    for text in said:
        assert f"stopped after step {saved} of {STEPS} and saved" in text
    said = runs.finish(workdir, steps=STEPS, devices=8)
    assert f"resumed from step {saved} of {STEPS}" in said
    assert_close(runs, workdir, alone)


def test_the_failure_of_one_ends_the_other_and_is_named(runs, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(runs, workdir, steps=STEPS, command=(sys.executable, "-c", FAILING))
    first, second = end(processes, workdir, codes=(1, 1))
    assert "Traceback" in second
    assert "in fail_once" in second
    assert "process 1 of 2 failed: RuntimeError: the third step went wrong" in second
    assert "process 1 of 2: RuntimeError: the third step went wrong" in first


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"NUM_PROCESSES": "2"}, "NUM_PROCESSES is set, but not COORDINATOR_ADDRESS, PROCESS_ID"),
        (
            {"COORDINATOR_ADDRESS": "host", "NUM_PROCESSES": "2", "PROCESS_ID": "0"},
            "expected HOST:PORT and two numbers",
        ),
        (
            {"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "PROCESS_ID=2 must be less than NUM_PROCESSES=2",
        ),
    ],
)
def test_an_incomplete_job_is_an_error(monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.SetupError, match=says):
        distributed.initialize()


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "16"}, ()),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "worker-0,worker-1"}, ()),
        ({"TPU_ML_PLATFORM": "JAX", "MEGASCALE_COORDINATOR_ADDRESS": "slice-0"}, ()),
        ({"TPU_ML_PLATFORM": "JAX"}, ()),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
        (
            {"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "2", "PROCESS_ID": "1"},
            ("host:1234", 2, 1),
        ),
    ],
)
def test_how_a_job_is_found(monkeypatch, environment, arguments):
    called = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a: called.append(a))
    monkeypatch.setattr(distributed, "_watch", lambda: None)
    on_a_tpu_vm = types.SimpleNamespace(jax_platforms="tpu,cpu")
    monkeypatch.setattr(distributed.jax, "config", on_a_tpu_vm)
    for name in ("TPU_SKIP_MDS_QUERY", *distributed.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert called == ([] if arguments is None else [arguments])
