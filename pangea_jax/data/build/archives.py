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
import stat
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
from pangea_jax.work import untrusted

MAX_BYTES = 128 << 20
"""The most bytes of a picture, in an archive and inflated. A photograph has a few million."""
MAX_RATIO = 250
"""The most bytes into which one deflated byte may inflate, beyond the first `_ANY_RATIO` bytes."""
MAX_MEMBERS = 10_000_000
"""The most members of an archive."""
_ANY_RATIO = 1 << 20
# The directory of a zip file and the long names of a tar file are read at once.
_MAX_DIRECTORY, _MAX_TAR_HEADER = 128 << 20, 1 << 20
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
      deflated: number of bytes into which zlib must inflate these; 0 if they are the picture itself; a negative number
        if the member cannot be read, see `_FAULTS`.
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


_ENCRYPTED, _MISPLACED, _OVERLAPPING = -1, -2, -3
_FAULTS = {
    _ENCRYPTED: "is encrypted",
    _MISPLACED: "is not where, or not as large as, the archive's directory says",
    _OVERLAPPING: "shares its bytes with another member",
}
"""Why a member of an archive cannot be read, by the number that `Place.deflated` then has."""


def find_archives(source: Path, *, follow_links: bool = False) -> list[Archive]:
    """All tar and zip files in a folder and its subfolders, ordered by name. A split archive is one archive.

    Raises:
      ReleaseError: a part is missing, a tar file is compressed as a whole, or an archive is no regular file or a
        symbolic link out of the folder.
    """
    whole, split = [], {}
    for folder, _, names in os.walk(source):
        where = Path(folder).relative_to(source).as_posix()
        where = "" if where == "." else where
        for name in names:
            path = f"{where}/{name}" if where else name
            if name.endswith((*_COMPRESSED, ".tar", ".zip")) or _PART.fullmatch(name):
                _admit(source, path, follow_links)
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


def _admit(source: Path, path: str, follow_links: bool) -> None:
    """Raises ReleaseError if an archive is no regular file, or lies outside of the source."""
    try:
        untrusted.require_regular(source / path)
    except OSError as error:
        said = str(error).partition(" is ")[2] if isinstance(error, untrusted.NotRegular) else ""
        raise ReleaseError(source / path, f"is {said or 'a link to nothing'}") from None
    if not follow_links and not untrusted.is_inside(source, source / path):
        raise ReleaseError(source / path, LEAVES)


