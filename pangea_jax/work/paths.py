"""Folders and files on a disk or in a bucket, under one kind of path.

`path` turns a text into a path. `pathlib` serves disks, `etils.epath` serves buckets (`gs://`, `s3://`) through fsspec,
and both have the same methods. The functions here are for what the two do not have in common. Objects differ from files
in three ways: nothing can be appended to them, there are no folders to make, and renaming copies.

Nothing here imports a library of a cloud before the first address of a bucket.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

REQUIREMENTS = "requirements-gcs.txt"
# The module that fsspec needs for each scheme.
_MODULES = {"gs": "gcsfs", "s3": "s3fs"}
_INSTALL = {"gs": f"pip install -r {REQUIREMENTS}", "s3": "pip install s3fs"}
# Seconds. A connection that is silent for so long is broken, and the request is repeated.
_CONNECT, _SILENCE = 30, 120


class PathError(ValueError):
    """A text names no folder or file that can be used; the message says why, and what to do."""


def path(name: str | os.PathLike) -> Path:
    """The path of a folder or file; an address such as `gs://bucket/folder` is one in a bucket.

    Raises:
      PathError: an address is of no known kind, or the library for it is not installed.
    """
    if isinstance(name, PurePath):
        return name
    text = os.fspath(name)
    found = re.match(r"([A-Za-z][\w+.-]+):/", text)
    if not found:
        return Path(text)
    scheme = found[1]
    if scheme not in _MODULES:
        known = ", ".join(f"{known}://" for known in _MODULES)
        raise PathError(
            f"{text!r}: {scheme}:// is not supported; give a local folder, or an address of {known}"
        )
    if not re.match(rf"{scheme}://[^/]+", text):
        raise PathError(f"{text!r} names no bucket; write {scheme}://BUCKET/FOLDER")
    _prepare(scheme)
    from etils import epath

    return epath.Path(text)


@functools.cache
def _prepare(scheme: str) -> None:
    """Sets up fsspec for a kind of bucket, once in a process."""
    if importlib.util.find_spec(_MODULES[scheme]) is None:
        raise PathError(
            f"{scheme}:// needs {_MODULES[scheme]}, which is not installed: {_INSTALL[scheme]}"
        )
    # Only buckets of zones and hierarchies need it. It asks once more for each bucket, by gRPC.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # epath would prefer TensorFlow, where someone has installed it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config

    # Listings are not kept: other processes write, too.
    settings = fsspec.config.conf.setdefault(scheme, {})
    settings.setdefault("use_listings_cache", False)
    if scheme == "gs":
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE)
        settings.setdefault("requests_timeout", limits)
        settings.setdefault("consistency", "md5")  # an upload that arrived damaged is an error
        # It prints a traceback for every failed request; `explain` says the same in a sentence.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return re.match(r"[A-Za-z][\w+.-]+://", os.fspath(path)) is not None


def store(path: Path) -> Any:
    """fsspec's file system of a path in a bucket. It takes `os.fspath(path)`."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def absolute(path: Path) -> Path:
    """The path without the parts `.` and `..`, from the root of the disk or in its bucket."""
    return path if is_remote(path) else Path(os.path.abspath(path))


def expand(path: Path) -> Path:
    """The path with `~` replaced by the home folder, which a shell does not do in `--flag=~/DIR`."""
    return path if is_remote(path) else path.expanduser()


def url(path: Path) -> str:
    """The path as TensorStore writes it."""
    return f"{path}/" if is_remote(path) else f"file://{path.absolute()}/"


