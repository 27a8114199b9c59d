"""Builds the data sets of the project in their prepared form.

python launch/build_data.py emoji                       # rebuild the embedded sample in place
python launch/build_data.py emoji --out=/data/emoji --packages=/data/npm
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pangea_jax.data import emoji, emoji_licences, emoji_sources, vocabulary
from pangea_jax.data.emoji import Concept
from pangea_jax.data.emoji_sources import ARTISTS, Annotations, Artwork
from pangea_jax.data.store import RecordStore
from pangea_jax.data.write_store import Picture, write_store

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
    return parser.parse_args(argv)


def build_emoji(arguments: argparse.Namespace) -> None:
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="emoji-packages-") as scratch:
        packages = arguments.packages or Path(scratch)
        if arguments.packages is None:
            with console.status("downloading six packages with npm pack"):
                emoji_sources.fetch(packages)
        artworks = {artist.id: Artwork(artist, packages) for artist in ARTISTS}
        annotations = Annotations(packages)
        concepts = emoji_sources.select_concepts(annotations, artworks)
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
    emoji_licences.write(out, annotations.licence)
    summarise(out, concepts)


def draw(concepts: list[Concept], artworks: dict[str, Artwork]) -> dict[str, list[Picture]]:
    """Renders every drawing there is: artist -> pictures ordered by code point."""
    noto = artworks["noto"]
    pictures: dict[str, list[Picture]] = {}
    for artist, artwork in artworks.items():
        pictures[artist] = []
        for concept in track(concepts, f"drawing {artist:9}", console=console):
            name = artwork.icon(concept.codepoint, noto.name_of_codepoint[concept.codepoint])
            if name is None:
                continue
            encoded = emoji_sources.encode(emoji_sources.rasterise(artwork.svg(name)))
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
    except (emoji_sources.SourceError, OSError) as error:
        sys.exit(f"build_data.py: {error}")


if __name__ == "__main__":
    main()