LEAVES = "is a symbolic link out of the source; pass --follow_links if you trust it"


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
      follow_links: also read what symbolic links outside of the source lead to.
    """

    def __init__(self, source: Path, database: Path, *, follow_links: bool = False):
        self.source, self.database, self.follow_links = source, database, follow_links
        self._opened: dict[str, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("source", "database", "follow_links")
        return {name: getattr(self, name) for name in kept} | {"_opened": {}}

    def index(self, on_members: Callable[[int], Any] = lambda count: None) -> None:
        """Lists the members of every archive that is new or has changed since the last call.

        Args:
          on_members: called with the number of members listed since the last call.

        Raises:
          ReleaseError: an archive is damaged or ends early.
        """
        self.database.parent.mkdir(parents=True, exist_ok=True)
        found = find_archives(self.source, follow_links=self.follow_links)
        if self.database.is_dir():
            raise ReleaseError(self.database, "is a folder, not a list of archives; remove it")
        if self.database.is_file() and not _is_sound(self.database):
            self.database.unlink()  # it is made from the archives alone
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
            members = zip_members if zipfile.is_zipfile(file) else tar_members
            if members is tar_members and archive.name.endswith(".zip"):
                raise ReleaseError(
                    self.source / archive.name, "is not a complete zip file; download it again"
                )
            file.seek(0)
            count = 0
            for count, (name, *place) in enumerate(members(file, self.source / archive.name), 1):
                if count > MAX_MEMBERS:
                    problem = f"has more than {MAX_MEMBERS:,} members; split it"
                    raise ReleaseError(self.source / archive.name, problem)
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
        found = find_archives(self.source, follow_links=self.follow_links)
        return [a.name for a in found if listed.get(a.name) != a.fingerprint(self.source)]

    def digest(self) -> str:
        """A hash of all archives that `index` listed. It changes if an archive is changed, added or removed."""
        listed = [_SCHEMA_VERSION, self._listed()]  # places of another version mean something else
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

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
        size = self._loose(path)
        if size is not None:
            return path, Place("", path, 0, size, 0)
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

    def _loose(self, path: str) -> int | None:
        """The number of bytes of a picture that is a file; None if there is no such file.

        Raises:
          RecordError: it is a named pipe or a device, or lies outside of the source.
        """
        try:
            found = (self.source / path).stat()
        except (OSError, ValueError):  # there is no such file, or the path is not valid
            return None
        if stat.S_ISDIR(found.st_mode):
            return None
        if not stat.S_ISREG(found.st_mode):
            raise RecordError("picture is not a regular file", "image", path)
        if self._leaves(path):
            raise RecordError("picture is outside of the source", "image", f"{path!r} {LEAVES}")
        return found.st_size

    def _leaves(self, path: str) -> bool:
        """Whether a symbolic link takes a file out of the source, and links may not be followed."""
        if self.follow_links:
            return False
        folder, _, name = path.rpartition("/")
        real = os.path.join(self._real_folder(folder), name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        return not Path(real).is_relative_to(self._real_folder(""))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 one object a process, few folders
    def _real_folder(self, folder: str) -> str:
        return os.path.realpath(self.source / folder)

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
          OSError: they cannot be read, are too many, or the archive is shorter than when it was indexed.
        """
        if not place.archive:
            if self._leaves(place.name):
                raise OSError(f"{place.name} {LEAVES}")
            return untrusted.read_regular(self.source / place.name, MAX_BYTES)
        if place.deflated in _FAULTS:
            raise OSError(f"{place.name} in {place.archive} {_FAULTS[place.deflated]}")
        if max(place.size, place.deflated) > MAX_BYTES:
            raise OSError(f"{place.name} in {place.archive} has more than {MAX_BYTES:,} bytes")
        if place.archive not in self._opened:
            self._opened[place.archive] = self.archives[place.archive].open(self.source)
        file = self._opened[place.archive]
        file.seek(place.offset)
        data = file.read(place.size)
        if len(data) != place.size:
            raise OSError(f"{place.archive} ends inside {place.name}")
        return _inflated(data, place) if place.deflated else data


def _inflated(data: bytes, place: Place) -> bytes:
    """Inflates a member of a zip file, to no more bytes than its directory says."""
    if place.deflated > max(_ANY_RATIO, MAX_RATIO * len(data)):
        ratio = f"{place.deflated // max(1, len(data)):,} times its {len(data):,} bytes"
        raise OSError(f"{place.name} in {place.archive} inflates to {ratio}")
    machine = zlib.decompressobj(-15)
    try:
        found = machine.decompress(data, place.deflated + 1)
    except zlib.error as error:
        raise OSError(f"{place.archive} is damaged at {place.name}: {error}") from None
    if len(found) != place.deflated or not machine.eof:
        size = f"{place.deflated:,} bytes, as the archive's directory says"
        raise OSError(f"{place.archive} is damaged at {place.name}: it does not inflate to {size}")
    return found


_SCHEMA_VERSION = 2
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


def _is_sound(database: Path) -> bool:
    """Whether a file is an SQLite database without damage that SQLite sees."""
    try:
        with contextlib.closing(sqlite3.connect(database)) as opened:
            return opened.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        return False


class _Bounded:
    """A file that reads no more than `most` bytes at once, because a length in a damaged archive may be anything."""

    def __init__(self, file: BinaryIO, most: int, path: Path):
        self._file, self._most, self._path = file, most, path
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self._most:
            problem = f"has a directory or name of {size:,} bytes; the limit is {self._most:,}"
            raise ReleaseError(self._path, problem, self._file.tell())
        return self._file.read(size)


# What tarfile and zipfile raise at damaged bytes, besides their own errors.
_DAMAGE = (ArithmeticError, EOFError, LookupError, OSError, RecursionError, ValueError)
_DAMAGE += (NotImplementedError, struct.error, tarfile.TarError, zipfile.BadZipFile)


