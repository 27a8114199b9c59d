"""Which form of the weights and how many rows a card holds, by calculation from the model's sizes.

`choose` answers it for a card before anything is loaded; the evaluation asks `rows_of_answers` once the weights lie
there. The sizes are those of this code: the parameters, the key-value cache, and the widest arrays of one layer.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pangea_jax import checkpoints
from pangea_jax.generate import batching
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model import params as model_params

GIB = 1 << 30
PUBLISHED = "neulab/Pangea-7B-hf"
# Forms of the weights, the widest first; None is the dtype of the activations.
FORMS = (None, "int8", "int4")
# The share of the memory beside the weights for a batch; programs, logits and copies need the rest.
SHARE = 0.4
# Wider weights are chosen only if they leave room for so many rows.
_LEAST_ROWS = 2
# Who did not ask for a model does not wait longer than this for a token of it.
_PATIENCE_S = 0.1


@dataclasses.dataclass(frozen=True)
class Card:
    """An accelerator, or the host.

    Attributes:
      memory: bytes that a program may use.
      bandwidth: bytes a second that it reads of its memory, from the maker's sheet.
      dtype: of activations.
    """

    name: str
    memory: float
    bandwidth: float
    dtype: str = "bfloat16"


def _gpu(name: str, gib: float, bandwidth: float, dtype: str = "bfloat16") -> Card:
    """A GPU with the memory that CUDA sees, of which JAX takes `GPU_SHARE`."""
    return Card(name, gib * GIB * GPU_SHARE, bandwidth, dtype)


# XLA_PYTHON_CLIENT_MEM_FRACTION in the notebook; the driver and the libraries' own buffers need the rest.
GPU_SHARE = 0.92
# What Colab lends, and an 80 GB card. The key is how JAX calls the device.
CARDS: Mapping[str, Card] = {
    "Tesla T4": _gpu("T4", 14.56, 320e9, "float16"),
    "NVIDIA L4": _gpu("L4", 22.03, 300e9),
    "NVIDIA A100-SXM4-40GB": _gpu("A100, 40 GB", 39.39, 1555e9),
    "NVIDIA A100-SXM4-80GB": _gpu("A100, 80 GB", 79.15, 2039e9),
    "TPU v5 lite": Card("v5e-1", 15.75 * GIB, 819e9),
    "TPU v6 lite": Card("v6e-1", 31.25 * GIB, 1640e9),
    "cpu": Card("CPU, 12 GiB free", 12 * GIB, 10e9),
}


def this_card() -> Card:
    """The first device of this process, with the memory that is free now."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return dataclasses.replace(CARDS["cpu"], name="CPU", memory=_host_memory())
    stats = device.memory_stats() or {}
    free = float(stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))
    known = CARDS.get(device.device_kind)
    if known is None:
        # CUDA's compute capability; bfloat16 products begin with 8.0.
        old = float(getattr(device, "compute_capability", 8)) < 8
        known = Card(device.device_kind, free, math.inf, "float16" if old else "bfloat16")
    return dataclasses.replace(known, memory=free or known.memory)


def _host_memory() -> float:
    """Bytes of the host that are free or can be freed, as Linux counts them; elsewhere half of its memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes(config: PangeaConfig, slots: int) -> int:
    """Bytes of the keys and values of one row."""
    language = config.language
    width = language.layers * language.kv_heads * language.head_width
    return 2 * slots * width * jnp.dtype(config.dtype).itemsize


def row_bytes(config: PangeaConfig, tokens: int, tiles: int, choices: int, length: int) -> int:
    """Rough bytes of a prompt and its choices: the caches, and the widest arrays of one layer."""
    vision, language = config.vision, config.language
    size = jnp.dtype(config.dtype).itemsize
    # Attention weights are float32. The decoder makes them for 512 queries at a time (at most 1,024 above 4,096
    # tokens).
    decoder = tokens * (4 * size * language.mlp + 4 * language.heads * min(tokens, 512))
    seen = vision.patches + 1
    tower = tiles * seen * (4 * vision.heads * seen + 4 * size * vision.mlp)
    logits = 4 * language.vocab_size * max(1, choices * length)
    return choices * cache_bytes(config, tokens + length) + decoder + tower + logits


def rows_of_answers(
    config: PangeaConfig, memory: float, width: int, tiles: int, slots: int, tensor: int = 1
) -> int:
    """The rows that can be answered at once; 0 if not even one.

    Their caches get the memory that reading does not need. The engine reads one whole prompt at a time, or several
    prompts that continue from copies of a cache.

    Args:
      memory: bytes for the batch.
      width, tiles: of the longest prompt.
      slots: tokens of a prompt and its answer.
      tensor: devices that share each row.
    """
    copies = batching.AT_ONCE * cache_bytes(config, width) / tensor
    left = memory - max(row_bytes(config, width, tiles, 1, 0), copies)
    each = cache_bytes(config, slots) / tensor + 4 * config.language.vocab_size
    return max(0, int(left // each))


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a card holds of a model.

    Attributes:
      weights: their form, as `pangea_jax.load(weights=...)` takes it; None for the dtype of the activations.
      weight_bytes: of all parameters in this form.
      rows: prompts of `tokens` tokens and `tiles` tiles that are answered at once.
      context: tokens of the longest prompt that is answered alone, a multiple of 1,024.
    """

    card: Card
    weights: str | None
    weight_bytes: int
    rows: int
    tokens: int
    tiles: int
    context: int

    @property
    def form(self) -> str:
        """The form of the weights in words."""
        return self.weights or self.card.dtype

    @property
    def token_s(self) -> float:
        """Seconds that a card needs at least for a token of one row, because it reads all weights for it."""
        return self.weight_bytes / self.card.bandwidth

    def __str__(self) -> str:
        return (
            f"{self.card.name}, {self.card.memory / GIB:.1f} GiB: weights in {self.form} take "
            f"{self.weight_bytes / GIB:.1f} GiB, and {self.rows} prompts of {self.tokens:,} tokens with {self.tiles} "
            f"tiles are answered at once; activations in {self.card.dtype}"
        )


