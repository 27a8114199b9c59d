"""One build of a store: what decides its bytes, and the folder in which it works."""

import dataclasses
import functools
import shutil
import threading
from pathlib import Path
from typing import Any

from pangea_jax.data import image, store
from pangea_jax.data.build import archives, release, write_store
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.work import restart
from pangea_jax.work.atomic import as_json, read_json, write_json

WORK, ARCHIVES, SUMMARY = "work", "archives.sqlite", "summary.json"


class BuildError(restart.WorkError):
    """The store cannot be built; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Build:
    """What to build. Every field but `out` decides what is in the store.

    Attributes:
      source: folder of the release, or a file of records.
      out: folder of the store.
      images: folder of the pictures; by default that of the records.
      tokenizer: counts the tokens: a tokenizer.json, a .model, or a folder with one of them.
      image_id: see `load_tokenizer`.
      default_language: language of records that name none; None: it is identified from their words.
      limit: number of records to read; None: all.
      records_per_shard: records read for one shard, including those rejected later.
      shard_bytes: approximate size of a shard of pictures.
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
        """A file of one shard in the work folder."""
        return restart.shard_path(self.work / part, number, suffix)

    @property
    def chunks(self) -> int:
        """The number of chunks of records; known when all records have been read."""
        return read_json(self.work / "raw.json")["chunks"]

    @property
    def total(self) -> int:
        """The number of records; known when all have been read."""
        return read_json(self.work / "raw.json")["records"]

    @property
    def finished(self) -> bool:
        """Whether the store is complete, so that the work folder is no longer needed."""
        return (self.out / store.MANIFEST).is_file() and (self.out / SUMMARY).is_file()

    def start(self) -> None:
        """Checks the fields, takes the claimed folder for this build, and removes half-written files.

        Raises:
          WorkError: the folder holds another build, or a field names something missing.
          FileNotFoundError: there is no such tokenizer.
        """
        _open_pictures.cache_clear()  # an earlier build in this process may have opened other archives
        self.load_tokenizer()
        if self.images is not None and not self.images.is_dir():
            raise BuildError(f"--images={self.images}: no such folder")
        plan = self.as_plan()
        if (self.out / SUMMARY).is_file():
            restart.compare(read_json(self.out / SUMMARY)["plan"], plan, self.out)
        restart.settle(self.work / "plan.json", plan, self.out)
        restart.remove_partial(self.work)
        restart.remove_partial(self.out, "*.partial")

    def as_plan(self) -> dict[str, Any]:
        """The fields and the files of records, as JSON."""
        files = [(path.name, path.stat()) for path in release.record_files(self.source)]
        records = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
        return as_json(dataclasses.asdict(self) | {"out": None, "records": records})

    def pictures(self) -> archives.Pictures:
        """The pictures of the release."""
        folder = self.images or (self.source.parent if self.source.is_file() else self.source)
        # Beam runs threads, and these must not share open files.
        return _open_pictures(folder, self.out / ARCHIVES, threading.get_ident())

    def check_archives(self) -> None:
        """Raises BuildError if an archive has changed since the finished store was made from it."""
        if changed := self.pictures().changed():
            names = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            raise BuildError(
                f"{self.out} is finished, but made from archives that have changed since ({names}); "
                "give another --out, or remove that one"
            )

    def forget_other_archives(self) -> None:
        """Removes everything that was made from archives that `Pictures.index` has found changed.

        Only the raw records stay. Everything else holds byte offsets in the archives.
        """
        known, digest = self.work / "archives.json", self.pictures().digest()
        if known.is_file() and read_json(known)["digest"] == digest:
            return
        known.unlink(missing_ok=True)  # first, so that a kill in between removes everything again
        for part in ("parsed", "plan", "images", "records"):
            shutil.rmtree(self.work / part, ignore_errors=True)
        for placed in self.out.glob(f"*/{write_store.VERSION}/*.array_record-*-of-*"):
            placed.unlink()  # only shards: the folder may hold other files
        write_json(known, {"digest": digest})

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that counts tokens; None if they are not counted."""
        return None if self.tokenizer is None else _load_tokenizer(self.tokenizer, self.image_id)


@functools.cache
def _open_pictures(source: Path, database: Path, thread: int) -> archives.Pictures:
    return archives.Pictures(source, database)


_load_tokenizer = functools.cache(load_tokenizer)
