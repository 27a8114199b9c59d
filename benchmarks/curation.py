"""Measures the speed of the filters of image/alt-text pairs, and time and memory of finding near-duplicates.

    python -m benchmarks.curation [--only=filters|pictures|texts|overlap] [--rows=20000] [--hashes=1000000]

    filters    rows per second on one core through the rules of `curation.filters.Filters`, from Parquet as LAION has it
               (addresses) and from a tar file as img2dataset writes it (JPEGs of 512 pixels); then the same with every
               picture decoded and hashed, which is not part of the rules.
    pictures   a million perceptual hashes, of which 5 % are near others: `near_duplicates.unlike_earlier_pictures`.
    texts      a million alt texts, of which 5 % are near others: `near_duplicates.unlike_earlier_texts`. --peer runs a
               tenth of them through the indexes of rensa and datasketch.
    overlap    characters per second on one core that are compared with a benchmark of a million words.

Every part runs in its own process. Memory is the peak of that process; the memory at its start is in brackets. Rates
are per second of processor time, so a busy machine does not change them.
"""

import io
import json
import multiprocessing
import random
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from pangea_jax.curation import contamination, image_text, near_duplicates
from pangea_jax.curation.accounting import Passed
from pangea_jax.curation.cultural import FilterPairs
from pangea_jax.curation.filters import Filters

NEAR_SHARE, PICTURES = 0.05, 1_000
PEER_SHARE = 0.1
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Clock:
    """Processor seconds and peak memory of the `with` body."""

    def __enter__(self) -> "Clock":
        self.before = _peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self.peak = _peak()


def _peak() -> float:
    """GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def words(luck: random.Random, count: int) -> list[str]:
    return ["".join(luck.choices(_LETTERS, k=luck.randrange(3, 10))) for _ in range(count)]


def filters(rows: int) -> list[tuple[str, ...]]:
    luck, lines = random.Random(0), []
    vocabulary = words(luck, 20_000)
    blocked = frozenset(luck.sample(vocabulary, 300)) | {"two words", "three words more"}
    rules = Filters(languages=("es", "id"), blocked=blocked)
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "laion.parquet"), Path(folder, "00000.tar")
        write_parquet(paths[0], luck, vocabulary, rows)
        write_tar(paths[1], luck, vocabulary, rows)
        for path, name in zip(paths, ("Parquet, addresses", "tar, JPEG"), strict=True):
            with Clock() as clock:
                total = passed = 0
                for part in image_text.find_parts(path):
                    for pair in image_text.read(part):
                        total += 1
                        passed += rules.reason(pair) is None
            lines.append(line(f"rules, {name}", total, "rows", clock, f"{passed / total:.0%} pass"))
        with Clock() as clock:
            read = FilterPairs(Path(folder), rules)
            outcomes = [
                o for part in image_text.find_parts(paths[1]) for o in read([part._asdict()])
            ]
        kept = sum(isinstance(o, Passed) for o in outcomes)
        lines.append(line("tar, all of the part", rows, "rows", clock, f"{kept:,} decoded, hashed"))
    return lines


def alt_text(luck: random.Random, vocabulary: list[str]) -> str:
    return " ".join(luck.choices(vocabulary, k=luck.randrange(4, 25)))


def write_parquet(path: Path, luck: random.Random, vocabulary: list[str], rows: int) -> None:
    """Rows of LAION's metadata. Most pass the rules."""
    table = {
        "SAMPLE_ID": [float(n) for n in range(rows)],
        "URL": [f"https://pictures.example/{n}.jpg" for n in range(rows)],
        "TEXT": [alt_text(luck, vocabulary) for _ in range(rows)],
        "WIDTH": [luck.randrange(150, 1200) for _ in range(rows)],
        "HEIGHT": [luck.randrange(150, 1200) for _ in range(rows)],
        "LANGUAGE": [luck.choice(["es", "id"]) for _ in range(rows)],
        "NSFW": [luck.choice(["UNLIKELY"] * 9 + ["UNSURE"]) for _ in range(rows)],
        "similarity": [luck.uniform(0.2, 0.4) for _ in range(rows)],
    }
    pq.write_table(pa.table(table), path, row_group_size=8192)


