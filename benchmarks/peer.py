"""Shared by the benchmarks: the same random model here and in transformers, and clocks for both."""

import argparse
import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from pangea_jax import anyres, checkpoints
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import SpecialTokens
from pangea_jax.model import LanguageConfig, Pangea, PangeaConfig, VisionConfig
from pangea_jax.model import params as model_params
from pangea_jax.model.vision import normalize
from pangea_jax.sharding import make_mesh
from pangea_jax.train.flops import train_flops
from pangea_jax.train.state import TrainState
from pangea_jax.train.step import make_train_step

ROOT = Path(__file__).resolve().parents[1]
IMAGE_ID, PAD_ID = 8190, 8191
TOKENS = SpecialTokens(image=IMAGE_ID, end=PAD_ID, pad=PAD_ID)
LEARNING_RATE, CLIP = 1e-5, 1.0
PICTURE = (640, 480)
# A small Pangea: 50 million parameters.
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


def parser(description: str, repetitions: int | None = None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if repetitions is not None:
        found.add_argument("--repetitions", type=int, default=repetitions)
    return found


def make_pair(config: PangeaConfig = CONFIG, tokens: SpecialTokens = TOKENS):
    """Our model, and transformers' with the weights that ours saved."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ours = nnx.jit(lambda: Pangea(config, rngs=nnx.Rngs(0)))()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(ours, config, folder, tokens=tokens)
        theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        )
    return ours, theirs.eval()


def make_inputs(rows: int, words: int):
    """A picture and `words` random words per row, as inputs of our model and of theirs."""
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
    batch = Batch(
        tokens=tokens,
        image_index=np.tile(index, (rows, 1)),
        positions=np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones((rows, T), np.int32),
        tiles=tiles,
    )
    inputs = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.ones((rows, T), dtype=torch.long),
        "pixel_values": their_pixels(tiles),
        "image_sizes": torch.tensor([PICTURE[::-1]] * rows),
    }
    return batch, inputs


def their_pixels(tiles: np.ndarray):
    """Our uint8 tiles [B, N, S, S, 3] in transformers' form: a float tensor [B, N, 3, S, S]."""
    import torch

    return torch.tensor(np.asarray(normalize(jnp.asarray(tiles))).transpose(0, 1, 4, 2, 3))


def our_steps(model: Pangea, batches: Sequence[Batch]) -> Callable:
    """A function that takes one optimiser step for each batch and returns the loss before the last step."""
    # A CPU is faster without a loop over layers, which would copy what it keeps for the backward pass.
    vision, language = model.config.vision, model.config.language
    vision = dataclasses.replace(vision, scan_unroll=vision.used_layers)
    language = dataclasses.replace(language, scan_unroll=language.layers)
    model.config = dataclasses.replace(model.config, vision=vision, language=language)
    model.vision.config, model.language.config = vision, language
    graphdef, params = model_params.split(model)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    copied = jax.tree.map(jnp.copy, params)  # the step reuses the memory of its state
    state = TrainState(jnp.int32(0), copied, {}, optimizer.init(copied))
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), state)
    targets = max(int((batch.weights > 0).sum(axis=1).max()) for batch in batches)
    step = make_train_step(graphdef, optimizer, everywhere, mesh, max_targets=targets)
    states = [jax.device_put(state, everywhere)]

    def train():
        for batch in batches:
            states[0], metrics = step(states[0], batch)
        return jax.block_until_ready((metrics["loss"], states[0]))[0]

    return train


def their_steps(model, batches: Sequence[Mapping]) -> Callable[[], float]:
    """`our_steps` of transformers' model; the batches hold labels."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)

    def train():
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        return loss.item()

    return train


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repetition [n, 2]: by the clock, and of the processor. Both sides took turns."""

    ours: np.ndarray
    theirs: np.ndarray

    def report(self, name: str, per: int = 1) -> str:
        """A line with the medians in milliseconds, and the medians of the ratios of each turn."""
        ours, theirs = (1e3 * np.median(side[:, 0]) / per for side in (self.ours, self.theirs))
        clock, processor = np.median(self.theirs / self.ours, axis=0)
        return (
            f"{name:24} ours {ours:7.1f} ms   transformers {theirs:7.1f} ms   {clock:5.2f} times as "
            f"fast by the clock, {processor:.2f} by processor time"
        )


def alternate(
    functions: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, np.ndarray]:
    """Times functions in turn, so that a busy machine slows all of them.

    The first call of each function compiles and does not count. Processor time does not include other programs. On
    several cores it includes threads that spin while they wait, so compare it on one core (`taskset -c 0`).

    Returns:
      Seconds [n, 2] of each function: by the clock, and of the processor.
    """
    times = {name: np.zeros((repetitions, 2)) for name in functions}
    for repetition in tqdm(range(-1, repetitions), unit="round", leave=False, disable=None):
        for name, function in functions.items():
            # Worker threads of a library keep spinning for a while after its last call.
            time.sleep(0.2)
            start = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(function())
            end = np.array([time.perf_counter(), time.process_time()])
            if repetition >= 0:
                times[name][repetition] = end - start
    return times


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repetitions: int) -> Times:
    """`alternate` of two functions."""
    return Times(**alternate({"ours": ours, "theirs": theirs}, repetitions))


def forward_flops(config: PangeaConfig, rows: int, tokens: int, tiles: int, heads: int) -> float:
    """Floating-point operations of the matrix products of one forward pass, counted as for training.

    Args:
      tokens, tiles: numbers for a row.
      heads: number of places of a row on which the output head runs.
    """
    shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))[1]
    totals = dict(tokens=rows * tokens, tiles=rows * tiles, targets=rows * heads)
    return train_flops(config, shapes, row_tokens=tokens, **totals, frozen=(r".*",))["total"]


def matmul_flops(n: int = 2048) -> float:
    """Operations per second in a product of two n x n float32 matrices, by the faster of the two libraries."""
    import torch

    a = np.random.default_rng(0).standard_normal((n, n), np.float32)
    ours, product = jnp.asarray(a), jax.jit(jnp.matmul)
    theirs = torch.tensor(a)
    times = in_turn(lambda: product(ours, ours), lambda: theirs @ theirs, 5)
    return 2 * n**3 / min(times.ours[:, 0].min(), times.theirs[:, 0].min())


def read_bandwidth() -> float:
    """Bytes read per second in a product of one vector with a matrix that is larger than most caches."""
    import torch

    matrix, vector = torch.ones(8192, 16_384), torch.ones(16_384)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    return matrix.numel() * 4 / min(seconds)


def machine(*libraries: str) -> str:
    """Processor, load, Python, and versions of jax and `libraries`: the first line of every benchmark."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    versions = ", ".join(f"{library} {version(library)}" for library in ("jax", *libraries))
    return f"{name}, {cores} cores, load {load:.1f}; Python {platform.python_version()}, {versions}"
