"""Makes a store of PangeaIns: streamed from the release, in parallel, restartable.

    raw        the records, read once in their order, in chunks of `records_per_shard`
    parsed     per chunk: validated, languages settled, tokens counted, pictures located
    images     every picture that is referred to, once, in its original bytes, checked by decoding
    records    per chunk: the shard, its rows of the index, and what was rejected

Every step writes whole files into `OUT/work` and skips those that are there: what was killed goes
on. A chunk depends on the records in it alone and a picture shard on the list of all pictures, so
the bytes of the store do not depend on how many workers made it, nor on whether Beam ran them.

The index has, beyond the columns of every store: `num_tokens` (of the rendered conversation without
its pictures; null if no tokenizer was given), `image_sizes` (list of [width, height] in pixels),
`shard` and `row` (of that shard).
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data.build import rejections, write_store
from pangea_jax.data import store
from pangea_jax.work.atomic import read_json, write_json
from pangea_jax.data.build.folder import ARCHIVES, SUMMARY, WORK, Build, BuildError, Progress, Silent, forget_pictures
from pangea_jax.data.build.pictures import Pictures
from pangea_jax.data.build.records import INDEX_SCHEMA, KEPT_EXAMPLES, SPLIT, Records
from pangea_jax.data.build.rejections import Reasons
from pangea_jax.work.runners import Run

__all__ = ["ARCHIVES", "REJECTED", "WORK", "Build", "BuildError", "TooManyRejected", "build"]

Shards = Sequence[Mapping[str, Any]]
NAME, COLLECTION, REJECTED = "pangeains", "images", "rejected.jsonl"
_PICTURE_SCHEMA = pa.schema(
    [
        *write_store.PICTURE_SCHEMA,
        pa.field("key_hash", pa.uint64()),
        pa.field("shard", pa.int32()),
        pa.field("row", pa.int32()),
    ]
)


class TooManyRejected(BuildError):
    """More records were rejected than allowed.

    Attributes:
      reasons: reason -> (records, id of the first one).
      total: records read.
    """

    def __init__(self, reasons: Reasons, total: int, allowed: float):
        self.reasons, self.total = dict(reasons), total
        rejected = sum(count for count, _ in self.reasons.values())
        super().__init__(
            f"{rejected:,} of {total:,} records ({rejected / max(1, total):.1%}) cannot be used, more "
            f"than --max_bad_fraction={allowed:g}:\n{rejections.table(self.reasons)}\n"
            "put right what is wrong, or raise --max_bad_fraction; the same command then goes on"
        )


def build(
    build: Build, run: Run, *, max_bad_fraction: float = 0.01, progress: Progress | None = None
) -> dict[str, Any]:
    """Makes the store, or goes on with making it.

    Args:
      run: `runners.Local` or `runners.Beam`.
      max_bad_fraction: rejected records are counted and left out up to this share of all.

    Returns:
      the contents of `summary.json`.

    Raises:
      TooManyRejected: with the table of reasons.
      BuildError: the folder holds another build, or a finished one of archives that have changed.
      ReleaseError: the release is broken.
      RunnerError: a worker was killed.
    """
    with build.claimed():
        return _build(build, run, max_bad_fraction, progress or Silent())


def _build(build: Build, run: Run, max_bad_fraction: float, progress: Progress) -> dict[str, Any]:
    build.start()
    forget_pictures()
    if build.finished:
        build.check_archives()
        shutil.rmtree(build.work, ignore_errors=True)
        return read_json(build.out / SUMMARY)
    records, pictures = Records(build), Pictures(build)
    progress.start("listing archives", None, "members")
    build.pictures().index(progress.count)
    build.forget_other_archives()
    for _ in run(records.parse, records.split(progress)):
        pass
    allowed = max_bad_fraction * build.total
    _check(build, records.rejected_while_parsing(), max_bad_fraction)
    shards = pictures.plan()
    progress.start("storing pictures", shards, "shards")
    faults, checked = 0, allowed
    for shard in run(pictures.store, range(shards)):
        progress.advance(1)
        faults += pictures.num_faults(shard)
        # Only to stop early: it reads all parsed records, so not at every fault.
        if faults > checked:
            _check(build, _rejected_so_far(build, shards), max_bad_fraction)
            checked = 2 * faults
    pictures.collect(shards)
    progress.start("storing records", build.chunks, "shards")
    for _ in run(records.store, range(build.chunks)):
        progress.advance(1)
    _check(build, records.rejected(), max_bad_fraction)
    return _finish(build, shards)


def _check(build: Build, reasons: Reasons, allowed: float) -> None:
    """Raises TooManyRejected, and then leaves no file that was made of what is to be put right."""
    total = build.total
    if sum(count for count, _ in reasons.values()) <= allowed * total:
        return
    records, pictures = Records(build), Pictures(build)
    pictures.forget_faults()
    records.forget_stored()
    if not pictures.planned:
        records.forget_rejected()
    raise TooManyRejected(reasons, total, allowed)


def _rejected_so_far(build: Build, shards: int) -> Reasons:
    """Records rejected while parsing, and those with a fault among the pictures stored so far."""
    pictures = Pictures(build)
    faults = dict(fault for shard in range(shards) for fault in pictures.faults(shard))
    return Records(build).rejected_while_parsing(faults)


def _finish(build: Build, shards: int) -> dict[str, Any]:
    """Puts the shards in their places and describes them; returns the summary."""
    chunks = [read_json(build.path("records", c, "json")) for c in range(build.chunks)]
    pictures = [read_json(build.path("images", s, "json")) for s in range(shards)]
    files: dict[str, Any] = {}
    records = _finish_part(build, _RECORDS, chunks, files)
    images = _finish_part(build, _IMAGES, pictures, files)
    examples = [example for chunk in chunks for example in chunk["examples"]]
    lines = [json.dumps(e, ensure_ascii=True) + "\n" for e in examples[:KEPT_EXAMPLES]]
    (build.out / REJECTED).write_text("".join(lines), encoding="utf-8")
    summary = {
        "plan": read_json(build.work / "plan.json")["build"],
        "total": build.total,
        "kept": sum(chunk["count"] for chunk in chunks),
        "rejected": Records(build).rejected(),
        "languages_identified": sum(chunk["identified"] for chunk in chunks),
        "pictures": sum(shard["count"] for shard in pictures),
        "picture_bytes": sum(shard["num_bytes"] for shard in pictures),
    }
    write_json(build.out / SUMMARY, summary)
    manifest = {
        "format": store.FORMAT_VERSION,
        "name": NAME,
        "build": f"python launch/build_data.py pangeains --source={build.source}",
        "records": {SPLIT: records},
        "images": {COLLECTION: images} if images else {},
        "files": dict(sorted(files.items())),
    }
    write_store.write_manifest(build.out, manifest)
    shutil.rmtree(build.work)
    return read_json(build.out / SUMMARY)


def _finish_part(build: Build, part: "_Part", made: Shards, files: dict[str, Any]) -> Shards:
    """Places the shards of a part, writes TFDS's metadata and the index, and adds all of them to `files`.

    Returns:
      The shards as the manifest lists them.
    """
    folder = f"{part.name}/{write_store.VERSION}"
    shards, numbers = _place(build, part, made, files)
    if shards:
        sizes = [shard["num_records"] for shard in shards]
        num_bytes = sum(shard["num_bytes"] for shard in made)
        write_store.write_metadata(
            build.out / folder, part.features, {part.split: (sizes, num_bytes)}
        )
        for name in ("dataset_info.json", "features.json"):
            path = f"{folder}/{name}"
            files[path] = write_store.fingerprint(build.out / path)
    with write_store.IndexWriter(build.out / part.index, part.schema) as index:
        for position, row in enumerate(_rows(build, part, numbers)):
            index.add(row | {"position": position})
    files[part.index] = write_store.fingerprint(build.out / part.index)
    return shards


def _place(
    build: Build, part: "_Part", made: Shards, files: dict[str, Any]
) -> tuple[Shards, dict[int, int]]:
    """Moves shards into `OUT/part`, without empty ones; for the manifest, and old -> new number."""
    folder = build.out / part.name / write_store.VERSION
    folder.mkdir(parents=True, exist_ok=True)
    used = [number for number, shard in enumerate(made) if shard["count"]]
    shards = []
    for new, old in enumerate(used):
        name = write_store.shard_name(NAME, part.split, new, len(used))
        shard = build.path(part.name, old, "array_record")
        if shard.is_file():  # else a killed run has moved it already
            os.replace(shard, folder / name)
        path = f"{part.name}/{write_store.VERSION}/{name}"
        shards.append({"path": path, "num_records": made[old]["count"]})
        files[path] = {key: made[old][key] for key in ("bytes", "sha256")}
    return shards, {old: new for new, old in enumerate(used)}


def _rows(build: Build, part: "_Part", numbers: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """Rows of the index of a part, shard by shard, but for their position."""
    for old, new in numbers.items():
        for row in pq.read_table(build.path(part.name, old, "parquet")).to_pylist():
            if part is _RECORDS:
                yield row | {"shard": new}
            elif row["fault"] is None:
                key_hash = int(store.key_hash(row["key"]))
                yield row | {"shard": new, "collection": COLLECTION, "key_hash": key_hash}


@dataclasses.dataclass(frozen=True)
class _Part:
    """Shards of one kind, and how the store describes them.

    Attributes:
      name: their folder, in the work folder and in the store.
      split: as TFDS calls them.
      index: the file with a row for each example in them.
    """

    name: str
    split: str
    features: Mapping[str, Any]
    index: str
    schema: pa.Schema


_RECORDS = _Part("records", SPLIT, write_store.RECORD_FEATURES, store.INDEX, INDEX_SCHEMA)
_IMAGES = _Part(
    "images", COLLECTION, write_store.PICTURE_FEATURES, store.IMAGE_INDEX, _PICTURE_SCHEMA
)