def write_tar(path: Path, luck: random.Random, vocabulary: list[str], rows: int) -> None:
    bodies = [jpeg(n) for n in range(PICTURES)]
    with tarfile.open(path, "w") as tar:
        for n in range(rows):
            stated = {"key": f"{n:09d}", "language": "es", "nsfw": "UNLIKELY", "similarity": 0.35}
            files = {
                "jpg": bodies[n % PICTURES],
                "json": json.dumps(stated).encode(),
                "txt": alt_text(luck, vocabulary).encode(),
            }
            for suffix, data in files.items():
                entry = tarfile.TarInfo(f"{n:09d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def jpeg(seed: int) -> bytes:
    """Like a photograph that img2dataset has resized: smooth noise, 512 pixels on the longer side, some 40 kB."""
    noise = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    picture = Image.fromarray(noise).resize((512, 341), Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pictures(count: int) -> list[tuple[str, ...]]:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    near = int(NEAR_SHARE * count)
    flips = np.uint64(1) << random.integers(0, 64, (2, near), dtype=np.uint64)
    hashes[-near:] = hashes[:near] ^ flips[0] ^ flips[1]
    with Clock() as clock:
        stays = near_duplicates.unlike_earlier_pictures(hashes)
    assert stays[:-near].all() and not stays[-near:].any()
    return [line("pictures, ours", count, "hashes", clock, f"{near:,} of {near:,} near ones found")]


def texts(count: int) -> list[tuple[str, ...]]:
    with Clock() as clock:
        new = near_duplicates.unlike_earlier_texts(_texts(count))
    return [line("texts, ours", count, "texts", clock, _found(new.tolist()))]


def rensa(count: int) -> list[tuple[str, ...]]:
    from rensa import RMinHashDeduplicator  # optional, as datasketch below

    with Clock() as clock:
        index = RMinHashDeduplicator(near_duplicates.MIN_TEXT_SIMILARITY, 128, True)
        pairs = ((str(n), near_duplicates.shingles(text)) for n, text in enumerate(_texts(count)))
        new = [index.add_pairs([pair])[0] for pair in pairs]
    return [line("texts, rensa's index", count, "texts", clock, _found(new))]


def _texts(count: int):
    luck = random.Random(0)
    vocabulary, near = words(luck, 50_000), int(NEAR_SHARE * count)
    first = []
    for n in range(count - near):
        text = " ".join(luck.choices(vocabulary, k=12))
        if n < near:
            first.append(text)
        yield text
    yield from (f"{text} {luck.choice(_LETTERS)}" for text in first)


def _found(new: list[bool]) -> str:
    near = int(NEAR_SHARE * len(new))
    wrong = len(new) - near - sum(new[:-near])
    return f"{near - sum(new[-near:]):,} of {near:,} near ones found, {wrong:,} others dropped"


def datasketch(count: int) -> list[tuple[str, ...]]:
    from datasketch import MinHash, MinHashLSH

    with Clock() as clock:
        index, new = MinHashLSH(near_duplicates.MIN_TEXT_SIMILARITY, 128), []
        for n, text in enumerate(_texts(count)):
            sketch = MinHash(128)
            sketch.update_batch([s.encode() for s in near_duplicates.shingles(text)])
            new.append(not index.query(sketch))
            if new[-1]:
                index.insert(n, sketch)
    return [line("texts, datasketch's index", count, "texts", clock, _found(new))]


def overlap(count: int) -> list[tuple[str, ...]]:
    luck = random.Random(0)
    vocabulary = words(luck, 30_000)
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, "x.jsonl").open("w") as file:
            for n in range(count // 40):
                row = {"id": str(n), "text": " ".join(luck.choices(vocabulary, k=40))}
                file.write(json.dumps(row) + "\n")
        with Clock() as clock:
            benchmarks = contamination.Benchmarks.read([Path(folder)])
    lines = [line("reading the benchmark", count, "words", clock, "")]
    conversations = [" ".join(luck.choices(vocabulary, k=250)) for _ in range(2_000)]
    with Clock() as clock:
        found = sum(bool(benchmarks.in_texts([text])) for text in conversations)
    characters = sum(map(len, conversations))
    return [*lines, line("comparing texts", characters, "characters", clock, f"{found} overlap")]


def line(name: str, count: int, unit: str, clock: Clock, note: str) -> tuple[str, ...]:
    rate = f"{count / clock.cpu:,.0f} {unit}/s"
    memory = f"{clock.peak:.2f} GiB (from {clock.before:.2f})"
    return name, f"{count:,} {unit}", rate, f"{clock.wall:,.1f} s", memory, note


def main() -> None:
    from benchmarks import peer  # imports JAX, whose memory would count in every part

    parser = peer.parser(__doc__)
    parts = {"filters": filters, "pictures": pictures, "texts": texts, "overlap": overlap}
    parser.add_argument("--only", choices=parts, help="one part alone")
    parser.add_argument("--rows", type=int, default=20_000, help="rows for the filters")
    parser.add_argument("--hashes", type=int, default=1_000_000, help="hashes, texts, words")
    parser.add_argument("--peer", action="store_true", help="the libraries' own indexes, too")
    arguments = parser.parse_args()
    console = Console(width=max(140, Console().width), soft_wrap=True)
    console.print(peer.machine())
    table = Table("part", "of", "per processor second", "wall", "peak memory", "")
    # Not forked, because the peak of a forked process begins at the peak of its parent.
    context = multiprocessing.get_context("spawn")
    work = [(parts[name], arguments.hashes) for name in parts if arguments.only in (None, name)]
    work = [(part, arguments.rows if part is filters else count) for part, count in work]
    if arguments.peer:
        work += [(part, int(PEER_SHARE * arguments.hashes)) for part in (rensa, datasketch)]
    for part, count in work:
        with context.Pool(1) as pool:
            for row in pool.apply(part, (count,)):
                table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
