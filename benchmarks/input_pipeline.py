"""How fast records become batches, how full the rows are, and how much memory that takes.

    python -m benchmarks.input_pipeline --store=DIR --tokenizer=DIR [--workers=1] [--seconds=60]

Three parts, or one of them with --only=speed|packing|memory:

    speed     examples/s of `pangea_jax.data.pipeline` against torch's DataLoader with transformers'
              LlavaNextProcessor: the same records, order and worker processes, one run. The peer makes float32
              pixel values of a padded batch of 4; ours makes packed rows of uint8 tiles, which are normalised on
              the device.
    packing   share of the token slots in use at T = 8192 and 4096 on the length distribution of the records, against
              length-grouped padding (the sampler of LLaVA-NeXT, which groups by number of words).
    memory    resident memory of this process and its workers over 10,000 examples.

--store is a store as `launch/build_data.py pangeains` makes it, repeated as often as the time allows. Without it
pictures and texts are generated: JPEG photographs of smooth noise between 300 and 1,200 pixels a side.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from configs import pangea_7b_finetune
from pangea_jax.data import pipeline
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.packing import plan_rows
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.data.store import RecordStore
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import PINPOINTS
from pangea_jax.sample import emoji

TILE, GRID = 336, 24
PEER_BATCH = 4
_TURNS = 4
# As Pangea is fine-tuned, in batches that a laptop holds.
FEED = pipeline.PipelineConfig(
    **{**pangea_7b_finetune.get_config().pipeline, "rows": 2, "row_tiles": 20, "threads": 1}
)


class Repeated:
    """Some records again and again, up to `length`."""

    def __init__(self, source, length: int):
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Conversation:
        if not 0 <= i < self._length:
            raise IndexError(i)
        return self._source[i % len(self._source)]


def generated_store(directory: Path) -> RecordStore:
    """64 photographs of smooth noise with an answer of 40 to 400 words each."""
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


def repeated_sizes(sizes: np.ndarray, length: int) -> np.ndarray:
    return np.resize(sizes, (length, 3))


def make_feed(source, views, tokenizer, sizes, length, config):
    return pipeline.train_dataset(
        Repeated(source, length),
        tokenizer,
        views,
        config,
        seed=0,
        sizes=repeated_sizes(sizes, length),
    )


class Meter:
    """Examples/s and CPU time of an iterator, over several turns."""

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
        return (
            f"{self.rate:.1f} examples/s, {1e3 * self.cpu / self.examples:.0f} ms of CPU each in this "
            "process"
        )


class PeerData:
    """Records as torch's DataLoader wants them: read in the worker, in the order of ours."""

    def __init__(self, source, store, length):
        self._source, self._store = Repeated(source, length), store

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
    """Texts and pictures to what LlavaNextForConditionalGeneration takes."""

    def __init__(self, tokenizer_folder: str):
        self._folder, self._processor = tokenizer_folder, None

    def __call__(self, items):
        if self._processor is None:
            import torch

            torch.set_num_threads(1)
            self._processor = peer_processor(self._folder)
        texts, pictures = zip(*items, strict=True)
        flat = [picture for some in pictures for picture in some]
        return self._processor(
            text=list(texts), images=flat or None, padding=True, return_tensors="pt"
        )


