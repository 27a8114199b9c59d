"""Finds the picture that a record of someone's own data names, in all the ways in which people write paths.

A path begins at the folder of the pictures, or at that of the records. It may be absolute, on this machine or on
another. It may be written in another Unicode form than the name of the file: macOS writes an accent as a letter of its
own (NFD), most others do not (NFC).
"""

import functools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pangea_jax.data.build.archives import Pictures, Place
from pangea_jax.data.record import RecordError

BESIDE = ":beside the records:"
"""What `Place.archive` says of a picture in the folder of the records, if the pictures have another folder."""

_DRIVE = re.compile(r"^[A-Za-z]:/+")  # of Windows
_LONGEST_PATH = 4096  # of Linux


def find(pictures: Pictures, beside: Path, path: str, *, is_own: bool = False) -> tuple[str, Place]:
    """The key of a picture by its path, as `Pictures.find` gives it, and its place.

    Args:
      pictures: the folder of the pictures and its archives.
      beside: the folder of the records.
      path: as `pangea_jax.data.record.image_paths` returns it.
      is_own: whether an absolute path of another machine may lose more of its beginning than `Pictures.find` allows.

    Raises:
      RecordError: there is no such picture; names the paths that were looked for. Or the path is ambiguous.
    """
    if len(path) > _LONGEST_PATH:
        detail = f"the path has {len(path):,} letters, more than {_LONGEST_PATH:,}: {path:.60}..."
        raise RecordError("path is not allowed", "image", detail)
    for candidate in _candidates(path, (pictures.source, beside), is_own):
        for spelling in _spellings(candidate):
            if found := pictures.find(spelling) or _beside(beside, spelling):
                return found
    if "\\" in path:
        detail = f"{path!r} is written with backslashes"
        forward = _DRIVE.sub("/", path.replace("\\", "/"))
        for candidate in _candidates(forward, (pictures.source, beside), True):
            if pictures.find(candidate) or _beside(beside, candidate):
                detail += f"; there is {candidate!r}"
                break
        raise RecordError("path has backslashes", "image", detail)
    raise RecordError("picture is missing", "image", _missing(pictures.source, beside, path))


def _beside(folder: Path, path: str) -> tuple[str, Place] | None:
    if path.startswith("/") or not os.path.isfile(folder / path):
        return None
    size = (folder / path).stat().st_size
    return f"images/{path.removeprefix('images/')}", Place(BESIDE, path, 0, size, 0)


def _candidates(path: str, roots: tuple[Path, Path], is_own: bool) -> Iterator[str]:
    """The path as it stands; then, if it is absolute, without more and more of its beginning."""
    if path.startswith("/"):
        for root in roots:
            for form in (root.absolute(), root.resolve()):
                if PurePosixPath(path).is_relative_to(form):
                    yield str(PurePosixPath(path).relative_to(form))
    yield path
    if not is_own:
        return
    path = _DRIVE.sub("/", path)
    if not path.startswith("/"):
        return
    parts = path.strip("/").split("/")
    # The name of the file alone is not enough: other folders may have a file of this name.
    for start in range(1, len(parts) - 1):
        yield "/".join(parts[start:])


def _spellings(path: str) -> Iterator[str]:
    """A path in the Unicode forms that its folder and its name may have on disk."""
    folder, slash, name = path.rpartition("/")
    yield path
    for form in ("NFC", "NFD"):
        for other in ("NFC", "NFD"):
            spelling = unicodedata.normalize(form, folder) + slash
            spelling += unicodedata.normalize(other, name)
            if spelling != path:
                yield spelling


def _missing(source: Path, beside: Path, path: str) -> str:
    """What was looked for, and a name that differs in the case of its letters."""
    roots = list(dict.fromkeys((source, beside)))
    looked = [str(root / path.lstrip("/")) for root in roots]
    if path.startswith("/"):
        below = any(PurePosixPath(path).is_relative_to(root.absolute()) for root in roots)
        where = path if below else f"{path} below {' and '.join(map(str, roots))}"
    else:
        where = " and ".join(looked)
    if any(os.path.isdir(whole) for whole in looked):
        return f"looked for {where}, which is a folder"
    near = [name for whole in looked for name in _same_but_for_case(*os.path.split(whole))]
    hint = f"; there is {near[0]!r}" if near else ""
    return f"looked for {where}{hint}"


def _same_but_for_case(folder: str, name: str) -> list[str]:
    return [found for found in _names(folder) if found.casefold() == name.casefold()]


@functools.lru_cache(maxsize=16)
def _names(folder: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()