@functools.cache
def weight_bytes(config: PangeaConfig, weights: str | None) -> int:
    """Bytes of all parameters in a form, see `Fit.weights`."""
    language = dataclasses.replace(config.language, weights=weights or config.language.weights)
    config, dtype = dataclasses.replace(config, language=language), jnp.dtype(config.dtype)
    shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0), dtype=dtype))[1]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values())


def choose(
    config: PangeaConfig,
    card: Card,
    *,
    tokens: int = 4096,
    tiles: int = 5,
    new_tokens: int = 512,
    forms: Sequence[str | None] = FORMS,
) -> Fit | None:
    """The widest of `forms` that leaves room for two rows, else the one with the most rows; None if none fits."""
    config = dataclasses.replace(config, dtype=card.dtype)
    tokens = min(tokens, config.language.max_positions - new_tokens)
    found = [_fit(config, card, form, tokens, tiles, new_tokens) for form in forms]
    enough = (each for each in found if each.rows >= _LEAST_ROWS)
    most = max(found, key=lambda each: each.rows)
    return next(enough, most if most.rows else None)


def _fit(config, card, weights, tokens, tiles, new) -> Fit:
    size = weight_bytes(config, weights)
    memory = SHARE * (card.memory - size)

    def rows(width: int) -> int:
        return rows_of_answers(config, memory, width, tiles, width + new)

    most = rows(tokens)
    most = most and 1 << (most.bit_length() - 1)  # as the evaluation rounds
    widths = range(1024, config.language.max_positions - new + 1, 1024)
    context = max((width for width in widths if rows(width)), default=0)
    return Fit(card, weights, size, most, tokens, tiles, context)


def model_for(card: Card, name: str = "") -> tuple[str, Fit | None, str]:
    """A model to load on a card, and why.

    Args:
      name: as for `pangea_jax.load`; "" for the published model or, where the hub cannot be reached or the card is too
        small or too slow, "sample".

    Returns:
      The model's name, what the card holds of it (None for "sample"), and a sentence for people.

    Raises:
      FileNotFoundError, CheckpointError, ValueError: the model that is named is not there, or the card is too small.
    """
    try:
        if name == "sample":
            raise ValueError("it was asked for")
        found = choose(checkpoints.peek(name or PUBLISHED), card)
        if found is None:
            raise ValueError(
                f"{card.name} ({card.memory / GIB:.1f} GiB) does not hold {name or PUBLISHED}"
            )
        if not name and found.token_s > _PATIENCE_S:
            pace = f"takes {found.token_s:.1f} s or more for a token"
            raise ValueError(f"{PUBLISHED} {pace} on {card.name}, in {found.form}")
    except (OSError, ValueError) as reason:
        if name not in ("", "sample"):
            raise
        return "sample", None, f"The small sample model, because {reason}."
    return name or PUBLISHED, found, f"{name or PUBLISHED} on {found}."


def table(config: PangeaConfig, cards: Sequence[Card] = tuple(CARDS.values())) -> str:
    """Which card runs what, as Markdown."""
    head = (
        "card",
        "memory, GiB",
        "weights",
        "weights, GiB",
        "rows of 4,096",
        "longest prompt",
        "tokens/s",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for card in cards:
        found = choose(config, card)
        cells = [card.name, f"{card.memory / GIB:.1f}", "none fit", "", "", "", ""]
        if found is not None:
            cells[2:] = found.form, f"{found.weight_bytes / GIB:.1f}", str(found.rows)
            cells += f"{found.context:,}", f"{1 / found.token_s:.0f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