def tar_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int, int]]:
    """The files in an uncompressed tar file: name with `/`, offset, size in bytes, 0 (not deflated).

    Raises:
      ReleaseError: it is not a tar file or is cut off. The complete members have been yielded before.
    """
    try:
        before, length = -1, file.seek(0, os.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=_Bounded(file, _MAX_TAR_HEADER, path), mode="r:") as tar:
            for member in tar:
                tar.members = []  # otherwise it keeps all members, a kilobyte each
                begin, before = before, member.offset_data
                # With a size below zero it would never end.
                if not begin < before <= before + member.size <= length:
                    raise tarfile.ReadError(f"{member.size:,} bytes at byte {before:,}")
                if member.isreg() and not member.issparse():
                    yield _member_name(member.name), member.offset_data, member.size, 0
            _check_tar_end(file, tar.offset, path)
    except _DAMAGE as error:
        problem = f"is not a complete tar file ({error}); download it again"
        raise ReleaseError(path, problem, file.tell()) from None


def _check_tar_end(file: BinaryIO, end: int, path: Path) -> None:
    """A tar file ends with blocks of zeros. Without them it is cut off, perhaps inside a member."""
    file.seek(end)
    tail = file.read(1024)
    if len(tail) < 512 or tail.strip(b"\0"):
        size = file.seek(0, os.SEEK_END)
        raise ReleaseError(path, "is cut off: a tar file ends with zeros; download it again", size)


def zip_members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int, int]]:
    """The files in a zip file: name with `/`, and offset, size and deflated as in `Place`.

    Raises:
      ReleaseError: the directory of the archive cannot be read, or a member is compressed by another method.
    """
    try:
        with zipfile.ZipFile(_Bounded(file, _MAX_DIRECTORY, path)) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        length = file.seek(0, os.SEEK_END)
    except _DAMAGE as error:
        problem = f"is not a complete zip file ({error}); download it again"
        raise ReleaseError(path, problem) from None
    end = 0
    for member in members:
        if member.filename.endswith("/"):  # `is_dir` needs a name
            continue
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = f"compresses {member.filename!r} by another method than stored or deflated"
            raise ReleaseError(path, problem)
        offset, deflated = _zip_place(file, member, length)
        if deflated >= 0:
            deflated = _OVERLAPPING if member.header_offset < end else deflated
            end = max(end, offset + member.compress_size)
        yield _member_name(member.filename), offset, member.compress_size, deflated


def _zip_place(file: BinaryIO, member: zipfile.ZipInfo, length: int) -> tuple[int, int]:
    """The offset of a member's bytes, and `Place.deflated`. Compares its own header with the directory.

    Args:
      length: number of bytes of the archive.
    """
    header = b""
    if 0 <= member.header_offset < length:
        file.seek(member.header_offset)
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return 0, _MISPLACED
    mark, flags, method, packed, full, name_length, extra_length = _HEADER.unpack(header)
    # The lengths of name and extra field here may differ from those in the directory.
    offset = member.header_offset + _HEADER.size + name_length + extra_length
    if mark != b"PK\3\4" or offset + member.compress_size > length:
        return offset, _MISPLACED
    if (flags | member.flag_bits) & _FLAG_ENCRYPTED:
        return offset, _ENCRYPTED
    # The sizes may follow after the data, or be in the extra field.
    told = not flags & _FLAG_SIZES_FOLLOW and _IN_EXTRA not in (packed, full)
    differs = told and (packed, full) != (member.compress_size, member.file_size)
    deflated = method == zipfile.ZIP_DEFLATED
    differs |= not deflated and member.compress_size != member.file_size
    if method != member.compress_type or differs:
        return offset, _MISPLACED
    return offset, member.file_size if deflated else 0


# The header of a member: mark, flags, method, compressed size, size, lengths of name and extra field.
_HEADER = struct.Struct("<4s2xHH8xLLHH")
_FLAG_ENCRYPTED, _FLAG_SIZES_FOLLOW, _IN_EXTRA = 1, 8, 0xFFFFFFFF


def _member_name(name: str) -> str:
    plain = "/".join(part for part in name.split("/") if part not in ("", "."))
    return plain.encode("utf-8", "replace").decode()  # other encodings are not valid text
