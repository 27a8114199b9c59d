"""Makes a store of PangeaIns: streamed from the release, in parallel, restartable.

    raw        the records, read once in their order, in chunks of `records_per_shard`
    parsed     per chunk: records validated, languages settled, tokens counted, pictures located
    images     every picture that a record refers to, once, in its original bytes, checked by decoding
    records    per chunk: the shard, its rows of the index, and the rejected records

Every step writes its files into `OUT/work` and skips those that are there, so that a killed build goes on
(`pangea_jax/work/restart.py`). A chunk depends only on its records, and a shard of pictures only on the list of
all pictures. So the bytes of the store do not depend on the number of workers, nor on whether Beam ran them.

Beyond the columns of every store, the index has `num_tokens` (of the rendered conversation without its
pictures; null if no tokenizer was given), `image_sizes` (list of [width, height] in pixels), `shard`, and `row`
(in that shard).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress

from pangea_jax.data import store
from pangea_jax.data.build import rejections, write_store
from pangea_jax.data.build.parts import COLLECTION, IMAGES, NAME, RECORDS, SPLIT
from pangea_jax.data.build.pictures import Pictures
from pangea_jax.data.build.plan import ARCHIVES, SUMMARY, WORK, Build, BuildError
from pangea_jax.data.build.records import KEPT_EXAMPLES, Records
from pangea_jax.data.build.rejections import Reasons
from pangea_jax.work import paths, restart
from pangea_jax.work.atomic import partial_path, read_json, write_json
from pangea_jax.work.runners import Run

__all__ = ["ARCHIVES", "REJECTED", "WORK", "Build", "BuildError", "TooManyRejected", "build"]

REJECTED = "rejected.jsonl"


class TooManyRejected(BuildError):
    """More records were rejected than allowed.

    Attributes:
      reasons: reason -> (records, what is wrong with the first one).
      total: records read.
    """

    def __init__(self, reasons: Reasons, total: int, allowed: float, listed: Path):
        self.reasons, self.total = dict(reasons), total
        rejected = sum(count for count, _ in self.reasons.values())
        super().__init__(
            f"{rejected:,} of {total:,} records ({rejected / max(1, total):.1%}) cannot be used, more "
            f"than --max_bad_fraction={allowed:g}:\n{rejections.table(self.reasons)}\n"
            f"{listed} has them (at most {KEPT_EXAMPLES:,}). Correct the records or pictures, or raise "
            "--max_bad_fraction; then run the same command again"
        )


def build(
    build: Build, run: Run, *, max_bad_fraction: float = 0.01, progress: Progress | None = None
) -> dict[str, Any]:
    """Makes the store, or continues to make it.

    Args:
      run: `runners.Local` or `runners.Beam`.
      max_bad_fraction: up to this share of all records may be rejected; they are counted and left out.
      progress: shows a task for each stage. Its fields are `unit` (what the total counts) and `records`.

    Returns:
      the contents of `summary.json`.

    Raises:
      TooManyRejected: with the table of reasons.
      WorkError: the folder holds another build, or a finished one whose archives have changed; or a worker
        was killed.
      ReleaseError: the release is broken.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(restart.claim(build.work / "lock"))
        if build.target:
            held.enter_context(restart.claim(build.target / "lock"))
        build.start()
        if build.finished:
            build.check_archives()
        else:
            _build(build, run, max_bad_fraction, progress or Progress(disable=True))
        shutil.rmtree(build.work)
        return read_json(build.out / SUMMARY)


def _build(build: Build, run: Run, max_bad_fraction: float, progress: Progress) -> None:
    records, pictures = Records(build), Pictures(build)
    task = progress.add_task("listing archives", total=None, unit="members")
    build.pictures().index(lambda count: progress.advance(task, count))
    progress.update(task, total=progress.tasks[task].completed)
    build.forget_other_archives()
    for _ in run(records.parse, records.split(progress)):
        pass
    _check(build, {}, max_bad_fraction)
    shards = pictures.plan()
    task = progress.add_task("storing pictures", total=shards, unit="shards")
    faults, checked = 0, max_bad_fraction * build.total
    for shard in run(pictures.store, range(shards)):
        progress.advance(task)
        faults += pictures.num_faults(shard)
        # Only to stop early. It reads all parsed records, so it is not done at every fault.
        if faults > checked:
            _check(build, pictures.faults(), max_bad_fraction)
            checked = 2 * faults
    reasons = _check(build, pictures.faults(), max_bad_fraction)
    task = progress.add_task("storing records", total=build.chunks, unit="shards")
    for _ in run(records.store, range(build.chunks)):
        progress.advance(task)
    _finish(build, shards, reasons)


def _check(build: Build, faults: Mapping[str, tuple[str, str]], allowed: float) -> Reasons:
    """Writes the rejected records and returns their number by reason.

    Args:
      faults: see `Pictures.faults`.

    Raises:
      TooManyRejected: what was made from the records and pictures at fault is removed first.
    """
    records, pictures, total = Records(build), Pictures(build), build.total
    reasons = records.rejected(faults)
    partial = partial_path(build.out / REJECTED)
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(example) + "\n" for example in records.examples(faults))
    os.replace(partial, build.out / REJECTED)
    if sum(count for count, _ in reasons.values()) <= allowed * total:
        return reasons
    if build.own:  # pictures are known by their bytes, and these will change
        build.forget_all_but_raw()
        raise TooManyRejected(reasons, total, allowed, build.out / REJECTED)
    pictures.forget_faults()
    shutil.rmtree(build.work / RECORDS.name, ignore_errors=True)
    if not pictures.planned:
        records.forget_rejected()
    raise TooManyRejected(reasons, total, allowed, build.out / REJECTED)


def _finish(build: Build, shards: int, reasons: Reasons) -> None:
    """Puts the shards in their places and describes them."""
    chunks, images = RECORDS.summaries(build, build.chunks), IMAGES.summaries(build, shards)
    files: dict[str, Any] = {}
    placed_records = RECORDS.place(build, build.chunks, files)
    placed_images = IMAGES.place(build, shards, files)
    summary = {
        "plan": build.as_plan(),
        "total": build.total,
        "kept": sum(chunk["count"] for chunk in chunks),
        "rejected": reasons,
        "languages_identified": sum(chunk["identified"] for chunk in chunks),
        "languages_undetermined": sum(chunk["undetermined"] for chunk in chunks),
        "notes": Records(build).notes(),
        "pictures": sum(shard["count"] for shard in images),
        "picture_bytes": sum(shard["num_bytes"] for shard in images),
    }
    write_json(build.out / SUMMARY, summary)
    manifest = {
        "format": store.FORMAT_VERSION,
        "name": NAME,
        "build": f"python launch/build_data.py {'own' if build.own else NAME} --source={build.source}",
        "orientation": build.orientation,
        "records": {SPLIT: placed_records},
        "images": {COLLECTION: placed_images} if placed_images else {},
        "files": dict(sorted(files.items())),
    }
    if build.target:
        _upload(build)
        write_store.write_manifest(build.target, manifest)
        paths.remove_tree(build.target / WORK)
    write_store.write_manifest(build.out, manifest)


def _upload(build: Build) -> None:
    """Copies what is small to the bucket."""
    for name in paths.sizes(build.out):
        is_shard = ".array_record" in name
        if name not in (ARCHIVES, store.MANIFEST) and not is_shard and name.split("/")[0] != WORK:
            (build.target / name).write_bytes((build.out / name).read_bytes())
