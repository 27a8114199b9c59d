"""Reads and writes public checkpoints in safetensors, tensor by tensor."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from pangea_jax.checkpoints import config as config_file
from pangea_jax.checkpoints import names
from pangea_jax.checkpoints.config import PANGEA_TOKENS, SpecialTokens
from pangea_jax.checkpoints.files import (
    CheckpointError,
    Planned,
    TensorFiles,
    cast,
    check_finite,
    check_fit,
    write,
)
from pangea_jax.model import Pangea, PangeaConfig, lora
from pangea_jax.model.params import flatten
from pangea_jax.sharding import quantized_part
from pangea_jax.work import paths
from pangea_jax.work.atomic import write_json

MAX_SHARD_BYTES = 5_000_000_000  # largest size of a file


class PublicWeights:
    """Our parameters in safetensors, in any layout of `names.LAYOUTS`.

    Args:
      path: a folder (one file or a sharded index) or a .safetensors file.
      config, only: as for `pangea_jax.checkpoints.load`.

    Raises:
      FileNotFoundError: there are no weights at `path`.
      CheckpointError: a file is broken, or tensors are missing, unexpected or of another shape.
    """

    threads = 2  # `convert` reads with so many

    def __init__(
        self, path: str | os.PathLike, config: PangeaConfig, only: Sequence[str] | None = None
    ):
        self._files, self.shapes = TensorFiles(path), shapes_of(without_adapters(config), only)
        self._entries = {e.path: e for e in account(self._files, self.shapes, config, only)}

    def dtype(self, name: str) -> np.dtype:
        return self._files.dtype(self._entries[name].names)

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`array[index]` of one parameter in `dtype`. Only the slices that it needs are read from the files."""
        entry = self._entries[name]
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, entry.shape))
        layers, rest = (0,), index
        if entry.stacked:
            layers, rest = range(index[0].start, index[0].stop), index[1:]
        out = None
        for i, layer in enumerate(layers):
            theirs = entry.names[layer]
            piece = names.read_part(self._files.tensor(theirs), entry.axes, entry.layer_shape, rest)
            check_finite(piece, self._files.tensor(theirs).file, theirs)
            if out is None:
                out = _empty((len(layers), *piece.shape), dtype)
            out[i] = cast(piece, dtype, theirs)
        return out if entry.stacked else out[0]


def save(
    model: Pangea | nnx.State,
    config: PangeaConfig,
    path: str | os.PathLike,
    *,
    dtype: jnp.dtype | None = None,
    tokens: SpecialTokens = PANGEA_TOKENS,
    layout: str = "transformers-4",
    only: Sequence[str] | None = None,
) -> None:
    """Writes a folder that transformers' LlavaNextForConditionalGeneration loads.

    Adapters are merged into their kernels. On a pod every process must call it; process 0 writes. A kill leaves
    `.partial` files and does not change the files that were there before.

    Args:
      model: a `Pangea` or the state of its parameters.
      config: the sizes of the model.
      path: a folder, created if necessary. Weights of an earlier checkpoint in it are replaced.
      dtype: dtype of the tensors: float32, bfloat16 or float16; None is that of the parameters.
      tokens: ids for config.json; those of Pangea-7B by default.
      layout: one of `names.LAYOUTS`; by default the names of neulab/Pangea-7B-hf, which transformers 4 and 5 read.
        transformers 4 does not find the tower under the shorter names that transformers 5 writes.
      only: the parts to write, as in `load`. The folder is then no complete checkpoint.

    Raises:
      ValueError: an unknown layout or part, a special token outside of the vocabulary, parameters that do not fit
        `config`, or a value too large for float16.
    """
    if layout not in names.LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(names.LAYOUTS)}")
    params = flatten(nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model)
    if config.language.weights and config.language.lora.rank:
        raise ValueError(
            f"adapters cannot be merged into weights in {config.language.weights}; save them with "
            "checkpoints.adapter.save, or merge them into the model below with launch/convert.py"
        )
    params, config = lora.merge(params, config.language.lora), without_adapters(config)
    params = {
        name: params[name] for name in params if names.part_of_path(name) in checked_parts(only)
    }
    shapes, expected = {n: tuple(x.shape) for n, x in params.items()}, shapes_of(config, only)
    if shapes != expected:
        wrong = sorted(set(shapes.items()) ^ set(expected.items()))
        raise ValueError(f"parameters do not fit the config: {wrong[:6]}")
    plain = (value for name, value in params.items() if not quantized_part(name)[1])
    written = np.dtype(dtype or next(plain).dtype)
    content = config_file.to_transformers(config, written.name, tokens)
    folder, writes = paths.path(path), jax.process_index() == 0
    if writes:
        paths.make_folder(folder)
    entries = names.entries(shapes, config, names.LAYOUTS[layout])
    write(folder, _plan(params, entries, dtype), MAX_SHARD_BYTES, dry=not writes)
    if writes:
        write_json(folder / "generation_config.json", config_file.generation_config(tokens))
        write_json(folder / "config.json", content)


