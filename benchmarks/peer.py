"""The same random model here and in transformers, the same inputs, and both timed in turn."""

import argparse
import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from pangea_jax import anyres, checkpoints
from pangea_jax.checkpoints import SpecialTokens
from pangea_jax.model import LanguageConfig, Pangea, PangeaConfig, VisionConfig
from pangea_jax.model.vision import normalize

IMAGE_ID, PAD_ID = 8190, 8191
PICTURE = (640, 480)
# Pangea in small: 50 million parameters, a third of the decoder's width over that of the tower as there.
CONFIG = PangeaConfig(
    vision=VisionConfig(image_size=112, width=320, layers=10, heads=5, mlp=1280),
    language=LanguageConfig(
        vocab_size=8192,
        width=512,
        layers=10,
        heads=8,
        kv_heads=2,
        head_width=64,
        mlp=1408,
        max_positions=4096,
    ),
    pinpoints=((112, 224), (224, 112), (224, 224), (336, 112), (112, 336)),
    dtype="float32",
)


def parser(description: str, repetitions: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--repetitions", type=int, default=repetitions)
    return found


def arguments(description: str, repetitions: int) -> argparse.Namespace:
    return parser(description, repetitions).parse_args()


def make_pair():
    """Our model, and transformers' with the weights that ours saved."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ours = nnx.jit(lambda: Pangea(CONFIG, rngs=nnx.Rngs(0)))()
    with tempfile.TemporaryDirectory() as folder:
        tokens = SpecialTokens(image=IMAGE_ID, end=PAD_ID, pad=PAD_ID)
        checkpoints.save(ours, CONFIG, folder, tokens=tokens)
        theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        )
    return ours, theirs.eval()


def make_inputs(rows: int, words: int):
    """A picture and `words` random words a row, in our form and in theirs."""
    import torch

    vision = CONFIG.vision
    rng = np.random.default_rng(0)
    found = anyres.layout(PICTURE, CONFIG.pinpoints, vision.image_size, vision.grid, "transformers")
    index = np.concatenate([found.image_index, np.full(words, -1, np.int32)])
    T = len(index)
    tokens = np.where(index < 0, rng.integers(0, IMAGE_ID, (rows, T)), IMAGE_ID).astype(np.int32)
    tiles = rng.integers(
        0, 256, (rows, found.num_tiles, vision.image_size, vision.image_size, 3), np.uint8
    )
    batch = {
        "tokens": tokens,
        "image_index": np.tile(index, (rows, 1)),
        "positions": np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, T), np.int32),
        "tiles": tiles,
    }
    inputs = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.ones((rows, T), dtype=torch.long),
        "pixel_values": torch.tensor(
            np.asarray(normalize(jnp.asarray(tiles))).transpose(0, 1, 4, 2, 3)
        ),
        "image_sizes": torch.tensor([PICTURE[::-1]] * rows),
    }
    return batch, inputs


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repetition [n, 2]: by the clock, and of the processor. Repetition i of both was
    measured one after the other."""

    ours: np.ndarray
    theirs: np.ndarray

    def report(self, name: str, per: int = 1) -> str:
        """A line with the medians in milliseconds, and the medians of the paired ratios."""
        ours, theirs = (
            1e3 * np.median(seconds[:, 0]) / per for seconds in (self.ours, self.theirs)
        )
        clock, processor = np.median(self.theirs / self.ours, axis=0)
        return (
            f"{name:24} ours {ours:7.1f} ms   transformers {theirs:7.1f} ms   {clock:5.2f} times as "
            f"fast by the clock, {processor:.2f} by processor time"
        )


def alternate(
    functions: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, np.ndarray]:
    """Times functions in turn, so that a busy machine slows all; seconds [n, 2] of each, by the clock and of the
    processor. The first call of each, which compiles, does not count. Processor time does not see what else runs,
    but on several cores counts threads that spin while they wait: compare it on one (`taskset -c 0`)."""
    times = {name: np.zeros((repetitions, 2)) for name in functions}
    for repetition in tqdm(range(-1, repetitions), unit="round", leave=False, disable=None):
        for name, function in functions.items():
            # Worker threads of one library spin on for a while after its last call.
            time.sleep(0.2)
            start = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(function())
            end = np.array([time.perf_counter(), time.process_time()])
            if repetition >= 0:
                times[name][repetition] = end - start
    return times


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repetitions: int) -> Times:
    """`alternate` of ours and one other."""
    return Times(**alternate({"ours": ours, "theirs": theirs}, repetitions))


def forward_flops(config: PangeaConfig, rows: int, tokens: int, tiles: int, heads: int) -> float:
    """Floating-point operations of the matrix products of one forward pass.

    Args:
      tokens, tiles: of a row.
      heads: places a row that the output head runs on.
    """
    v, t = config.vision, config.language
    S = v.patches + 1
    tower = 2 * S * (v.used_layers * (4 * v.width**2 + 2 * v.width * v.mlp))
    tower += 2 * v.patches * 3 * v.patch_size**2 * v.width + 4 * v.used_layers * S**2 * v.width
    projector = 2 * v.patches * (v.width * t.width + t.width**2)
    attended = t.heads * t.head_width
    layer = 2 * t.width * (2 * attended + 2 * t.kv_heads * t.head_width) + 6 * t.width * t.mlp
    decoder = tokens * t.layers * (layer + 4 * tokens * attended)
    return rows * (tiles * (tower + projector) + decoder + 2 * heads * t.width * t.vocab_size)


def matmul_flops() -> float:
    """What the machine reaches in a large float32 product, of the faster of the two libraries, a second."""
    import torch

    n = 2048
    a = np.random.default_rng(0).standard_normal((n, n), np.float32)
    ours, product = jnp.asarray(a), jax.jit(jnp.matmul)
    theirs = torch.tensor(a)
    times = in_turn(lambda: product(ours, ours), lambda: theirs @ theirs, 5)
    return 2 * n**3 / min(times.ours[:, 0].min(), times.theirs[:, 0].min())


def read_bandwidth() -> float:
    """Bytes a second of a product of one vector with a matrix too large for any cache but the last."""
    import torch

    matrix, vector = torch.ones(8192, 16_384), torch.ones(16_384)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    return matrix.numel() * 4 / min(seconds)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    libraries = ", ".join(f"{n} {version(n)}" for n in ("jax", "jaxlib", "torch", "transformers"))
    name = names[0] if names else platform.processor()
    load = f"load {os.getloadavg()[0]:.1f}"
    hardware = f"{name}, {cores} core{'s' * (cores > 1)}, {load}"
    return f"{hardware}; Python {platform.python_version()}, {libraries}"
