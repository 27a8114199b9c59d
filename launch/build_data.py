"""Builds the data sets of the project in their prepared form.

python launch/build_data.py emoji                       # rebuild the embedded sample in place
python launch/build_data.py emoji --out=/data/emoji --packages=/data/npm
python launch/build_data.py pangeains --source=/data/PangeaInstruct --out=/data/pangeains --tokenizer=/data/Pangea-7B-hf
python launch/build_data.py own --source=my_data --out=/data/mine --tokenizer=/data/Pangea-7B-hf
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
from pangea_jax.data.build import own_records, pangeains, rejections
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.store import IMAGE_INDEX, INDEX, RecordStore
from pangea_jax.figures import composition, inert
from pangea_jax.sample import emoji, licences, sources, vocabulary
from pangea_jax.sample.emoji import Concept
from pangea_jax.sample.sources import ARTISTS, Annotations, Artwork
from pangea_jax.work import mirror, paths, runners
from pangea_jax.work.restart import WorkError

console = inert.console()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser(
        "emoji",
        help="the embedded sample: emoji artwork and its names in 38 languages",
        description="Builds the embedded sample: drawings of five artists, their Unicode CLDR "
        "names and keywords in 38 languages, and the vocabulary. About half a minute.",
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
    add_builds(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "runner", None):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.pipeline_options = rest
    return arguments


def add_builds(commands) -> None:
    """`pangeains` and `own`: they differ in how pictures are known and seen."""
    pictures = (
        "Pictures are read from folders, tar files (split ones too) and zip files. If the command is "
        "killed, the same command continues."
    )
    release = commands.add_parser(
        "pangeains",
        help="PangeaIns as it is released, or records that refer to its pictures",
        description=f"Makes a store of PangeaIns.json and its pictures. {pictures}",
    )
    release.set_defaults(run=build_pangeains, own="", orientation="stored")
    own = commands.add_parser(
        "own",
        help="your own data: JSON, JSON lines, CSV, TSV, Parquet, a data set of `datasets`",
        description="Makes a store of your own records: LLaVA's or ShareGPT's JSON, OpenAI messages, tables of "
        f"questions and answers, a data set saved by `datasets` (docs/data.md, Your own data). {pictures}",
    )
    own.set_defaults(run=build_pangeains, orientation="upright")
    own.add_argument("--own", metavar="NAME", dest="own", type=name, default="own", help=OWN_HELP)
    for command in (release, own):
        add_build_flags(command)


OWN_HELP = "source of the records that name none, for reports (default: own)"


def add_build_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--source", type=Path, required=True, help="folder of the data, or a file of records")
    add("--out", type=address, required=True, help="folder of the store, also gs://...")
    add("--work", type=Path, help="with --out=gs://...: folder here for all that is not a shard")
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
        "--strict_language",
        action="store_true",
        help="reject records whose language is neither given nor identified (default: keep them as und)",
    )
    add(
        "--columns",
        type=column_names,
        default={},
        metavar="OURS=YOURS,...",
        help="names of your fields, such as image=path,question=q,answer=a "
        f"(ours: {', '.join(own_records.FIELDS)})",
    )
    add("--question", help="question of records that have only an answer, such as captions")
    add("--split", help="the split to take, if the source has several")
    add(
        "--unmarked",
        choices=own_records.UNMARKED,
        default=own_records.UNMARKED[0],
        help="pictures without <image> in the text: put them in front (default), or reject the record",
    )
    add(
        "--orientation",
        choices=image.ORIENTATIONS,
        help="upright turns pictures as their EXIF tag says, stored does not "
        "(default: own upright, pangeains stored)",
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
        "--follow_links",
        action="store_true",
        help="also read what symbolic links outside of the source lead to (default: refuse them)",
    )
    add(
        "--runner",
        help="run as an Apache Beam pipeline (DirectRunner, DataflowRunner, FlinkRunner, ...); further "
        "flags are its pipeline options",
    )


def address(text: str) -> Path:
    try:
        return paths.path(text)
    except paths.PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def name(text: str) -> str:
    if not text.strip("/ "):
        raise argparse.ArgumentTypeError("expected a name, got an empty text")
    return text.strip("/ ")


def column_names(text: str) -> dict[str, str]:
    """
    >>> column_names("image=path,answer=a")
    {'image': 'path', 'answer': 'a'}
    """
    found = {}
    for pair in text.split(","):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if ours not in own_records.FIELDS or not equals or not theirs:
            known = ", ".join(own_records.FIELDS)
            raise argparse.ArgumentTypeError(
                f"expected OURS=YOURS,..., OURS one of {known}, got {pair!r}"
            )
        found[ours] = theirs
    return found


def language_code(tag: str) -> str:
    if tag == languages.UNDETERMINED:
        return tag
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
            scale, name = (1e6, "MB") if task.total >= 1e6 else (1e3, "kB")
            parts.append(f"{task.completed / scale:,.1f} of {task.total / scale:,.1f} {name}")
        elif unit == "members":
            parts.append(f"{task.completed:,.0f} members")
        else:
            parts.append(f"{task.completed:,.0f} of {task.total:,.0f} {unit}")
        if records := task.fields.get("records"):
            speed = records / max(task.elapsed or 0, 1e-3)
            parts.append(f"{records:,} records, {speed:,.{0 if speed >= 10 else 1}f}/s")
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
    remote = paths.is_remote(arguments.out)
    if remote != bool(arguments.work):
        raise WorkError(
            f"--out={arguments.out} {'needs' if remote else 'takes no'} --work=DIR, a folder here for all that is not "
            "a shard"
        )
    build = pangeains.Build(
        source=arguments.source,
        out=arguments.work or arguments.out,
        target=arguments.out if remote else None,
        images=arguments.images,
        tokenizer=arguments.tokenizer,
        image_id=arguments.image_id,
        default_language=arguments.default_language,
        limit=arguments.limit,
        max_pixels=arguments.max_pixels,
        follow_links=arguments.follow_links,
        split=arguments.split,
        columns=arguments.columns,
        question=arguments.question,
        unmarked=arguments.unmarked,
        strict_language=arguments.strict_language,
        orientation=arguments.orientation,
        own=arguments.own,
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
    with mirror.mirrored(arguments.out / "report") as files:
        name = composition.write(index, files.folder, summary).name
    size = summary["picture_bytes"]
    size = f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    # Without the console, which wraps lines and may read parts of a path as markup.
    print(
        f"{summary['kept']:,} of {summary['total']:,} records, {summary['pictures']:,} pictures, "
        f"{size} in {arguments.out}"
    )
    if summary["rejected"]:
        print(f"dropped (listed in {build.out / pangeains.REJECTED}):")
        print(inert.visible(rejections.table(summary["rejected"])))
    if summary["languages_identified"] or summary["languages_undetermined"]:
        print(
            f"language identified from the words of {summary['languages_identified']:,} records, and of "
            f"{summary['languages_undetermined']:,} not (und); --default_language=TAG gives one instead"
        )
    for what, count in summary["notes"].items():
        print(inert.visible(f"{count:>10,}  {what}"))
    print(f"report: {arguments.out / 'report' / name}")


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

    emoji.save_concepts(concepts, out)
    with console.status("training the vocabulary"):
        (out / emoji.TOKENIZER).write_bytes(vocabulary.train(concepts))
    with console.status("writing drawings"):
        write_store(
            out,
            name="emoji",
            build="python launch/build_data.py emoji",
            records={},  # they are made when they are read
            images=pictures,
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
    add("index of drawings", store.image_index.num_rows, out / IMAGE_INDEX)
    add("concepts", len(concepts), out / emoji.CONCEPTS)
    add("vocabulary", vocabulary.SIZE, out / emoji.TOKENIZER)
    add("all", store.image_index.num_rows, out)
    console.print(table)


def main() -> None:
    arguments = parse_arguments()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        sys.exit("build_data.py: stopped; run the same command again to go on")
    except (sources.SourceError, WorkError, OSError, sqlite3.Error, ValueError) as error:
        sys.exit(f"build_data.py: {inert.visible(paths.say(error))}")


if __name__ == "__main__":
    main()
