"""The processes of one job: they find one another, stop together, and end together.

`initialize` recognises a job of several processes by these signs, in this order:
  1. COORDINATOR_ADDRESS=HOST:PORT, NUM_PROCESSES and PROCESS_ID are set. Set them if you start the processes yourself.
  2. The process is in a Slurm step of several tasks (`srun`).
  3. The process is on a host of a TPU pod.
Without these signs the process is alone.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
# The exit code when a device or a host was lost. Launchers treat it like a crash and run the same command again.
EXIT_LOST = 134
_LOST = ("INTERNAL", "UNAVAILABLE", "ABORTED", "DATA_LOSS", "DEADLINE_EXCEEDED", "CANCELLED")
_FAILED = "pangea_jax/failed"
_POLL_SECONDS = 0.5
_LONGEST_WAIT = 7 * 24 * 3600  # seconds
_waits = itertools.count()
# Called in a process that ends because of a failure in the job, with the exit code and what has failed.
on_failure: list[Callable[[int, str], Any]] = []


class SetupError(ValueError):
    """The environment describes a job incompletely or wrongly."""


def initialize() -> None:
    """Joins the job that the environment describes, if there is one. Call it before any device is used.

    Raises:
      SetupError: some of VARIABLES are set and others are missing or malformed.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        jax.distributed.initialize(*_explicit(given))
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or _on_tpu_pod():
        jax.distributed.initialize()
    else:
        return
    threading.Thread(target=_watch, daemon=True, name="watch for failures").start()


def is_one_of_several() -> bool:
    """Whether this process is in a job of several, see `initialize`."""
    return jax.distributed.is_initialized()


def _explicit(given: dict[str, str]) -> tuple[str, int, int]:
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise SetupError(
            f"{', '.join(given)} is set, but not {', '.join(missing)}; set all three or none"
        )
    address, *numbers = given.values()
    _, _, port = address.rpartition(":")
    if not all(text.isdecimal() for text in (port, *numbers)):
        raise SetupError(f"expected HOST:PORT and two numbers, got {given}")
    count, index = map(int, numbers)
    if index >= count:
        raise SetupError(f"PROCESS_ID={index} must be less than NUM_PROCESSES={count}")
    return address, count, index


def _on_tpu_pod() -> bool:
    # JAX sets TPU_ML_PLATFORM where it finds TPU chips. Kubernetes and Cloud TPU set the others.
    if os.environ.get("TPU_ML_PLATFORM") != "JAX" or jax.config.jax_platforms == "cpu":
        return False
    if os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    # Without host names this is a TPU VM. JAX then asks its metadata server for the number of hosts.
    return "," in hosts if hosts else "TPU_SKIP_MDS_QUERY" not in os.environ


def is_lost(error: BaseException) -> bool:
    """Whether a device or another host was lost, so that the same command may do better."""
    return isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(_LOST)


def fail(error: BaseException, code: int) -> None:
    """Ends this process of a job and, through `_watch`, all others, which would otherwise wait for it forever.

    It skips the clean-up of the process, which would wait for the others. A process that is alone goes on.
    """
    if not is_one_of_several():
        return
    job = _job()
    name = f"process {job.process_id} of {job.num_processes}"
    last = "".join(traceback.format_exception_only(error)).strip()
    print(f"{name} failed: {last}", file=sys.stderr, flush=True)
    # Another process may have reported a failure first.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        job.client.key_value_set(_FAILED, f"{code} {name}: {last}")
    _end(code, last)


def _watch() -> None:
    """Waits until another process fails, and then ends this process with the same exit code."""
    while (job := _job()).client is not None:
        try:
            said = job.client.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # the key is missing until a process fails
            time.sleep(_POLL_SECONDS)
            continue
        code, _, said = said.partition(" ")
        if not said.startswith(f"process {job.process_id} of"):
            print(f"ended because another process failed: {said}", file=sys.stderr, flush=True)
            _end(int(code), said)
        return


def _end(code: int, said: str) -> None:
    for call in on_failure:
        with contextlib.suppress(Exception):  # the process ends in any case
            call(code, said)
    if _job().process_id == 0:
        time.sleep(4 * _POLL_SECONDS)  # process 0 runs the store in which the others look
    sys.stderr.flush()
    os._exit(code)


def _job():
    # JAX has no public name for its key-value store. `jax.process_index()` would start the devices.
    from jax._src import distributed

    return distributed.global_state


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order. The values are of JSON's types, and each may be large.

    All processes must call it. It may be hours until the last one does.
    """
    if jax.process_count() == 1:
        return [value]
    # Devices wait for minutes only.
    _job().client.wait_at_barrier(f"pangea_jax/{next(_waits)}", 1000 * _LONGEST_WAIT)
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.full(longest, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


class Stopped(Exception):
    """A signal asked for a stop. All that was done so far is kept.

    Attributes:
      code: the exit code.
    """

    def __init__(self, number: int):
        super().__init__("stopped; the same command continues from here")
        self.code = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In its `with` block, SIGTERM raises `Stopped` at once.

    JAX would keep a SIGTERM in a job for its own service, which only training asks.
    """

    def stop(number, frame):
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignal:
    """In its `with` block, SIGINT or SIGTERM asks for a stop at the end of a step. A second signal stops at once.

    The processes of a job agree on the step through JAX's preemption service, which notices a SIGTERM in any of them.
    `StopSignal` passes a SIGINT on to the service as a SIGTERM.

    Attributes:
      number: the first signal, or None.
    """

    def __init__(self):
        self.number: int | None = None
        job = jax.distributed.is_initialized()
        self._signals = [signal.SIGINT] if job else [signal.SIGINT, signal.SIGTERM]
        self._before = {}

    def __enter__(self) -> "StopSignal":
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.number is not None

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`. Every process must call it after every step."""
        if not jax.distributed.is_initialized():
            return self.requested
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached:
            self.number = self.number or signal.SIGTERM
        return reached

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.number = number
        print(
            "\nstopping and saving after this step; send the signal again to stop at once",
            file=sys.stderr,
        )
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
