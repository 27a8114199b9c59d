"""Finds and reads the released pictures of PangeaIns, 784 GB in archives, without unpacking them.

They are in folders, tar files and zip files. The parts of a split tar file need not be joined. An SQLite index holds
the byte at which each picture begins in its archive. The memory that is needed does not depend on the size of the
release.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sqlite3
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pangea_jax.data.build.release import ReleaseError
from pangea_jax.data.record import RecordError

_BLOCK = 1 << 18
_COMMIT_EVERY = 50_000
# `images.tar.partaa`, `part_00`, `images.tar.part_01`: one file cut into parts.
_PART = re.compile(r"(?:(?P<stem>.+?)[._-])?part[_.-]?(?P<number>[a-z]{2}|\d+)", re.ASCII)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Place(NamedTuple):
    """Where a picture is.

    Attributes:
      archive: path of the archive in the release; empty if the picture is a file.
      name: path of the file or of the archive's member in the release.
      offset: byte of the archive at which the picture begins.
      size: number of its bytes in the archive.
      deflated: 1 if zlib must unpack these bytes, otherwise 0.
    """

    archive: str
    name: str
    offset: int
    size: int
    deflated: int


class JoinedFile(io.RawIOBase):
    """Several files, joined in order, for reading and seeking."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [path.open("rb") for path in paths]
        self._ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}
        self._position = origins[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = bisect_right(self._ends, self._position)
        if part == len(self._files):
            return 0
        begin = self._ends[part - 1] if part else 0
        room = min(len(buffer), self._ends[part] - self._position)
        self._files[part].seek(self._position - begin)
        count = self._files[part].readinto(memoryview(buffer)[:room])
        self._position += count
        return count

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class Archive(NamedTuple):
    """An archive of the release.

    Attributes:
      name: path in the release; for a split archive, without the numbers of the parts.
      folder: its folder in the release.
      stem: name without numbers of parts and suffix.
      parts: paths of its files in the release.
    """

    name: str
    folder: str
    stem: str
    parts: tuple[str, ...]

    @property
    def own_folder(self) -> str:
        return "/".join(part for part in (self.folder, self.stem) if part)

    def open(self, source: Path) -> BinaryIO:
        return io.BufferedReader(JoinedFile([source / part for part in self.parts]), _BLOCK)

    def fingerprint(self, source: Path) -> str:
        stats = [(source / part).stat() for part in self.parts]
        return json.dumps([[s.st_size, s.st_mtime_ns] for s in stats])


def find_archives(source: Path) -> list[Archive]:
    """All tar and zip files in a folder and its subfolders, ordered by name. A split archive is one archive.

    Raises:
      ReleaseError: a part is missing, or a tar file is compressed as a whole.
    """
    whole, split = [], {}
    for folder, _, names in os.walk(source):
        where = Path(folder).relative_to(source).as_posix()
        where = "" if where == "." else where
        for name in names:
            path = f"{where}/{name}" if where else name
            if name.endswith(_COMPRESSED):
                problem = (
                    "is compressed as a whole, so single members cannot be read; decompress it"
                )
                raise ReleaseError(source / path, problem)
            if name.endswith((".tar", ".zip")):
                whole.append(Archive(path, where, name[:-4], (path,)))
            elif match := _PART.fullmatch(name):
                number = _part_number(match["number"])
                split.setdefault((where, match["stem"] or ""), []).append((number, path))
    for (where, stem), parts in split.items():
        parts.sort()
        numbers = [number for number, _ in parts]
        if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            names = ", ".join(path.rpartition("/")[2] for _, path in parts)
            raise ReleaseError(source / where, f"a part of an archive is missing; found {names}")
        name = "/".join(part for part in (where, stem or "part") if part)
        stem = stem.removesuffix(".tar").removesuffix(".zip")
        whole.append(Archive(name, where, stem, tuple(path for _, path in parts)))
    return sorted(whole)


def _part_number(part: str) -> int:
    """The number of a part; `aa` is 0, `ab` is 1, `ba` is 26."""
    if part.isdigit():
        return int(part)
    first, second = (ord(letter) - ord("a") for letter in part)
    return first * 26 + second


class Pictures:
    """Finds and reads the pictures of a release; picklable. It opens an archive when it first reads from it.

    Args:
      source: folder of the release, or of its pictures.
      database: SQLite file of the archives' members, made by `index`.
    """

    def __init__(self, source: Path, database: Path):
        self.source, self.database = source, database
        self._opened: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "database": self.database, "_opened": {}}

    def index(self, on_members: Callable[[int], Any] = lambda count: None) -> None:
        """Lists the members of every archive that is new or has changed since the last call.

        Args:
          on_members: called with the number of members listed since the last call.

        Raises:
          ReleaseError: an archive is damaged or ends early.
        """
        self.database.parent.mkdir(parents=True, exist_ok=True)
        found = find_archives(self.source)
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            if database.execute("PRAGMA user_version").fetchone() != (_SCHEMA_VERSION,):
                database.executescript(_FORGET)
            database.executescript(_SCHEMA)
            known = dict(database.execute("SELECT name, fingerprint FROM archives"))
            prints = {archive.name: archive.fingerprint(self.source) for archive in found}
            for name in known:
                if prints.get(name) != known[name]:
                    database.execute("DELETE FROM members WHERE archive = ?", (name,))
                    database.execute("DELETE FROM archives WHERE name = ?", (name,))
            database.commit()
            for archive in found:
                if known.get(archive.name) != prints[archive.name]:
                    self._index(database, archive, prints[archive.name], on_members)

    def _index(self, database, archive: Archive, fingerprint: str, on_members) -> None:
        with archive.open(self.source) as file, database:
            # The name of an archive is inserted last, so these rows are from a run that was killed.
            database.execute("DELETE FROM members WHERE archive = ?", (archive.name,))
            members = _zip_members if zipfile.is_zipfile(file) else tar_members
            if members is tar_members and archive.name.endswith(".zip"):
                raise ReleaseError(
                    self.source / archive.name, "is not a complete zip file; download it again"
                )
            file.seek(0)
            count = 0
            for count, (name, *place) in enumerate(members(file, self.source / archive.name), 1):
                path = f"{archive.folder}/{name}" if archive.folder else name
                row = (path, archive.name, *place)
                database.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?)", row)
                if count % _COMMIT_EVERY == 0:
                    database.commit()
                    on_members(_COMMIT_EVERY)
            row = (archive.name, archive.folder, archive.stem, json.dumps(archive.parts))
            database.execute("INSERT INTO archives VALUES (?, ?, ?, ?, ?)", (*row, fingerprint))
            on_members(count % _COMMIT_EVERY)

    def changed(self) -> list[str]:
        """Archives that are new or have changed since `index`. Missing archives are not named."""
        listed = dict(self._listed())
        found = find_archives(self.source)
        return [a.name for a in found if listed.get(a.name) != a.fingerprint(self.source)]

    def digest(self) -> str:
        """A hash of all archives that `index` listed. It changes if an archive is changed, added or removed."""
        return hashlib.sha256(json.dumps(self._listed()).encode()).hexdigest()

    def _listed(self) -> list[tuple[str, str]]:
        if not self.database.is_file():
            return []
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            query = "SELECT name, fingerprint FROM archives ORDER BY name"
            return database.execute(query).fetchall()

    @functools.cached_property
    def _connection(self) -> sqlite3.Connection:
        # Immutable, so that SQLite sets no locks, which often fail on network file systems.
        return sqlite3.connect(f"{self.database.resolve().as_uri()}?immutable=1", uri=True)

    @functools.cached_property
    def archives(self) -> dict[str, Archive]:
        rows = self._connection.execute(
            "SELECT name, folder, stem, parts FROM archives ORDER BY name"
        )
        return {row[0]: Archive(*row[:3], tuple(json.loads(row[3]))) for row in rows}

    def find(self, path: str) -> tuple[str, Place] | None:
        """Finds the picture that a record names.

        A relative path begins at the release or at its folder `images`. The name of the file alone is not enough. Some
        paths are absolute, from the machine on which the release was made. They are found by the last folders of the
        path: `/data/x/laion-multi-1M/images/1.jpg` is `cultural/laion-multi-1M/images/1.jpg` if no other folder
        ends in the same way.

        Args:
          path: as `pangea_jax.data.record.image_paths` returns it.

        Returns:
          the key and the place; None if there is no such picture. The key is `images/` and the path in the images
          folder. If several pictures have this path, the key has the path of the record, which names the archive:
          `x/train/0.png` and `x/val/0.png` for the member `x/0.png` of `x/train.tar` and `x/val.tar`.

        Raises:
          RecordError: an absolute path fits two folders, or a path is in two archives and names neither.
        """
        if path.startswith("/"):
            folder, _, name = path.rpartition("/")
            found = self._folder(folder)
            if found is None:
                return None
            path = f"{found}/{name}"
        other = path.removeprefix("images/") if path.startswith("images/") else f"images/{path}"
        found = self._located(path) or self._located(other)
        return found and ("images/" + found[0].removeprefix("images/"), found[1])

    def _located(self, path: str) -> tuple[str, Place] | None:
        """A path that only this picture has, and its place."""
        try:
            size = (self.source / path).stat().st_size
            if (self.source / path).is_file():
                return path, Place("", path, 0, size, 0)
        except OSError:  # there is no such file, or the path is not valid
            pass
        members = self._members(path)
        if len(members) > 1:
            named = self._named(path)
            members = [place for place in members if place.archive in named] or members
        elif not members:
            members = [
                place
                for archive, name in self._named(path).items()
                for place in self._members(name)
                if place.archive == archive
            ]
        if len(members) > 1:
            archives = ", ".join(place.archive for place in members)
            raise RecordError("path is ambiguous", "image", f"{path!r} is in each of {archives}")
        if not members:
            return None
        name = members[0].name
        if name != path and (len(self._members(name)) > 1 or os.path.isfile(self.source / name)):
            name = path  # another picture has this name, too
        return name, members[0]

    def _members(self, path: str) -> list[Place]:
        """The members with this path, at most one of each archive."""
        query = "SELECT archive, path, offset, size, deflated FROM members WHERE path = ?"
        return [Place(*row) for row in self._connection.execute(query, (path,))]

    def _named(self, path: str) -> dict[str, str]:
        """The archives whose name is a folder of the path, and the path of the member in each of them.

        For example, `a/images/1.jpg` is the member `a/1.jpg` of `a/images.tar`.
        """
        names = {}
        for archive in self.archives.values():
            if archive.stem and path.startswith(f"{archive.own_folder}/"):
                rest = path.removeprefix(f"{archive.own_folder}/")
                names[archive.name] = f"{archive.folder}/{rest}" if archive.folder else rest
        return names

    @functools.lru_cache(maxsize=4096)  # noqa: B019 one object a process, few folders
    def _folder(self, folder: str) -> str | None:
        parts = folder.strip("/").split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            found = {
                f"{root}/{tail}".lstrip("/") for root in self._roots if self._is_folder(root, tail)
            }
            if len(found) > 1:
                detail = f"{folder!r} may be any of {', '.join(sorted(found))}"
                raise RecordError("path is ambiguous", "image", detail)
            # The last folder alone is not enough: it is often called `images`.
            if found and (len(parts) - start > 1 or len(parts) == 1):
                return found.pop()
        return None

    @functools.cached_property
    def _roots(self) -> list[str]:
        """The folders of the first two levels of the release, and those that have archives."""
        roots = {""} | {archive.folder for archive in self.archives.values()}
        folders = itertools.chain(self.source.glob("*/"), self.source.glob("*/*/"))
        roots |= {p.relative_to(self.source).as_posix() for p in folders if p.is_dir()}
        return sorted(roots)

    def _is_folder(self, root: str, tail: str) -> bool:
        path = f"{root}/{tail}".lstrip("/")
        own_folders = {archive.own_folder for archive in self.archives.values()}
        if (self.source / path).is_dir() or path in own_folders:
            return True
        query = "SELECT 1 FROM members WHERE path > ? AND path < ? LIMIT 1"
        row = self._connection.execute(query, (f"{path}/", f"{path}0")).fetchone()
        return row is not None

    def read(self, place: Place) -> bytes:
        """The bytes of a picture.

        Raises:
          OSError: they cannot be read, or the archive is shorter than when it was indexed.
        """
        if not place.archive:
            return (self.source / place.name).read_bytes()
        if place.archive not in self._opened:
            self._opened[place.archive] = self.archives[place.archive].open(self.source)
        file = self._opened[place.archive]
        file.seek(place.offset)
        data = file.read(place.size)
        if len(data) != place.size:
            raise OSError(f"{place.archive} ends inside {place.name}")
        try:
            return zlib.decompress(data, -15) if place.deflated else data
        except zlib.error as error:
            raise OSError(f"{place.archive} is damaged at {place.name}: {error}") from None