def without_adapters(config: PangeaConfig) -> PangeaConfig:
    """The config without adapters, which checkpoints of whole models do not have."""
    language = dataclasses.replace(config.language, lora=lora.LoraConfig())
    return dataclasses.replace(config, language=language)


def abstract_state(config: PangeaConfig) -> nnx.State:
    """Shapes of all parameters; nothing is allocated."""
    return abstract_model(config)[1]


def abstract_model(config: PangeaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and shapes of the model; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Pangea(config, rngs=nnx.Rngs(0))))


def shapes_of(config: PangeaConfig, only: Sequence[str] | None = None) -> dict[str, tuple]:
    """Shape of every parameter (of the parts `only`) by dotted name."""
    parts = checked_parts(only)
    return {
        dotted: tuple(value.shape)
        for dotted, value in flatten(abstract_state(config)).items()
        if names.part_of_path(dotted) in parts
    }


def kernel_shapes(config: PangeaConfig) -> dict[str, tuple]:
    """Shape of every parameter that public checkpoints of whole models have."""
    language = dataclasses.replace(config.language, lora=lora.LoraConfig(), weights="")
    return shapes_of(dataclasses.replace(config, language=language))


def checked_parts(only: Sequence[str] | None) -> tuple[str, ...]:
    """The parts in `only`; all by default.

    Raises:
      ValueError: a part is unknown.
    """
    unknown = set(only or ()) - set(names.PARTS)
    if unknown or isinstance(only, str):
        raise ValueError(f"only={only!r}: choose some of {tuple(names.PARTS)}")
    return tuple(only) if only is not None else tuple(names.PARTS)


def _best_layout(files: TensorFiles, shapes, config):
    """The layout that most tensors fit, and its entries."""

    def found(candidate):
        return sum(name in files.names for entry in candidate[1] for name in entry.names)

    candidates = [
        (layout, names.entries(shapes, config, layout)) for layout in names.LAYOUTS.values()
    ]
    best = max(candidates, key=found)
    if not found(best):
        raise CheckpointError(
            f"{files.path}: none of its {len(files.names)} tensors (first: "
            f"{', '.join(sorted(files.names)[:3])}) is one of a known layout: "
            f"{', '.join(names.LAYOUTS)}"
        )
    return best


def account(
    files: TensorFiles,
    shapes: Mapping[str, tuple[int, ...]],
    config: PangeaConfig,
    only: Sequence[str] | None = None,
) -> list[names.Entry]:
    """Finds each of our parameters in the files.

    Raises:
      CheckpointError: one message names everything that is missing, unexpected or of another shape.
    """
    layout, entries = _best_layout(files, shapes, config)
    parts = checked_parts(only)
    expected = {name: entry.their_shape for entry in entries for name in entry.names}
    head, embedding = f"{layout.head}weight", f"{layout.decoder}embed_tokens.weight"
    tied = config.language.tied_head and {head, embedding} <= files.names
    if tied and not np.array_equal(files.tensor(head)[:], files.tensor(embedding)[:]):
        raise CheckpointError(
            f"{files.path}: {head} differs from {embedding}, but the config ties them; "
            "set tied_head=False (tie_word_embeddings in config.json)"
        )
    unexpected = {
        name
        for name in files.names - set(expected) - ({head} if tied else set())
        if not names.BUFFERS.search(name) and (only is None or layout.part_of(name) in parts)
    }
    check_fit(files.path, "tensors", files.shapes, expected, unexpected)
    return entries


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array aligned to 64 bytes. JAX on a CPU uses it without a copy."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + memory.size - 64].view(dtype).reshape(shape)


def _plan(params, entries, dtype) -> Iterator[Planned]:
    def fetch(value, entry, i, target):
        layer = value[i] if entry.stacked else value
        if isinstance(layer, jax.Array) and not layer.is_fully_addressable:
            layer = multihost_utils.process_allgather(layer, tiled=True)
        return cast(names.to_theirs(np.asarray(layer), entry.axes), target, entry.names[i])

    for entry in entries:
        value = params[entry.path]
        target = np.dtype(value.dtype if quantized_part(entry.path)[1] else dtype or value.dtype)
        for i, name in enumerate(entry.names):
            part = functools.partial(fetch, value, entry, i, target)
            yield Planned(name, entry.their_shape, target, (part,))
