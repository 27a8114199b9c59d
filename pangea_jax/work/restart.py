"""Work that may be killed and continues when the same command is run again.

Only one process works in a folder (`claim`), always with the same settings (`settle`). The work is
split into numbered shards (`shard_path`). Every file is written whole (`atomic.py`). The file that
marks a shard as finished is written last.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pangea_jax.work import paths
from pangea_jax.work.atomic import as_json, differences, read_json, write_json

_MOST_CLAUSES = 4


class WorkError(RuntimeError):
    """The work cannot start or continue; the message says what to do."""


def check_local(path: Path | str | None, flag: str) -> None:
    """Refuses an address such as gs://bucket/run where only a disk will do.

    Raises:
      WorkError: `path` is an address; the message names `flag`.
    """
    if path is not None and (scheme := re.match(r"([A-Za-z][\w+.-]+):/", str(path))):
        raise WorkError(
            f"{flag} is {str(path)!r}, but {scheme[1]}:// is not supported here; give a local folder, or mount the "
            "bucket (gcsfuse) and give the folder of the mount"
        )


@contextlib.contextmanager
def claim(lock: Path, *, on_wait: Callable[[], Any] | None = None) -> Iterator[IO | None]:
    """Keeps other processes out of a folder. The claim ends with the process, even a killed one.

    In a bucket the claim of a killed process ends `lease.EXPIRES` seconds later, or at once on the same machine.

    Args:
      lock: the file to lock. Its folder is made if it is missing.
      on_wait: called once before waiting for another process. None: a claimed folder is an error.

    Yields:
      The locked file. Child processes that inherit it also hold the claim. In a bucket None.

    Raises:
      WorkError: another process has claimed the folder.
    """
    if paths.is_remote(lock):
        with _lease(lock, on_wait):
            yield None
        return
    check_local(lock.parent, "the folder")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise WorkError(
                    f"another process is writing {lock.parent}; wait until it ends"
                ) from None
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextlib.contextmanager
def _lease(lock: Path, on_wait: Callable[[], Any] | None) -> Iterator[None]:
    if not os.fspath(lock).startswith("gs://"):
        raise WorkError(
            f"{lock.parent} cannot be claimed, so nothing is written there; give a local folder or gs://BUCKET/FOLDER"
        )
    from pangea_jax.work import lease

    try:
        with lease.hold(lock, on_wait=on_wait, on_loss=lease.end_process):
            yield
    except lease.Taken as holder:
        raise WorkError(
            f"another process ({holder}) is writing {lock.parent}; wait until it ends"
        ) from None


def settle(path: Path, plan: Any, folder: Path) -> None:
    """Writes the plan of a folder to `path`, or checks that `path` already has the same plan.

    Raises:
      WorkError: see `compare`.
    """
    if path.is_file():
        compare(read_json(path), plan, folder)
    write_json(path, as_json(plan), ensure_ascii=False)


def compare(
    theirs: Any,
    ours: Any,
    folder: Path,
    *,
    holds: str = "results of other settings",
    flag: str = "--out",
    free: re.Pattern[str] | None = None,
    more: str = "",
) -> dict[str, tuple[Any, Any]]:
    """Compares the plan of the earlier work in a folder with the present plan.

    Args:
      holds: what the error says that the folder holds.
      flag: the flag that names the folder.
      free: matches the keys that may differ.
      more: another remedy, added to the error.

    Returns:
      The differences in free keys, as `differences` gives them.

    Raises:
      WorkError: the plans differ in other keys; the message has both values.
    """
    found = differences(theirs, as_json(ours))
    differing = {key: values for key, values in found.items() if not (free and free.fullmatch(key))}
    if differing:
        raise WorkError(
            f"{folder} holds {holds} ({'; '.join(clauses(differing)[:_MOST_CLAUSES])}); "
            f"give another {flag}, or remove that one{f'; {more}' if more else ''}"
        )
    return found


def clauses(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """One clause for each key of `differences`; long values are cut."""
    return [
        f"{key} is {theirs!r:.80} there and {ours!r:.80} here"
        for key, (theirs, ours) in differing.items()
    ]


def shard_path(folder: Path, number: int, suffix: str) -> Path:
    """The file of a shard, such as `00012.parquet` of shard 12."""
    return folder / f"{number:05d}.{suffix}"


def remove_partial(folder: Path, pattern: str = "**/*.partial") -> None:
    """Removes the incomplete files of a killed process."""
    for path in folder.glob(pattern):
        path.unlink(missing_ok=True)