_SCHEMA_VERSION = 1
_FORGET = f"""
DROP TABLE IF EXISTS archives;
DROP TABLE IF EXISTS members;
PRAGMA user_version = {_SCHEMA_VERSION};
"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS archives (
  name TEXT PRIMARY KEY, folder TEXT, stem TEXT, parts TEXT, fingerprint TEXT);
CREATE TABLE IF NOT EXISTS members (
  path TEXT, archive TEXT, offset INTEGER, size INTEGER, deflated INTEGER,
  PRIMARY KEY (path, archive)
) WITHOUT ROWID;
"""


def tar_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int, bool]]:
    """The files in an uncompressed tar file: name with `/`, offset, size in bytes, False (not deflated).

    Raises:
      ReleaseError: it is not a tar file or is cut off. The complete members have been yielded before.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # otherwise it keeps all members, a kilobyte each
                if member.isreg() and not member.issparse():
                    yield _member_name(member.name), member.offset_data, member.size, False
            _check_tar_end(file, tar.offset, path)
    except tarfile.TarError as error:
        raise ReleaseError(path, f"is not a complete tar file ({error})", file.tell()) from None


def _check_tar_end(file: BinaryIO, end: int, path: Path) -> None:
    """A tar file ends with blocks of zeros. Without them it is cut off, perhaps inside a member."""
    file.seek(end)
    tail = file.read(1024)
    if len(tail) < 512 or tail.strip(b"\0"):
        size = file.seek(0, os.SEEK_END)
        raise ReleaseError(path, "is cut off: a tar file ends with zeros; download it again", size)


def _zip_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int, bool]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                problem = (
                    f"compresses {member.filename!r} by another method than stored or deflated"
                )
                raise ReleaseError(path, problem)
            # The lengths of name and extra field here may differ from those in the directory.
            file.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            offset = member.header_offset + 30 + name_length + extra_length
            deflated = member.compress_type == zipfile.ZIP_DEFLATED
            yield _member_name(member.filename), offset, member.compress_size, deflated


def _member_name(name: str) -> str:
    plain = "/".join(part for part in name.split("/") if part not in ("", "."))
    return plain.encode("utf-8", "replace").decode()  # other encodings are not valid text