def peer_processor(folder: str):
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    # As saved with Pangea-7B-hf: canvases as (height, width), crops of 336.
    images = transformers.LlavaNextImageProcessor(
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def speed(source, store, views, tokenizer, sizes, args, console) -> None:
    """Both in turns, so that what else the machine does falls on both alike."""
    config = dataclasses.replace(FEED, workers=args.workers)
    feed = make_feed(source, views, tokenizer, sizes, 500_000, config)
    with contextlib.closing(iter(feed)) as data:
        mine = Meter(data, lambda batch: int(batch["segment_ids"].max(axis=1).sum()))
        theirs = args.tokenizer and Meter(iter(peer(source, store, args)), lambda _: PEER_BATCH)
        for _ in range(_TURNS):
            mine.turn(args.seconds / _TURNS)
            if theirs:
                theirs.turn(args.seconds / _TURNS)
    console.print(f"pangea_jax, {args.workers} workers: {mine}")
    if theirs:
        console.print(f"DataLoader + LlavaNextProcessor, {args.workers} workers: {theirs}")
        console.print(f"ratio {mine.rate / theirs.rate:.2f}")


def peer(source, store, args):
    """torch's DataLoader over the same records."""
    import torch

    return torch.utils.data.DataLoader(
        PeerData(source, store, 500_000),
        batch_size=PEER_BATCH,
        num_workers=args.workers,
        collate_fn=Collate(args.tokenizer),
        multiprocessing_context="spawn" if args.workers else None,
    )


def stages(source, store, views, tokenizer) -> dict[str, float]:
    """Milliseconds an example of what reading consists of, one after the other."""
    from pangea_jax import anyres
    from pangea_jax.data import image

    count = min(len(source), 135)
    spent = dict.fromkeys(("read record", "read picture", "decode", "tiles", "words"), 0.0)

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        spent[name] += (time.perf_counter() - start) / count * 1e3
        return result

    for i in range(count):
        record = timed("read record", lambda i=i: source[i])
        for key in record.images:
            encoded = timed("read picture", lambda key=key: store.image(key))
            picture = timed("decode", lambda e=encoded: image.decode(e))
            timed("tiles", lambda p=picture: image.views(p, PINPOINTS, TILE))
            anyres.layout(picture.size, PINPOINTS, TILE, GRID)
        timed("words", lambda r=record: pipeline.measure([r], tokenizer, views, FEED))
    return spent


def grouped_padding(sizes, words, has_picture, per_device: int = 2, world: int = 64) -> float:
    """Share of slots in use when batches of similar length are padded to their longest.

    Batches are made as LLaVA-NeXT's sampler does: pictured and text-only apart, shuffled, cut into
    megabatches of per_device * world, each sorted by number of words.
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
    """Share of slots in use by Grain's best-fit packer, on lengths alone."""
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
    """Upper bound on the share of slots any packing can use (Martello and Toth's bound L2 on rows)."""
    rows = tokens.sum() / row_tokens
    for small in range(0, row_tokens // 2, 16):
        alone = np.count_nonzero(tokens > row_tokens - small)
        large = tokens[(tokens > row_tokens / 2) & (tokens <= row_tokens - small)]
        rest = tokens[(tokens <= row_tokens / 2) & (tokens >= small)].sum()
        left = len(large) * row_tokens - large.sum()
        rows = max(rows, alone + len(large) + max(0, math.ceil((rest - left) / row_tokens)))
    return tokens.sum() / (rows * row_tokens)


def packing(source, views, tokenizer, console) -> None:
    count = len(source)
    words = np.array(
        [sum(len(turn.text.split()) for turn in source[i].turns) for i in range(count)]
    )
    has_picture = np.array([bool(source[i].images) for i in range(count)])
    table = Table(title="share of token slots in use")
    for name in (
        "T",
        "planned",
        "best_fit, 64 bins",
        "length-grouped padding",
        "no packing can beat",
    ):
        table.add_column(name, justify="right")
    for row_tokens in (8192, 4096):
        config = dataclasses.replace(FEED, row_tokens=row_tokens, row_tiles=row_tokens // 400)
        sizes = pipeline.measure(source, tokenizer, views, config)
        many = repeated_sizes(sizes, max(20_000, count))
        plan = plan_rows(many, config.capacity, seed=0, window=config.packing_window)
        repeat = np.resize(np.arange(count), len(many))
        table.add_row(
            str(row_tokens),
            f"{many[:, 0].sum() / (len(plan) * row_tokens):.2%}",
            f"{streamed_fill(many, config.capacity, 64):.2%}",
            f"{grouped_padding(many, words[repeat], has_picture[repeat]):.2%}",
            f"{best_possible(many[:, 0], row_tokens):.2%}",
        )
    console.print(table)


def memory(source, views, tokenizer, sizes, workers, console, examples: int) -> None:
    """Resident memory while `examples` go by."""
    config = dataclasses.replace(FEED, workers=workers)
    feed = make_feed(source, views, tokenizer, sizes, 4 * examples, config)
    table = Table(title=f"resident memory, MiB, {workers} workers")
    for name in ("examples", "this process", "each worker"):
        table.add_column(name, justify="right")
    me, done, shown = psutil.Process(), 0, 0
    with contextlib.closing(iter(feed)) as data:
        while done < examples:
            done += int(next(data)["segment_ids"].max(axis=1).sum())
            if done >= shown:
                readers = [p for p in me.children() if "spawn_main" in " ".join(p.cmdline())]
                mib = [p.memory_info().rss // 2**20 for p in (me, *readers)]
                table.add_row(str(done), str(mib[0]), " ".join(map(str, mib[1:])) or "-")
                shown += examples // 10
    console.print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, help="folder of a prepared store")
    parser.add_argument("--tokenizer", help="folder with a tokenizer.json of the Qwen family")
    parser.add_argument("--image_id", type=int, help="id of <image> where the file has none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--examples", type=int, default=10_000, help="for the memory part")
    parser.add_argument("--only", choices=("speed", "packing", "memory"))
    args = parser.parse_args()
    console = Console()
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(args.store) if args.store else generated_store(Path(folder))
        tokenizer = load_tokenizer(args.tokenizer or emoji.DIRECTORY, args.image_id)
        source = pipeline.RowSource(store, np.arange(len(store.index)))
        views = pipeline.Views(store, PINPOINTS, TILE, GRID, background=None)
        sizes = pipeline.measure(source, tokenizer, views, FEED)
        console.print(
            f"{len(source)} records {'of ' + str(args.store.name) if args.store else 'generated'}: "
            f"{sizes[:, 0].mean():.0f} tokens and {sizes[:, 1].mean():.2f} tiles on average"
        )
        if args.only in (None, "packing"):
            packing(source, views, tokenizer, console)
        if args.only in (None, "speed"):
            console.print(
                json.dumps(
                    {k: round(v, 2) for k, v in stages(source, store, views, tokenizer).items()}
                )
            )
            speed(source, store, views, tokenizer, sizes, args, console)
        if args.only in (None, "memory"):
            memory(source, views, tokenizer, sizes, args.workers, console, args.examples)


if __name__ == "__main__":
    main()
