"""Builds the data sets of the project in their prepared form.

python launch/build_data.py emoji                       # rebuild the embedded sample in place
python launch/build_data.py emoji --out=/data/emoji --packages=/data/npm
python launch/build_data.py pangeains --source=/data/PangeaInstruct --out=/data/pangeains --tokenizer=/data/Pangea-7B-hf
"""

import argparse
import os
import sqlite3
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table
from rich.text import Text

from pangea_jax import languages
from pangea_jax.data import image
from pangea_jax.data.build import pangeains, rejections
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.store import INDEX, RecordStore
from pangea_jax.figures import composition
from pangea_jax.sample import emoji, licences, sources, vocabulary
from pangea_jax.sample.emoji import Concept
from pangea_jax.sample.sources import ARTISTS, Annotations, Artwork
from pangea_jax.work import runners
from pangea_jax.work.restart import WorkError

console = Console()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser(
        "emoji",
        help="the embedded sample: emoji artwork and its names in 38 languages",
        description="Builds the embedded sample: drawings of five artists, their Unicode CLDR "
        "names in 38 languages, the records made of them and the vocabulary. About half a minute.",
    )
    sample.add_argument(
        "--out", type=Path, default=emoji.DIRECTORY, help="where to write (default: the package)"
    )
    sample.add_argument(
        "--packages",
        type=Path,
        help="folder of already downloaded npm archives (.tgz); default: download with npm pack",
    )
    sample.set_defaults(run=build_emoji)
    add_pangeains(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "runner", None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.pipeline_options = rest
    return arguments


def add_pangeains(commands) -> None:
    real = commands.add_parser(
        "pangeains",
        help="PangeaIns as it is released, or any records in its form",
        description="Makes a store of PangeaIns.json (or *.jsonl, *.parquet) and its pictures, read from "
        "folders, tar files (split ones too) and zip files. If it is killed, the same command continues.",
    )
    add = real.add_argument
    add("--source", type=Path, required=True, help="folder of the release, or a file of records")
    add("--out", type=Path, required=True, help="folder of the store")
    add("--images", type=Path, help="folder of the pictures (default: that of the records)")
    add("--workers", type=positive, default=os.cpu_count(), help="processes (default: one a core)")
    add("--tokenizer", type=Path, help="tokenizer.json, .model or their folder: counts tokens")
    add("--image_id", type=int, help="id of <image> if the tokenizer has none (Pangea: 151646)")
    add(
        "--default_language",
        type=language_code,
        help="language of records without one (default: identified from their words)",
    )
    add(
        "--max_bad_fraction",
        type=fraction,
        default=0.01,
        help="stop if a larger share of the records cannot be used (default: 0.01)",
    )
    add(
        "--limit", type=positive, help="number of records to read, from the first on (default: all)"
    )
    add("--max_pixels", type=positive, default=image.MAX_PIXELS, help="reject larger pictures")
    add(
        "--runner",
        help="run as an Apache Beam pipeline (DirectRunner, DataflowRunner, FlinkRunner, ...); further "
        "flags are its pipeline options",
    )
    real.set_defaults(run=build_pangeains)


def language_code(tag: str) -> str:
    try:
        return languages.get(tag).code
    except KeyError as error:
        raise argparse.ArgumentTypeError(error.args[0]) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to 1, got {text!r}")
    return float(text)


class Amount(ProgressColumn):
    """How much of a stage is done, and the number of records per second."""

    def render(self, task: Task) -> Text:
        unit, parts = task.fields["unit"], []
        if unit == "bytes":
            parts.append(f"{task.completed / 1e6:,.1f} of {task.total / 1e6:,.1f} MB")
        elif unit == "members":
            parts.append(f"{task.completed:,.0f} members")
        else:
            parts.append(f"{task.completed:,.0f} of {task.total:,.0f} {unit}")
        if records := task.fields.get("records"):
            parts.append(f"{records:,} records, {records / max(task.elapsed or 0, 1e-3):,.0f}/s")
        return Text(", ".join(parts))


def progress_bar() -> Progress:
    """A line for each stage of `pangeains.build`: progress, records per second, remaining time."""
    return Progress(
        TextColumn("{task.description:18}"),
        BarColumn(),
        TaskProgressColumn(),
        Amount(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def build_pangeains(arguments: argparse.Namespace) -> None:
    build = pangeains.Build(
        source=arguments.source,
        out=arguments.out,
        images=arguments.images,
        tokenizer=arguments.tokenizer,
        image_id=arguments.image_id,
        default_language=arguments.default_language,
        limit=arguments.limit,
        max_pixels=arguments.max_pixels,
    )
    allowed = arguments.max_bad_fraction
    with progress_bar() as bar:
        if arguments.runner:
            options = [f"--runner={arguments.runner}", *arguments.pipeline_options]
            run = runners.Beam(options)
            summary = pangeains.build(build, run, max_bad_fraction=allowed, progress=bar)
        else:
            with runners.Local(arguments.workers) as run:
                summary = pangeains.build(build, run, max_bad_fraction=allowed, progress=bar)
    columns = ["category", "source", "language"]
    index = pq.read_table(build.out / INDEX, columns=columns)
    report = composition.write(index, build.out / "report", summary)
    # Without the console, which wraps lines and may read parts of a path as markup.
    print(
        f"{summary['kept']:,} of {summary['total']:,} records, {summary['pictures']:,} pictures, "
        f"{summary['picture_bytes'] / 1e9:,.2f} GB in {build.out}"
    )
    if summary["rejected"]:
        print(f"dropped (the first of them: {build.out / pangeains.REJECTED}):")
        print(rejections.table(summary["rejected"]))
    print(f"report: {report}")


def build_emoji(arguments: argparse.Namespace) -> None:
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="emoji-packages-") as scratch:
        packages = arguments.packages or Path(scratch)
        if arguments.packages is None:
            with console.status("downloading six packages with npm pack"):
                sources.fetch(packages)
        artworks = {artist.id: Artwork(artist, packages) for artist in ARTISTS}
        annotations = Annotations(packages)
        concepts = sources.select_concepts(annotations, artworks)
        pictures = draw(concepts, artworks)

    (out / emoji.CONCEPTS).write_text(emoji.dump_concepts(concepts), encoding="utf-8")
    with console.status("training the vocabulary"):
        (out / emoji.TOKENIZER).write_bytes(vocabulary.train(concepts))
    drawings = {picture.key for some in pictures.values() for picture in some}
    splits = dict.fromkeys(emoji.SPLIT_OF_ARTIST.values())
    with console.status("writing records and drawings"):
        write_store(
            out,
            name="emoji",
            build="python launch/build_data.py emoji",
            records={split: emoji.split_records(split, concepts, drawings) for split in splits},
            images=pictures,
            columns=emoji.INDEX_COLUMNS,
            extra_files=[out / emoji.CONCEPTS, out / emoji.TOKENIZER],
        )
    licences.write(out, annotations.licence)
    summarise(out, concepts)


def draw(concepts: list[Concept], artworks: dict[str, Artwork]) -> dict[str, list[Picture]]:
    """Renders all drawings: artist -> pictures ordered by code point."""
    noto = artworks["noto"]
    pictures: dict[str, list[Picture]] = {}
    for artist, artwork in artworks.items():
        pictures[artist] = []
        for concept in track(concepts, f"drawing {artist:9}", console=console):
            name = artwork.icon(concept.codepoint, noto.name_of_codepoint[concept.codepoint])
            if name is None:
                continue
            encoded = sources.encode(sources.rasterise(artwork.svg(name)))
            key = emoji.image_key(artist, concept.codepoint)
            pictures[artist].append(Picture(key, encoded, emoji.SIZE, emoji.SIZE))
    return pictures


def summarise(out: Path, concepts: list[Concept]) -> None:
    store = RecordStore(out)
    store.verify()
    table = Table("part", "entries", "KiB", title=f"{len(concepts)} concepts in {out}")

    def add(part: str, entries: int, *paths: Path) -> None:
        files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path])]
        kib = sum(f.stat().st_size for f in files if f.is_file()) / 1024
        table.add_row(part, f"{entries:,}", f"{kib:,.0f}")

    for collection in store.collections:
        count = store.image_index["collection"].to_pylist().count(collection)
        add(f"drawings of {collection}", count, out / f"images_{collection}")
    for split in store.splits:
        shards = (out / "records").rglob(f"*-{split}.array_record*")
        add(f"records of {split}", len(store.records(split)), *shards)
    add("index", store.index.num_rows, out / "index.parquet", out / "images.parquet")
    add("concepts", len(concepts), out / emoji.CONCEPTS)
    add("vocabulary", vocabulary.SIZE, out / emoji.TOKENIZER)
    add("all", store.index.num_rows, out)
    console.print(table)


def main() -> None:
    arguments = parse_arguments()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        sys.exit("build_data.py: stopped; run the same command again to go on")
    except (sources.SourceError, WorkError, OSError, sqlite3.Error, ValueError) as error:
        sys.exit(f"build_data.py: {error}")


if __name__ == "__main__":
    main()
