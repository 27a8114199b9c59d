"""The claim of one process on a folder in a bucket, where no file can be locked.

The claim is an object that its holder writes anew every few seconds. Every write names the generation that it replaces,
so two processes never both succeed. A process that wants the folder watches the object. If the holder writes it again,
the folder is taken. If the holder is silent for `EXPIRES` seconds, it is dead, and its claim is replaced. Only the
watcher's own clock counts.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

RENEWS, EXPIRES, LOOKS = 10.0, 45.0, 2.0  # seconds


class Taken(Exception):
    """Another process holds the claim; the message is where it runs."""


class _Seen(NamedTuple):
    """The claim's generation and its holder's words."""

    generation: int
    holder: dict[str, Any]


@contextlib.contextmanager
def hold(
    lock: Path, *, on_wait: Callable[[], Any] | None, on_loss: Callable[[str], Any]
) -> Iterator[None]:
    """Holds the claim while the block runs.

    Args:
      lock: the object, `gs://BUCKET/...`.
      on_wait: called once before waiting for another process. None: a taken claim is an error.
      on_loss: called, in another thread, if another process has taken the claim away, because this one was silent for
        too long. The block must then write nothing more.

    Raises:
      Taken: another process holds it.
    """
    claim = _Claim(lock)
    claim.take(on_wait)
    ended = threading.Event()
    keeper = threading.Thread(target=claim.keep, args=(ended, on_loss), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        claim.give_back()


def end_process(said: str) -> None:
    """Ends this process at once, without writing anything more."""
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(1)


class _Claim:
    def __init__(self, lock: Path):
        from google.cloud import storage

        bucket, _, self._name = os.fspath(lock).removeprefix("gs://").partition("/")
        self._bucket = storage.Client(project="none").bucket(bucket)
        self._lock = lock
        self._me = _identity() | {"token": secrets.token_hex(8)}
        self._generation = 0

    def take(self, on_wait: Callable[[], Any] | None) -> None:
        while not self._write(0):
            seen = self._look()
            if seen is None:
                continue
            if on_wait is not None:
                on_wait()
                on_wait = _nothing
            if self._is_dead(seen.holder) or self._falls_silent(seen.generation, on_wait):
                if self._write(seen.generation):
                    return
            elif on_wait is None and self._look() is not None:
                raise Taken(f"{seen.holder.get('host')}, process {seen.holder.get('process')}")

    def keep(self, ended: threading.Event, on_loss: Callable[[str], Any]) -> None:
        while not ended.wait(RENEWS):
            try:
                if not self._write(self._generation):
                    on_loss(f"another process has taken {self._lock.parent}; this one stops")
                    return
            except (
                Exception
            ) as error:  # the bucket does not answer: whoever takes the claim is found out later
                logging.warning("cannot renew the claim %s: %s", self._lock, error)

    def give_back(self) -> None:
        from google.api_core.exceptions import GoogleAPICallError

        with contextlib.suppress(GoogleAPICallError, OSError):
            self._blob().delete(if_generation_match=self._generation)

    def _falls_silent(self, generation: int, on_wait: Callable[[], Any] | None) -> bool:
        """Whether a claim stays as it is for long enough; False as soon as its holder renews it or gives it back."""
        if on_wait is None:
            said = "%s is claimed; looking for up to %d s whether its holder still runs"
            logging.info(said, self._lock.parent, EXPIRES)
        deadline = time.monotonic() + EXPIRES
        while time.monotonic() < deadline:
            time.sleep(LOOKS)
            seen = self._look()
            if seen is None or seen.generation != generation:
                # Given back: the next try to write it says more.
                return False
        return True

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether the holder was a process of this machine that has ended."""
        if any(holder.get(name) != self._me[name] for name in ("machine", "processes")):
            return False
        return not Path(f"/proc/{holder.get('process')}").exists()

    def _look(self) -> _Seen | None:
        blob = self._bucket.get_blob(self._name)
        if blob is None:
            return None
        try:
            holder = json.loads(blob.download_as_bytes())
        except Exception:  # renewed or given back in this moment, or not ours
            holder = {}
        return _Seen(blob.generation, holder if isinstance(holder, dict) else {})

    def _write(self, generation: int) -> bool:
        """Writes the claim in place of a generation, 0 for none; False if another is there."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._blob()
        try:
            blob.upload_from_string(json.dumps(self._me), if_generation_match=generation)
        except PreconditionFailed:
            # A repeated request finds what the first one wrote.
            seen = self._look()
            if seen is None or seen.holder.get("token") != self._me["token"]:
                return False
            self._generation = seen.generation
            return True
        self._generation = blob.generation
        return True

    def _blob(self) -> Any:
        return self._bucket.blob(self._name)


def _nothing() -> None:
    """The wait has been announced."""


def _identity() -> dict[str, Any]:
    """This process, and the machine whose numbers of processes its own is one of."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        started, processes = secrets.token_hex(8), 0
    host = socket.gethostname()
    return {"host": host, "machine": started, "processes": processes, "process": os.getpid()}
