"""Downloads PangeaBench from the Hugging Face hub into the layout of eval/bench/documents.py.

`Dataset.source` names the source of a subset, and `Dataset.from_hub` converts its rows. Their field names come from the
cards of the data sets and from the harnesses that read them. The name of a picture file is a hash of its pixels, so
that several languages share one file.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from eval.bench import documents
from eval.bench.models import png
from eval.bench.task import OWN, Source, Task
from pangea_jax.data import image
from pangea_jax.work import atomic

Row = Mapping[str, Any]
_RETRIES = 2
_CONVERTED = "hf://datasets/{}@refs%2Fconvert%2Fparquet"


def fetch(
    tasks: Sequence[Task],
    data_dir: Path | None,
    *,
    console: Console,
    limit: float | None = None,
    load: Callable[[Source], Iterator[Row]] | None = None,
) -> int:
    """Writes the missing files of `tasks`; returns 1 if some files could not be made.

    Args:
      limit: rows of each file. A file with fewer rows than its source gets a marker (`documents.limit_mark`), and a
        later call with a higher limit writes it again.
      load: reads the rows of a source; the hub by default.

    Raises:
      DataError: the limit is a share below 1; the number of rows is unknown before the download.
    """
    if limit is not None and limit != int(limit):
        raise documents.DataError(f"--limit={limit}: fetch takes a number of rows, 1 or more")
    files: dict[Source, list[_TaskFile]] = {}
    for task in tasks:
        path = documents.task_file(task, data_dir)
        if task.dataset.group == OWN and not task.dataset.hub:
            console.print(f"{task.name}: nothing to fetch; its documents are in {path}")
            continue
        if path.exists() and (limit or math.inf) <= documents.rows_fetched(path):
            console.print(f"{task.name}: there already")
            continue
        source = task.dataset.source(task.subset)
        files.setdefault(source, []).append(_TaskFile(task, path, source, limit or math.inf))
    failed = False
    for source in list(files):
        members = files.pop(source)  # their rows need not stay in memory
        _read_source(source, members, load or load_from_hub)
        for file in members:
            try:
                file.write(console)
            except Exception as error:
                failed = True
                where = f"{file.task.name}: {file.task.dataset.hub}"
                console.print(f"{where}: {type(error).__name__}: {error}", markup=False)
    return int(failed)


def load_from_hub(source: Source) -> Iterator[Row]:
    """The rows of a data set on the hub, streamed; pictures stay encoded.

    The datasets package no longer runs loading scripts; for repositories with one, the hub's Parquet copy is read.
    """
    try:
        import datasets
    except ImportError:
        raise documents.DataError(
            "fetching needs the datasets package; run: pip install -r requirements-eval.txt"
        ) from None
    # The hub's client also retries, with its own waits; the default of 20 would take ten minutes.
    datasets.config.STREAMING_READ_MAX_RETRIES = _RETRIES
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split, streaming=True)
    except (RuntimeError, ValueError) as error:
        if not re.search("dataset scripts|trust_remote_code", str(error), re.IGNORECASE):
            raise
        files = f"{_CONVERTED.format(source.path)}/{source.config or 'default'}/{source.split}"
        rows = datasets.load_dataset(
            "parquet", data_files=f"{files}/*.parquet", split="train", streaming=True
        )
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    yield from rows


@dataclasses.dataclass
class _TaskFile:
    """The file of a task while it is made; its error does not affect other files."""

    task: Task
    path: Path
    source: Source
    limit: float
    lines: dict[str, str] = dataclasses.field(default_factory=dict)  # by the id of the document
    limited: bool = False  # the source has more rows
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.limited or self.error is not None

    def add(self, hub_row: Row, index: int) -> None:
        """Takes a row of the source if it belongs to this task."""
        dataset = self.task.dataset
        try:
            row = dataset.from_hub(hub_row, self.task.subset, index)
        except KeyError as error:
            fields = ", ".join(sorted(hub_row))
            raise documents.DataError(
                f"row {index} has no field {error}; it has {fields}"
            ) from None
        if row is None:
            return
        if "images" in dataset.fields:
            row["images"] = [save_picture(p, self.path.parent) for p in row["images"]]
        where = f"{self.source.path}, row {index}"
        document = documents.parse_row(row, dataset, where)
        if document.id in self.lines:
            raise documents.DataError(f"{where}: id {document.id!r} occurs twice")
        self.lines[document.id] = json.dumps(row, ensure_ascii=False) + "\n"

    def write(self, console: Console) -> None:
        """Writes the file, or raises the error that kept it from being made."""
        if self.error:
            raise self.error
        if not self.lines:
            raise documents.DataError(f"{self.source} has no row of {self.task.subset.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Marked before the file is written: a kill in between must not leave a short file without its mark.
        mark = documents.limit_mark(self.path)
        if self.limited:
            mark.touch()
        atomic.write_bytes(self.path, "".join(self.lines.values()).encode())
        if not self.limited:
            mark.unlink(missing_ok=True)
        cut = ", not all" if self.limited else ""
        console.print(f"{self.task.name}: {len(self.lines)} documents{cut}")


def _read_source(source: Source, files: Sequence[_TaskFile], load) -> None:
    """Reads a source once for all its tasks: CVQA has 72 tasks from the same gigabytes.

    The hub's client raises errors of many libraries, and the other tasks must go on.
    """
    try:
        for index, hub_row in enumerate(load(source)):
            pending = [file for file in files if not file.done]
            if not pending:
                break
            for file in pending:
                file.limited = len(file.lines) >= file.limit
                if not file.limited:
                    try:
                        file.add(hub_row, index)
                    except Exception as error:
                        file.error = error
    except Exception as error:
        for file in files:
            if not file.done:
                file.error = error


def save_picture(picture: Any, folder: Path) -> str:
    """Stores a picture under `folder`/images and returns its relative path.

    Args:
      picture: encoded bytes, base64 text, `{"bytes": ...}` as datasets has it, or a PIL image.

    Raises:
      ImageError: it cannot be decoded.
    """
    encoded = _encoded(picture)
    decoded = image.decode(encoded)
    name = hashlib.sha256(repr(decoded.size).encode() + decoded.tobytes()).hexdigest()[:20]
    suffix = "jpg" if encoded.startswith(b"\xff\xd8") else "png"
    path = folder / "images" / f"{name}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "png" and not encoded.startswith(b"\x89PNG"):
            encoded = png(decoded)
        atomic.write_bytes(path, encoded)
    return f"images/{path.name}"


def _encoded(picture: Any) -> bytes:
    if isinstance(picture, Mapping):
        picture = picture["bytes"]
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Image.Image):
        return png(picture.convert("RGB"))
    if not isinstance(picture, str):
        kind = type(picture).__name__
        raise image.ImageError("", f"expected bytes, base64 or a picture, got {kind}")
    try:
        return base64.b64decode(picture.partition("base64,")[2] or picture, validate=True)
    except binascii.Error:
        raise image.ImageError("", "the text is not base64") from None
