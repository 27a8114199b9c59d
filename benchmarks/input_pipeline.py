"""Speed, packing and memory of the input pipeline.

    python -m benchmarks.input_pipeline --store=DIR --tokenizer=DIR [--workers=1] [--seconds=60]

It has three parts; --only=speed|packing|memory runs one of them:

    speed     examples/s of `pangea_jax.data.pipeline`, compared with torch's DataLoader and transformers'
              LlavaNextProcessor: the same records, order and number of workers, in one run. The peer makes float32
              pixel values in padded batches of 4. Ours makes packed rows of uint8 tiles, and the device normalises
              them.
    packing   share of the token slots in use with T = 8192 and 4096 for the lengths of the records, compared with
              length-grouped padding (the sampler of LLaVA-NeXT, which groups by number of words).
    memory    resident memory of this process and its workers over 10,000 examples.

--store is a store made by `launch/build_data.py pangeains`. Its records are repeated until the time is over. Without
--store, pictures and texts are generated: JPEG pictures of smooth noise with sides of 300 to 1,200 pixels. The peer
needs --tokenizer.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import peer
from configs import pangea_7b_finetune
from pangea_jax import anyres
from pangea_jax.data import image, pipeline
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.packing import plan_rows
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.experiment import Experiment, make_reader
from pangea_jax.model import PINPOINTS
from pangea_jax.sample import emoji
from pangea_jax.typed_config import build

TILE, GRID = 336, 24
PEER_BATCH, TURNS, MANY = 4, 4, 500_000
EXPERIMENT = build(Experiment, pangea_7b_finetune.get_config())
# The settings of Pangea's fine-tuning, with smaller batches for a laptop.
FEED = dataclasses.replace(EXPERIMENT.pipeline, rows=2, row_tiles=20, threads=1)


class Data:
    """The records and their reader. Only this class calls the data pipeline."""

    def __init__(self, store: RecordStore, tokenizer: Tokenizer):
        self.store = store
        self.source = self.repeated(len(store.index))
        self.reader = make_reader(EXPERIMENT, store, tokenizer)
        self.sizes = self.measure(self.source)

    def measure(self, records: Sequence[Conversation], config=FEED) -> np.ndarray:
        """Tokens, tiles and targets of each record [n, 3]."""
        return pipeline.measure(records, self.reader, config)

    def repeated(self, length: int) -> pipeline.RowSource:
        """The records, repeated up to `length`."""
        return pipeline.RowSource(self.store, np.arange(length) % len(self.store.index))

    def feed(self, length: int, workers: int):
        """Batches of `length` examples."""
        return pipeline.train_dataset(
            self.repeated(length),
            self.reader,
            dataclasses.replace(FEED, workers=workers),
            seed=0,
            sizes=np.resize(self.sizes, (length, 3)),
        )


def examples_in(batch) -> int:
    return int(batch.segment_ids.max(axis=1).sum())


def generated_store(directory: Path) -> RecordStore:
    """64 pictures of smooth noise, each with an answer of 40 to 400 words."""
    random = np.random.default_rng(0)
    words = ["picture", "shows", "a", "street", "with", "people", "und", "viele", "Bäume", "光"]
    sizes = [(int(w), int(h)) for w, h in random.integers(300, 1200, (64, 2))]

    def pictures():
        for i, size in enumerate(sizes):
            coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
            yield Picture(f"made/{i}", file.getvalue(), *size)

    def records():
        for i in range(len(sizes)):
            answer = " ".join(random.choice(words, int(random.integers(40, 400))))
            turns = (Turn("user", "<image>\nWhat do you see?"), Turn("assistant", answer))
            yield Conversation(f"r{i}", "made", "en", "", (f"made/{i}",), turns), {}

    build = "python -m benchmarks.input_pipeline"
    records, images = {"train": records()}, {"made": pictures()}
    write_store(directory, name="generated", build=build, records=records, images=images)
    return RecordStore(directory)


class Meter:
    """Measures examples/s and CPU time of an iterator in several turns."""

    def __init__(self, data, count):
        self._data, self._count = data, count
        self.examples = self.seconds = self.cpu = 0
        for _ in range(2):  # workers start, caches fill
            next(data)

    def turn(self, seconds: float) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            self.examples += self._count(next(self._data))
        self.seconds += time.perf_counter() - start
        self.cpu += time.process_time() - cpu

    @property
    def rate(self) -> float:
        return self.examples / self.seconds

    def __str__(self) -> str:
        cpu = 1e3 * self.cpu / self.examples
        return f"{self.rate:.1f} examples/s, {cpu:.0f} ms of CPU each in this process"


class PeerData:
    """A dataset for torch's DataLoader: the worker reads the same records in the same order."""

    def __init__(self, data: Data):
        self._source, self._store = data.repeated(MANY), data.store

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        record = self._source[i]
        pictures = [
            Image.open(io.BytesIO(self._store.image(key))).convert("RGB") for key in record.images
        ]
        messages = "".join(f"<|im_start|>{t.role}\n{t.text}<|im_end|>\n" for t in record.turns)
        return messages, pictures


