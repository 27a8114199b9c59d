"""A folder on a disk whose files are copied to a bucket as they change.

Logs, figures and reports are written by libraries that know disks alone, and many are appended to, which objects cannot
be. So a program writes them on its disk, and a thread copies what is new every `EVERY` seconds. A kill loses at most
what was written since the last copy. `sync` copies at once; training calls it before each checkpoint, so that the logs
in the bucket reach as far as the checkpoint.

A folder that is not in a bucket is used itself, and nothing is copied.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Collection, Iterator
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from absl import logging

from pangea_jax.work import paths

EVERY = 30.0  # seconds
# Only the new part of a longer file is sent. It costs two more requests.
_APPENDED_FROM = 1 << 20
_AT_ONCE = 32


class _Sent(NamedTuple):
    """The state of a local file when it was copied."""

    modified: int
    size: int
    sha256: str


class Mirror:
    """The files of a folder on a disk, and their copies.

    Attributes:
      folder: where to write.
    """

    def __init__(self, folder: Path, target: Path | None = None):
        self.folder, self._target = folder, target
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.Lock()

    def bring(self, names: Collection[str] | None, within: Collection[str] = ("",)) -> None:
        """Copies files from the bucket, if they are there; None: all files whose names begin as one of `within`."""
        there = paths.sizes(self._target)
        wanted = there.keys() if names is None else there.keys() & set(names)
        chosen = sorted(name for name in wanted if name.startswith(tuple(within)))
        # A folder of pictures has many files, and each takes a request.
        with futures.ThreadPoolExecutor(_AT_ONCE) as threads:
            self._sent.update(zip(chosen, threads.map(self._bring, chosen), strict=True))

    def _bring(self, name: str) -> _Sent:
        local = self.folder / name
        local.parent.mkdir(parents=True, exist_ok=True)
        data = paths.read_bytes(self._target / name)
        local.write_bytes(data)
        return _Sent(local.stat().st_mtime_ns, len(data), _sha256(data))

    def sync(self) -> None:
        """Copies every file that has changed to the bucket, the oldest change first."""
        if self._target is None:
            return
        with self._lock:
            found = []
            for file in self.folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # replaced in this moment
                    if file.is_file() and not file.name.endswith(".partial"):
                        found.append((file.stat().st_mtime_ns, file))
            for modified, file in sorted(found):
                name = file.relative_to(self.folder).as_posix()
                sent = self._sent.get(name)
                if sent is None or (sent.modified, sent.size) != (modified, file.stat().st_size):
                    self._copy(name, file, sent)
            for name in self._sent.keys() - {
                file.relative_to(self.folder).as_posix() for _, file in found
            }:
                (self._target / name).unlink(missing_ok=True)
                del self._sent[name]

    def _copy(self, name: str, file: Path, sent: _Sent | None) -> None:
        modified, data = file.stat().st_mtime_ns, file.read_bytes()
        target = self._target / name
        grown = sent and _APPENDED_FROM <= sent.size < len(data)
        grown = grown and _sha256(data[: sent.size]) == sent.sha256
        if not (grown and _append(target, data[sent.size :], sent.size)):
            target.write_bytes(data)
        self._sent[name] = _Sent(modified, len(data), _sha256(data))

    def keep(self, ended: threading.Event) -> None:
        """Copies every `EVERY` seconds until `ended`."""
        while not ended.wait(EVERY):
            try:
                self.sync()
            except Exception as error:  # the next copy tries again, and the last one raises
                logging.warning("cannot copy the logs to %s: %s", self._target, error)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _append(target: Path, data: bytes, size: int) -> bool:
    """Adds bytes to an object of `size`: writes them beside it, and lets the bucket join the two.

    Returns:
      False if this cannot be done: the object has changed, or the bucket is not of Google.
    """
    if not os.fspath(target).startswith("gs://"):
        return False
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud import storage

    bucket_name, _, name = os.fspath(target).removeprefix("gs://").partition("/")
    bucket = storage.Client(project="none").bucket(bucket_name)
    part, whole = bucket.blob(f"{name}.partial"), bucket.get_blob(name)
    if whole is None or whole.size != size:
        return False
    part.upload_from_string(data)
    try:
        whole.compose([whole, part], if_generation_match=whole.generation)
    except PreconditionFailed:  # of a request that was repeated: the first one has joined them
        return False
    finally:
        part.delete()
    return True


@contextlib.contextmanager
def mirrored(
    folder: Path, *, bring: Collection[str] | None = (), within: Collection[str] = ("",)
) -> Iterator[Mirror]:
    """A folder to write to. What is written there is in `folder` after the block, also after an error.

    Args:
      folder: on a disk, used itself; or in a bucket.
      bring: the files that the block reads or appends to, by their path in the folder. None: all of them.
      within: what these paths must begin with.
    """
    if not paths.is_remote(folder):
        yield Mirror(folder)
        return
    with tempfile.TemporaryDirectory(prefix="pangea-") as scratch:
        local = Path(scratch, folder.name)  # messages and reports name it
        local.mkdir()
        mirror, ended = Mirror(local, folder), threading.Event()
        mirror.bring(bring, within)
        keeper = threading.Thread(target=mirror.keep, args=(ended,), daemon=True)
        keeper.start()
        try:
            yield mirror
        finally:
            ended.set()
            keeper.join()
            mirror.sync()
