"""Runs launch/train.py on tests/launch/tiny.py in a process of its own, and reads the results."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from pangea_jax.train.telemetry import CLOCKED
from tests.conftest import simulated_devices

ROOT = Path(__file__).parents[2]
TRAIN = (sys.executable, "launch/train.py")


def start(workdir, *flags, steps=12, devices=1, command=TRAIN, log=None, **environment):
    """Starts the process. Its standard error goes to the file `log`, by default <workdir>.log."""
    environment = {
        **os.environ,
        "XLA_FLAGS": simulated_devices(devices),
        **environment,
    }
    config = f"--config=tests/launch/tiny.py:steps={steps}"
    return subprocess.Popen(
        [*command, config, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=(log or Path(f"{workdir}.log")).open("a"),
    )


def call(script, *flags, timeout=None, **environment):
    """Runs a script to its end, on one device unless XLA_FLAGS says more; returns the finished process."""
    return subprocess.run(
        [sys.executable, script, *flags],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""} | environment,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def run_interrupted(script, function, flags):
    """Runs a script, and presses Ctrl-C where it calls `function`, a dotted name."""
    module, _, name = function.rpartition(".")
    module_name = script.removesuffix(".py").replace("/", ".")
    program = f"""
import runpy, sys, {module}
def interrupt(*_, **__):
    raise KeyboardInterrupt
{module}.{name} = interrupt
sys.argv = {[script, *flags]!r}
runpy.run_module({module_name!r}, run_name="__main__", alter_sys=True)
"""
    return call("-c", program, timeout=300)


def finish(workdir, *flags, code=0, log=None, **kwargs):
    """Runs to the end; returns the standard error."""
    log = log or Path(f"{workdir}.log")
    process = start(workdir, *flags, log=log, **kwargs)
    assert process.wait(timeout=300) == code, log.read_text()[-3000:]
    return log.read_text()


def wait_for_line(file, process, count=1):
    """Waits until a file that `process` writes has `count` lines."""
    deadline = time.monotonic() + 300
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(workdir):
    """Lines of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in CLOCKED} for line in lines]


def state(workdir, step):
    """The train state of a checkpoint, by path, on the host. The work directory may be in a bucket."""
    folder = workdir / "checkpoints" / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        ocp.checkpointables_metadata(folder).metadata["state"],
    )
    found = ocp.load_checkpointables(folder, {"state": shapes})["state"]
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def data_state(workdir, step, process="0-of-1"):
    folder = workdir / "checkpoints" / str(step) / "data"
    return json.loads((folder / f"process_{process}.json").read_text())


@pytest.fixture(scope="session")
def runs():
    """The functions of this file."""
    return types.SimpleNamespace(
        start=start,
        finish=finish,
        wait_for_line=wait_for_line,
        metrics=metrics,
        state=state,
        data_state=data_state,
    )
