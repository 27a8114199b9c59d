"""How often a run was started, on how many devices, how long each time, and how it ended: attempts.json.

The main process of a job writes the file anew every `EVERY` seconds. So a run that is silent for `SILENT` seconds was
killed. `launch/sweep.py status` reads it.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from pangea_jax.work import atomic, distributed, restart

FILE = "attempts.json"
EVERY, SILENT = 30.0, 120.0  # seconds
FINISHED, STOPPED, ERROR = "finished", "stopped", "error: "


def read(workdir: Path) -> list[dict[str, Any]]:
    """The attempts of a run: start and until (seconds since 1970), devices, and ended (None while it runs)."""
    try:
        return atomic.read_json(workdir / FILE)
    except FileNotFoundError:
        return []


def state(workdir: Path, *, since: float = 0.0) -> str:
    """waiting, running, stopped (or killed) or failed. It does not say whether all work is done.

    Args:
      since: attempts that ended before this time do not count.
    """
    found = [one for one in read(workdir) if one["ended"] is None or one["until"] >= since]
    if not found:
        return "waiting"
    last = found[-1]
    if last["ended"] is None:
        return "running" if time.time() - last["until"] < SILENT else "stopped"
    return "failed" if last["ended"].startswith(ERROR) else "stopped"


def error(workdir: Path) -> str:
    """The sentence with which the last attempt failed; "" if it did not."""
    last = (read(workdir) or [{}])[-1].get("ended") or ""
    return last.removeprefix(ERROR) if last.startswith(ERROR) else ""


def device_hours(workdir: Path) -> float:
    """Hours of all attempts, times their devices. What a kill cost may be `EVERY` seconds more."""
    return sum((one["until"] - one["start"]) * one["devices"] for one in read(workdir)) / 3600


@contextlib.contextmanager
def recorded(workdir: Path, explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Keeps the file while the block runs. A block that is refused, with `WorkError`, leaves it as it was.

    Args:
      explain: gives the sentence of an error that would come again; "" for others, such as a stop.
    """
    before, now = read(workdir), time.time()
    mine = {"start": now, "until": now, "devices": jax.device_count(), "ended": None}
    lock, done = threading.Lock(), threading.Event()

    def write(ended: str | None) -> None:
        with lock:
            if mine["ended"] is None:
                mine.update(until=time.time(), ended=ended)
                atomic.write_json(workdir / FILE, [*before, mine], ensure_ascii=False)

    def keep() -> None:
        while not done.wait(EVERY):
            try:
                write(None)
            except Exception as fault:  # the next time may do better
                logging.warning("cannot write %s: %s", workdir / FILE, fault)

    def other_failed(code: int, said: str) -> None:
        write(ERROR + said if code == 1 else STOPPED)

    write(None)
    threading.Thread(target=keep, daemon=True, name="attempts").start()
    distributed.on_failure.append(other_failed)
    try:
        yield
    except restart.WorkError:
        mine["ended"] = STOPPED
        if before:
            atomic.write_json(workdir / FILE, before, ensure_ascii=False)
        else:
            (workdir / FILE).unlink()
        raise
    except BaseException as fault:
        said = explain(fault)
        write(ERROR + said if said else STOPPED)
        raise
    else:
        write(FINISHED)
    finally:
        done.set()
        distributed.on_failure.remove(other_failed)
