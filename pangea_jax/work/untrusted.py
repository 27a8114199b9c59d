"""Opens files and parses JSON that others wrote: regular files alone, none outside of a folder, within limits."""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pangea_jax.work import paths

_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)


class NotRegular(OSError):
    """A path is no regular file; the message says what it is."""


class TooLarge(OSError):
    """A file has more bytes than are allowed; the message says how many."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading. It never waits, as opening a named pipe would.

    Raises:
      NotRegular: the path is a folder, a named pipe, a device or a socket.
      OSError: it cannot be opened.
    """
    require_regular(path)
    if paths.is_remote(path):
        return paths.path(path).open("rb")
    # Someone may have replaced the file since: then the flag keeps `open` from waiting.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The bytes of a file.

    Raises:
      NotRegular: see `open_regular`.
      TooLarge: it has more than `most` bytes.
      OSError: it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise TooLarge(f"{os.fspath(path)} has more than {most:,} bytes")
    return data


def require_regular(path: str | os.PathLike) -> None:
    """
    Raises:
      NotRegular: the path is a folder, a named pipe, a device or a socket.
      OSError: there is no such file.
    """
    if not paths.is_remote(path):  # objects are never anything else
        _require_regular(path, os.stat(path).st_mode)


def _require_regular(path: str | os.PathLike, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "special file")
        raise NotRegular(f"{os.fspath(path)} is a {kind}, not a regular file")


def is_inside(folder: str | os.PathLike, path: str | os.PathLike) -> bool:
    """Whether a path is in a folder after all symbolic links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is not JSON, or it is nested more deeply than Python can read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