class Collate:
    """Makes the inputs of LlavaNextForConditionalGeneration from texts and pictures."""

    def __init__(self, tokenizer_folder: str):
        self._folder = tokenizer_folder

    @functools.cached_property
    def _processor(self):
        """The processor of Pangea-7B-hf: canvases as (height, width), crops of 336. Each worker makes it."""
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        pictures = transformers.LlavaNextImageProcessor(
            image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
        )
        settings = dict(patch_size=14, vision_feature_select_strategy="default")
        return transformers.LlavaNextProcessor(
            pictures, tokenizer, num_additional_image_tokens=1, **settings
        )

    def __call__(self, items):
        texts, pictures = zip(*items, strict=True)
        flat = [picture for some in pictures for picture in some]
        return self._processor(
            text=list(texts), images=flat or None, padding=True, return_tensors="pt"
        )


def peer_feed(data: Data, tokenizer_folder: str, workers: int):
    """torch's DataLoader over the same records."""
    import torch

    return torch.utils.data.DataLoader(
        PeerData(data),
        batch_size=PEER_BATCH,
        num_workers=workers,
        collate_fn=Collate(tokenizer_folder),
        multiprocessing_context="spawn" if workers else None,
    )


def speed(data: Data, args, console) -> None:
    """Measures both sides in turns, so that other load on the machine slows both equally."""
    with contextlib.closing(iter(data.feed(MANY, args.workers))) as batches:
        meters = {"pangea_jax": Meter(batches, examples_in)}
        if args.tokenizer:
            theirs = iter(peer_feed(data, args.tokenizer, args.workers))
            meters["DataLoader + LlavaNextProcessor"] = Meter(theirs, lambda _: PEER_BATCH)
        for _ in range(TURNS):
            for meter in meters.values():
                meter.turn(args.seconds / TURNS)
    for name, meter in meters.items():
        console.print(f"{name}, {args.workers} workers: {meter}")
    if args.tokenizer:
        ours, theirs = meters.values()
        console.print(f"ratio {ours.rate / theirs.rate:.2f}")


