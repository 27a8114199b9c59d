"""One build of a store: what decides its bytes, the folder it works in, and whether that folder is free."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pangea_jax.data.build import archives, release, write_store
from pangea_jax.data import image, store
from pangea_jax.work.atomic import read_json, write_json
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer

WORK, ARCHIVES, SUMMARY = "work", "archives.sqlite", "summary.json"


class BuildError(RuntimeError):
    """The store cannot be made; says what to do."""


class Progress(Protocol):
    """Where the build tells how far it is: `amount` more of a stage's `total` units, and of the `records`
    (or members of archives) among them, which it can only count."""

    def start(self, stage: str, total: int | None, unit: str) -> None: ...

    def advance(self, amount: int) -> None: ...

    def count(self, records: int) -> None: ...


class Silent:
    """Tells nothing."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def count(self, records: int) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Build:
    """What is built of what. Every field but `out` decides what is in the store.

    Attributes:
      source: folder of the release, or a file of records.
      out: folder of the store.
      images: folder of the pictures, by default that of the records.
      tokenizer: for the token counts: a tokenizer.json, a .model or their folder.
      image_id: see `load_tokenizer`.
      default_language: of records that name none; None: identified from their words.
      limit: only so many records from the first on.
      records_per_shard: records of the release in one shard, those rejected included.
      shard_bytes: about how large a shard of pictures becomes.
      max_pixels: larger pictures are rejected.
    """

    source: Path
    out: Path
    images: Path | None = None
    tokenizer: Path | None = None
    image_id: int | None = None
    default_language: str | None = None
    limit: int | None = None
    records_per_shard: int = 16_384
    shard_bytes: int = 256 << 20
    max_pixels: int = image.MAX_PIXELS

    @property
    def work(self) -> Path:
        return self.out / WORK

    def path(self, part: str, number: int, suffix: str) -> Path:
        """A file of one chunk or shard in the work folder."""
        return self.work / part / f"{number:05d}.{suffix}"

    @property
    def chunks(self) -> int:
        """Into how many chunks the records were cut, once they are."""
        return read_json(self.work / "raw.json")["chunks"]

    @property
    def total(self) -> int:
        """Records that were read, once they are."""
        return read_json(self.work / "raw.json")["records"]

    @property
    def finished(self) -> bool:
        """Whether the store is whole; what is left of the work is then not needed."""
        return (self.out / store.MANIFEST).is_file() and (self.out / SUMMARY).is_file()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """While in it, no other process may build here; a killed one leaves no claim behind.

        Raises:
          BuildError: another process has claimed the folder.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BuildError(f"another process is writing {self.out}") from None
            yield

    def start(self) -> None:
        """Makes the folder this build's own, and removes what a killed one had half-written.

        Raises:
          BuildError: it holds another build, finished or not; or there is no folder of pictures.
          FileNotFoundError: there is no such tokenizer.
        """
        self.load_tokenizer()
        if self.images is not None and not self.images.is_dir():
            raise BuildError(f"{self.images} is no folder of pictures (--images)")
        plan = self._described()
        for path in (self.out / SUMMARY, self.work / "plan.json"):
            if path.is_file():
                theirs = read_json(path)["plan" if path.name == SUMMARY else "build"]
                differing = [name for name in plan if theirs.get(name) != plan[name]]
                if differing:
                    problem = f"{self.out} holds a build of other {', '.join(differing)}"
                    raise BuildError(f"{problem}; give another --out or remove it")
        for part in ("raw", "parsed", "plan", "images", "records"):
            (self.work / part).mkdir(parents=True, exist_ok=True)
        for half_written in (*self.work.rglob("*.partial"), *self.out.glob("*.partial")):
            half_written.unlink(missing_ok=True)
        write_json(self.work / "plan.json", {"build": plan})

    def _described(self) -> dict[str, Any]:
        """The fields and the files of records, as JSON gives them back."""
        files = release.record_files(self.source)
        described = dataclasses.asdict(self) | {
            "out": None,
            "records": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        }
        return json.loads(json.dumps(described, default=str))

    def pictures(self) -> archives.Pictures:
        """The pictures of the release."""
        folder = self.images or (self.source.parent if self.source.is_file() else self.source)
        # Beam's runners have threads, which must not share open files.
        return _pictures(folder, self.out / ARCHIVES, threading.get_ident())

    def check_archives(self) -> None:
        """Raises BuildError if an archive is not the one of which the finished store was made."""
        if changed := self.pictures().changed():
            names = f"{', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}"
            problem = f"{self.out} is finished, of archives that have changed since ({names})"
            raise BuildError(f"{problem}; give another --out or remove it")

    def forget_other_archives(self) -> None:
        """Removes all that was made of archives which `index` has found changed: it names bytes in them.

        The records as they were read stay.
        """
        known, digest = self.work / "archives.json", self.pictures().digest()
        if known.is_file() and read_json(known)["digest"] == digest:
            return
        known.unlink(missing_ok=True)  # first: half of it removed is not whole
        for path in (self.work / "plan_pictures.json", self.work / "sizes.sqlite"):
            path.unlink(missing_ok=True)
        for part in ("parsed", "plan", "images", "records"):
            shutil.rmtree(self.work / part)
            (self.work / part).mkdir()
        for placed in self.out.glob(f"*/{write_store.VERSION}/*.array_record-*-of-*"):
            placed.unlink()  # the folder may hold more than a store
        write_json(known, {"digest": digest})

    def load_tokenizer(self) -> Tokenizer | None:
        """What counts the tokens; None: they are not counted."""
        return None if self.tokenizer is None else _tokenizer(self.tokenizer, self.image_id)


def forget_pictures() -> None:
    """Closes the archives of an earlier build in this process."""
    _pictures.cache_clear()


@functools.cache
def _pictures(source: Path, database: Path, thread: int) -> archives.Pictures:
    return archives.Pictures(source, database)


@functools.cache
def _tokenizer(path: Path, image_id: int | None) -> Tokenizer:
    return load_tokenizer(path, image_id)