def make_folder(path: Path) -> None:
    """Makes a folder and its parents. Objects need none, and no bucket is made."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def children(folder: Path) -> set[str]:
    """The names in a folder; none if it is not there."""
    try:
        return {child.name for child in folder.iterdir()}
    except FileNotFoundError:
        return set()


def size(path: Path) -> int:
    """The bytes of a file."""
    return store(path).size(os.fspath(path)) if is_remote(path) else path.stat().st_size


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of all files below a folder, by their path in it; empty if it is not there."""
    if is_remote(folder):
        bucket = store(folder)
        top = bucket._strip_protocol(os.fspath(folder)).rstrip("/") + "/"
        found = bucket.find(os.fspath(folder), detail=True)
        return {name.removeprefix(top): info["size"] for name, info in found.items() if name != top}
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Some bytes of a file, in one request; fewer if the file ends before."""
    if is_remote(path):
        return store(path).cat_file(os.fspath(path), start, stop) if stop > start else b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def read_bytes(path: Path) -> bytes:
    """A whole file, in one request."""
    return store(path).cat_file(os.fspath(path)) if is_remote(path) else path.read_bytes()


def tail(path: Path, most: int) -> bytes:
    """The last bytes of a file; none if it is not there."""
    try:
        if is_remote(path):
            return store(path).cat_file(os.fspath(path), start=-most)
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read()
    except FileNotFoundError:
        return b""


def for_arrow(path: Path) -> Any:
    """What pyarrow reads a file from. An object is read whole, in one request."""
    if not is_remote(path):
        return path
    import pyarrow as pa

    return pa.BufferReader(read_bytes(path))


@contextlib.contextmanager
def nearby(file: Path) -> Iterator[Path]:
    """A file where libraries that know disks alone can open it: the file itself, or a copy of an object.

    The copy is gone after the block.
    """
    if not is_remote(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="pangea-") as folder:
        copy = Path(folder, file.name)
        store(file).get_file(os.fspath(file), str(copy))
        yield copy


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        store(folder).rm(os.fspath(folder), recursive=True)


def move(file: Path, target: Path) -> None:
    """Moves a file to its name, within a disk or within a bucket."""
    if is_remote(target):
        store(target).mv_file(os.fspath(file), os.fspath(target))
    else:
        os.replace(file, target)


def move_tree(folder: Path, target: Path, last: str) -> None:
    """Moves a finished folder to its name.

    On a disk this is one step. In a bucket every object is copied within the bucket, and `last`, the file without which
    nothing takes the folder for a finished one, comes last.
    """
    if not is_remote(target):
        os.replace(folder, target)
        return
    bucket = store(target)
    for name in sorted(sizes(folder), key=lambda name: (name == last, name)):
        bucket.cp_file(f"{folder}/{name}", f"{target}/{name}")
    remove_tree(folder)


class Fault(NamedTuple):
    """What is wrong with a bucket or a disk.

    Attributes:
      passes: the same command may succeed later.
      is_missing: the bucket or the object is not there.
    """

    sentence: str
    passes: bool = False
    is_missing: bool = False


class BucketError(OSError):
    """A request to a bucket failed, also after it was repeated; the message says what to do."""

    def __init__(self, fault: Fault):
        super().__init__(fault.sentence)
        self.fault = fault

    def __reduce__(self):
        return type(self), (self.fault,)


# Codes of HTTP, names of TensorStore's and Google's status codes, and what Google writes where it gives no code.
_ANONYMOUS = re.compile(r"Anonymous caller|DefaultCredentialsError|RefreshError")
_DENIED = re.compile(
    r"\b(401|403|Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|does not have storage\.|denied on resource)\b"
)
_MISSING = re.compile(r"\b(404|NOT_FOUND|No such object|Not Found|does not exist)\b")
_PASSING = re.compile(r"\b(408|429|50[0-4]|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED)\b")
_CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "urllib3", "botocore", "s3fs")


def explain(error: BaseException) -> Fault | None:
    """What a full or read-only disk, or a failed request to a bucket, means; None if the error is of another kind.

    Requests that may succeed later have been repeated before: for half a minute by gcsfs, longer by TensorStore and
    ArrayRecord.
    """
    if isinstance(error, BucketError):
        return error.fault
    kind, said = type(error), " ".join(str(error).split())[:300]
    if sentence := _explain_disk(error, said):
        return Fault(sentence)
    client = kind.__module__.partition(".")[0] in _CLIENTS
    if not (client or _ABOUT_BUCKETS.search(said)):
        return None
    text = f"{kind.__name__} {getattr(error, 'code', '')} {said}"
    if _ANONYMOUS.search(text):
        return Fault(f"no credentials for the bucket ({said}); {_LOGIN}")
    if _DENIED.search(text):
        return Fault(f"the bucket refuses access ({said}); {_GRANT}")
    if isinstance(error, FileNotFoundError) or _MISSING.search(text):
        return Fault(f"there is no such bucket or object: {said}", is_missing=True)
    if client or _PASSING.search(text):
        return Fault(
            f"the bucket does not answer ({kind.__name__}: {said}); try again later", passes=True
        )
    return None


def say(error: BaseException) -> str:
    """The sentence of `explain`, or else the error's own."""
    fault = explain(error)
    return fault.sentence if fault else str(error)


# By the number of an OSError, and by what TensorStore and SQLite say.
_FULL = (
    (errno.ENOSPC, errno.EDQUOT),
    re.compile(r"No space left on device|disk is full|Disk quota exceeded"),
)
_READ_ONLY = (errno.EROFS,), re.compile(r"Read-only file system|write a readonly database")


def _explain_disk(error: BaseException, said: str) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL[0] or _FULL[1].search(said):
        return f"the disk is full ({said}); free some space and run the same command again"
    if number in _READ_ONLY[0] or _READ_ONLY[1].search(said):
        return f"the disk is read-only ({said}); choose another folder"
    return None


_ABOUT_BUCKETS = re.compile(r"googleapis\.com|storage/v1|\bgs://|\b[bo]/\{?")
_LOGIN = "run `gcloud auth application-default login`, or use a machine with a service account"
_GRANT = (
    "the account needs roles/storage.objectUser and roles/storage.legacyBucketReader there "
    "(gcloud storage buckets add-iam-policy-binding)"
)
