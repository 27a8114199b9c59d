"""One build of a store: what decides its bytes, and the folder in which it works."""

import dataclasses
import functools
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pangea_jax.data import image, store
from pangea_jax.data.build import (
    archives,
    embedded,
    own_files,
    own_records,
    picture_paths,
    write_store,
)
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.work import restart, untrusted
from pangea_jax.work.atomic import as_json, differences, read_json, write_json

WORK, ARCHIVES, SUMMARY = "work", "archives.sqlite", "summary.json"


class BuildError(restart.WorkError):
    """The store cannot be built; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Build:
    """What to build. Every field but `out` and `target` decides what is in the store.

    Attributes:
      source: folder of the release, or a file of records, in any form that `own_files` reads.
      out: folder of the store, on a disk.
      target: folder of the store in a bucket. Every shard goes there when it is made and does not stay in `out`, so
        that the disk holds only what is small.
      images: folder of the pictures; by default that of the records.
      tokenizer: counts the tokens: a tokenizer.json, a .model, or a folder with one of them.
      image_id: see `load_tokenizer`.
      default_language: language of records that name none; None: it is identified from their words.
      limit: number of records to read; None: all.
      records_per_shard: records read for one shard, including those rejected later.
      shard_bytes: approximate size of a shard of pictures.
      max_pixels: larger pictures are rejected.
      follow_links: also read what symbolic links outside of the source lead to.
      split: the split of the records, if the source has several.
      columns: our name of a field -> its name in the records, see `own_records.Rules`.
      question: of records that have only an answer.
      unmarked: what becomes of pictures without a mark in the text, see `own_records.Rules`.
      strict_language: whether a record is rejected if its language is neither given nor identified. Otherwise its
        language is "und".
      orientation: how the pictures are meant to be seen, see `pangea_jax.data.image.decode`.
      own: whether these are someone's own records: a picture is then known by its bytes and not by its path, so that
        the same records in another form give the same store, and `own` is the source of records that name none.
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
    follow_links: bool = False
    split: str | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    question: str | None = None
    unmarked: str = own_records.UNMARKED[0]
    strict_language: bool = False
    orientation: str = "stored"
    own: str = ""
    target: Path | None = None

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
        self._check_links()
        plan = self.as_plan()
        self._forget_other_records(plan)
        if (self.out / SUMMARY).is_file():
            restart.compare(read_json(self.out / SUMMARY)["plan"], plan, self.out)
        restart.settle(self.work / "plan.json", plan, self.out)
        restart.remove_partial(self.work)
        restart.remove_partial(self.out, "*.partial")

    def _check_links(self) -> None:
        """Raises BuildError if a file of records is a link out of the source. A file that --source names may be one."""
        if self.follow_links or self.source.is_file():
            return
        for path in self.record_files():
            if not untrusted.is_inside(self.source, path):
                raise BuildError(f"{path} {archives.LEAVES}")

    def as_plan(self) -> dict[str, Any]:
        """The fields and the files of records, as JSON."""
        files = [(path.name, path.stat()) for path in self.record_files()]
        records = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
        return as_json(dataclasses.asdict(self) | {"out": None, "target": None, "records": records})

    def _forget_other_records(self, plan: dict[str, Any]) -> None:
        """Removes unfinished work if only the files of records have changed since: they were corrected.

        Of own data also if the settings have changed: whoever tries them needs the same folder again.
        """
        path = self.work / "plan.json"
        if path.is_file() and not self.finished:
            theirs = read_json(path)
            changed = set(differences(theirs, plan))
            if changed == {"records"} or (changed and self.own and theirs.get("own")):
                for part in self.work.iterdir():
                    if part.is_dir():
                        shutil.rmtree(part)
                    elif part.name != "lock":
                        part.unlink()

    def record_files(self) -> list[Path]:
        """The files of records, see `own_files.record_files`."""
        return own_files.record_files(self.source, self.split)

    @property
    def rules(self) -> own_records.Rules:
        return own_records.Rules(self.columns, self.question, self.unmarked)

    @property
    def folder(self) -> Path:
        """The folder of the records."""
        return self.source.parent if self.source.is_file() else self.source

    @property
    def embedded(self) -> Path:
        """The pictures that stood inside the records, see `embedded.Writer`."""
        return self.work / "embedded.sqlite"

    def pictures(self) -> archives.Pictures:
        """The pictures of the release."""
        return self._open(self.images or self.folder)

    def _open(self, folder: Path) -> archives.Pictures:
        # Beam runs threads, and these must not share open files.
        database = self.out / ARCHIVES
        return _open_pictures(folder, database, self.follow_links, threading.get_ident())

    def find_picture(self, path: str) -> tuple[str, archives.Place]:
        """The key and the place of a picture that a record names, see `picture_paths.find`.

        Raises:
          RecordError: there is no such picture, or several.
          OSError: it cannot be read.
        """
        key, place = picture_paths.find(self.pictures(), self.folder, path, is_own=bool(self.own))
        return (digest_key(embedded.digest(self.read_picture(place))) if self.own else key), place

    def read_picture(self, place: archives.Place) -> bytes:
        """The bytes of a picture.

        Raises:
          OSError: they cannot be read, or are too many.
        """
        if place.archive == embedded.ARCHIVE:
            if place.size > archives.MAX_BYTES:
                raise OSError(f"has more than {archives.MAX_BYTES:,} bytes")
            return embedded.read(self.embedded, place.name)
        if place.archive == picture_paths.BESIDE:
            return self._open(self.folder).read(place._replace(archive=""))
        return self.pictures().read(place)

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
        self.forget_all_but_raw()
        for placed in self.out.glob(f"*/{write_store.VERSION}/*.array_record-*-of-*"):
            placed.unlink()  # only shards: the folder may hold other files
        write_json(known, {"digest": digest})

    def forget_all_but_raw(self) -> None:
        """Removes everything that was made from the records that were read."""
        for part in ("parsed", "plan", "images", "records"):
            shutil.rmtree(self.work / part, ignore_errors=True)

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that counts tokens; None if they are not counted."""
        return None if self.tokenizer is None else _load_tokenizer(self.tokenizer, self.image_id)


def digest_key(digest: str) -> str:
    """The key of a picture that is known by its bytes."""
    return f"images/{digest}"


@functools.cache
def _open_pictures(
    source: Path, database: Path, follow_links: bool, thread: int
) -> archives.Pictures:
    return archives.Pictures(source, database, follow_links=follow_links)


_load_tokenizer = functools.cache(load_tokenizer)