def stages(data: Data) -> dict[str, float]:
    """Milliseconds per example in each stage of reading."""
    count = min(len(data.source), 135)
    spent = dict.fromkeys(("read record", "read picture", "decode", "tiles", "words"), 0.0)

    def timed(name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        spent[name] += (time.perf_counter() - start) / count * 1e3
        return result

    for i in range(count):
        record = timed("read record", data.source.__getitem__, i)
        for key in record.images:
            encoded = timed("read picture", data.store.image, key)
            picture = timed("decode", image.decode, encoded)
            timed("tiles", image.views, picture, PINPOINTS, TILE)
            anyres.layout(picture.size, PINPOINTS, TILE, GRID)
        timed("words", data.measure, [record])
    return spent


def grouped_padding(sizes, words, has_picture, per_device: int = 2, world: int = 64) -> float:
    """Share of slots in use when batches of similar length are padded to their longest example.

    LLaVA-NeXT's sampler makes the batches: it separates examples with and without pictures, shuffles them, cuts them
    into megabatches of per_device * world, and sorts each by number of words.
    """
    rng = np.random.default_rng(0)
    used = slots = 0
    for group in (np.flatnonzero(has_picture), np.flatnonzero(~has_picture)):
        order = rng.permutation(group)
        for start in range(0, len(order), per_device * world):
            mega = order[start : start + per_device * world]
            mega = mega[np.argsort(-words[mega], kind="stable")]
            for first in range(0, len(mega), per_device):
                tokens = sizes[mega[first : first + per_device], 0]
                used, slots = used + tokens.sum(), slots + tokens.max() * len(tokens)
    return used / slots


def streamed_fill(sizes, capacity, bins: int) -> float:
    """Share of slots in use with Grain's best-fit packer."""
    import grain

    names = ("tokens", "tiles")
    lengths = dict(zip(names, capacity, strict=False))
    stream = grain.MapDataset.source(range(len(sizes))).seed(0).shuffle()
    stream = stream.map(
        lambda i: {name: np.zeros(n, np.int8) for name, n in zip(names, sizes[i], strict=False)}
    ).to_iter_dataset(grain.ReadOptions(1, 64))
    rows = grain.experimental.BestFitPackIterDataset(
        stream, length_struct=lengths, num_packing_bins=bins
    )
    filled = [np.count_nonzero(row["tokens_segment_ids"]) for row in rows]
    return float(np.mean(filled)) / capacity[0]


def best_possible(tokens, row_tokens: int) -> float:
    """The largest share of slots that any packing can use (Martello and Toth's bound L2)."""
    rows = tokens.sum() / row_tokens
    for small in range(0, row_tokens // 2, 16):
        alone = np.count_nonzero(tokens > row_tokens - small)
        large = tokens[(tokens > row_tokens / 2) & (tokens <= row_tokens - small)]
        rest = tokens[(tokens <= row_tokens / 2) & (tokens >= small)].sum()
        left = len(large) * row_tokens - large.sum()
        rows = max(rows, alone + len(large) + max(0, math.ceil((rest - left) / row_tokens)))
    return tokens.sum() / (rows * row_tokens)


def packing(data: Data, console) -> None:
    """Prints the share of token slots in use for each row length and packing."""
    count = len(data.source)
    words = np.array(
        [sum(len(turn.text.split()) for turn in record.turns) for record in data.source]
    )
    has_picture = np.array([bool(record.images) for record in data.source])
    ways = ("planned", "best_fit, 64 bins", "length-grouped padding", "upper bound")
    table = Table("T", *ways, title="share of token slots in use")
    for row_tokens in (8192, 4096):
        config = dataclasses.replace(FEED, row_tokens=row_tokens, row_tiles=row_tokens // 400)
        sizes = data.measure(data.source, config)
        many = np.resize(sizes, (max(20_000, count), 3))
        plan = plan_rows(many, config.capacity, seed=0, window=config.packing_window)
        repeat = np.resize(np.arange(count), len(many))
        shares = (
            many[:, 0].sum() / (len(plan) * row_tokens),
            streamed_fill(many, config.capacity, 64),
            grouped_padding(many, words[repeat], has_picture[repeat]),
            best_possible(many[:, 0], row_tokens),
        )
        table.add_row(str(row_tokens), *(f"{share:.2%}" for share in shares))
    console.print(table)


def memory(data: Data, args, console) -> None:
    """Prints resident memory while `args.examples` are read."""
    title = f"resident memory, MiB, {args.workers} workers"
    table = Table("examples", "this process", "each worker", title=title)
    me, done, shown = psutil.Process(), 0, 0
    with contextlib.closing(iter(data.feed(4 * args.examples, args.workers))) as batches:
        while done < args.examples:
            done += examples_in(next(batches))
            if done >= shown:
                readers = [p for p in me.children() if "spawn_main" in " ".join(p.cmdline())]
                mib = [p.memory_info().rss // 2**20 for p in (me, *readers)]
                table.add_row(str(done), str(mib[0]), " ".join(map(str, mib[1:])) or "-")
                shown += args.examples // 10
    console.print(table)


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("--store", type=Path, help="folder of a prepared store")
    parser.add_argument("--tokenizer", help="folder with a tokenizer.json of the Qwen family")
    parser.add_argument("--image_id", type=int, help="id of <image>, if the file has none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--examples", type=int, default=10_000, help="for the memory part")
    parser.add_argument("--only", choices=("speed", "packing", "memory"))
    args = parser.parse_args()
    console = Console()
    console.print(peer.machine())
    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(args.store) if args.store else generated_store(Path(folder))
        data = Data(store, load_tokenizer(args.tokenizer or emoji.DIRECTORY, args.image_id))
        console.print(
            f"{len(data.source)} records {f'of {args.store.name}' if args.store else 'generated'}: "
            f"{data.sizes[:, 0].mean():.0f} tokens and {data.sizes[:, 1].mean():.2f} tiles on average"
        )
        if args.only in (None, "packing"):
            packing(data, console)
        if args.only in (None, "speed"):
            console.print(json.dumps({k: round(v, 2) for k, v in stages(data).items()}))
            speed(data, args, console)
        if args.only in (None, "memory"):
            memory(data, args, console)


if __name__ == "__main__":
    main()
