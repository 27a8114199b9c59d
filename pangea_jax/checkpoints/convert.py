"""From one form of a checkpoint to another, part by part: the model is never in memory as a whole."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pangea_jax.checkpoints import config as config_file
from pangea_jax.checkpoints import huggingface, names, orbax, processor
from pangea_jax.checkpoints.config import config_from_folder
from pangea_jax.checkpoints.files import (
    CheckpointError,
    Planned,
    TensorFiles,
    cast,
    in_order,
    require_new,
    write,
)
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.model import PangeaConfig
from pangea_jax.work.atomic import write_json

FORMATS = ("orbax", "hf")
# What transformers finds its way in, and in the first vLLM; the others of `names.LAYOUTS` are read only.
LAYOUTS = ("transformers-4", "transformers-5")
PART_BYTES = 2**26
THREADS = 2


def convert(
    source: Path,
    target: Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_files: Path,
    form: str = "orbax",
    dtype: np.dtype | None = None,
    layout: str = "transformers-4",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Writes the model in `source` to `target`, weights, config, tokenizer and processor.

    Everything is written beside `target`, to `<target>.partial`, which takes the name when it is
    whole; what an earlier call has left of it is removed.

    Args:
      source: a folder in any form that `pangea_jax.checkpoints.load` reads.
      target: a new or empty folder.
      tokenizer: of the model; its special tokens go into config.json.
      tokenizer_files: the folder or file it came from.
      form: one of `FORMATS`.
      dtype: float32, bfloat16 or float16; by default as in the source.
      layout: one of `LAYOUTS`, how tensors are named if `form` is "hf".
      progress: told bytes written and bytes in all.

    Returns:
      What the result cannot do, in sentences; empty if it is complete.

    Raises:
      CheckpointError, FileNotFoundError: `source` is damaged or incomplete; `target` is untouched.
      FileExistsError: `target` is there already.
      ValueError: an unknown form or layout, or values that do not fit `dtype`.
    """
    for value, allowed in ((form, FORMATS), (layout, LAYOUTS)):
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
    require_new(target)
    config = config_from_folder(source)
    if config.language.lora.rank:
        raise CheckpointError(
            f"{source} trains adapters, which no public layout has; when it is done its folder model/ has "
            "them merged. Before: checkpoints.save(checkpoints.load_model(DIR), config, OUT) in Python, or the "
            "adapters alone with --format=peft"
        )
    weights = _open(source, config)
    _check_vocabulary(source, config, tokenizer)
    tokens = config_file.SpecialTokens(tokenizer.image_id, tokenizer.im_end_id, tokenizer.pad_id)
    entries = names.entries(huggingface.shapes_of(config), config, names.LAYOUTS[layout])
    dtypes = {entry.path: np.dtype(dtype or weights.dtype(entry.path)) for entry in entries}
    written_dtype = dtypes["language.embedding_vd"].name
    content = config_file.to_transformers(config, written_dtype, tokens)

    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total = sum(int(np.prod(e.shape)) * dtypes[e.path].itemsize for e in entries)
    count = _Count(total, progress)
    if form == "orbax":
        _write_orbax(partial, entries, dtypes, weights, count)
    else:
        plan = _plan(entries, dtypes, weights)
        write(partial, plan, huggingface.MAX_SHARD_BYTES, threads=weights.threads, progress=count)
    notes = processor.write(partial, config, tokenizer, tokenizer_files)
    write_json(partial / "generation_config.json", config_file.generation_config(tokens))
    write_json(partial / "config.json", content)
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    os.replace(partial, target)
    return notes


class _Count:
    """Adds up bytes for a progress display."""

    def __init__(self, total: int, report: Callable[[int, int], None]):
        self._done, self._total, self._report = 0, total, report
        report(0, total)

    def __call__(self, nbytes: int):
        self._done += nbytes
        self._report(self._done, self._total)


class _PublicWeights:
    """Parts of our parameters from safetensors."""

    threads = THREADS

    def __init__(self, source: Path, config: PangeaConfig):
        self._files = TensorFiles(source)
        found = huggingface.account(self._files, huggingface.shapes_of(config), config)
        self._entries = {entry.path: entry for entry in found}

    def dtype(self, path: str) -> np.dtype:
        return self._files.dtype(self._entries[path].names)

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        entry = self._entries[path]
        if not entry.stacked:
            return names.read_part(
                self._files.tensor(entry.names[0]), entry.axes, entry.shape, index
            )
        tensor = self._files.tensor(entry.names[index[0].start])
        return names.read_part(tensor, entry.axes, entry.layer_shape, index[1:])[None]


class _OrbaxWeights:
    """Parts of our parameters from Orbax."""

    def __init__(self, location: orbax.Location, config: PangeaConfig):
        self._arrays = orbax.OrbaxArrays(location)
        shapes = huggingface.shapes_of(config)
        orbax.check(self._arrays, shapes)
        unexpected = sorted(self._arrays.names - set(shapes))
        if unexpected:
            raise CheckpointError(
                f"{self._arrays.path} does not fit the config; parameters unexpected "
                f"{len(unexpected)}: {', '.join(unexpected[:8])}"
            )
        # One thread meets the parameters in their order, which lets `OrbaxArrays` keep one at a time.
        self.threads = 1 if location.trained else THREADS
        self.dtype, self.read = self._arrays.dtype, self._arrays.read


def _open(source: Path, config: PangeaConfig) -> _PublicWeights | _OrbaxWeights:
    location = orbax.find(source)
    return _OrbaxWeights(location, config) if location else _PublicWeights(source, config)


def _check_vocabulary(source: Path, config: PangeaConfig, tokenizer: Tokenizer):
    named = config_file.image_token(source)
    if named not in (None, tokenizer.image_id):
        raise CheckpointError(
            f"{source}: config.json has <image> at {named}, the tokenizer at "
            f"{tokenizer.image_id}; give the model's own with --tokenizer"
        )
    if tokenizer.vocab_size > config.language.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
            f"{config.language.vocab_size}; give the model's own with --tokenizer"
        )


def _write_orbax(folder, entries, dtypes, weights, count):
    def chunk(entry):
        shape = list(entry.shape)
        shape[0] = 1 if entry.stacked else shape[0]
        itemsize = dtypes[entry.path].itemsize
        shape[entry.major_axis] = entry.block_rows(itemsize, PART_BYTES)
        return tuple(shape)

    def parts() -> Iterator[orbax.Part]:
        for entry in entries:
            for name, index in entry.blocks(dtypes[entry.path].itemsize, PART_BYTES):

                def make(entry=entry, name=name, index=index):
                    return cast(weights.read(entry.path, index), dtypes[entry.path], name)

                yield orbax.Part(entry.path, index, make)

    arrays = {e.path: (e.shape, chunk(e), dtypes[e.path]) for e in entries}
    for nbytes in in_order(orbax.write(folder, arrays, parts()), weights.threads):
        count(nbytes)


def _plan(entries, dtypes, weights) -> Iterator[Planned]:
    for entry in entries:
        dtype = dtypes[entry.path]
        parts = {name: [] for name in entry.names}
        for name, index in entry.blocks(dtype.itemsize, PART_BYTES):

            def make(entry=entry, name=name, index=index, dtype=dtype):
                part = cast(weights.read(entry.path, index), dtype, name)
                return names.to_theirs(part[0] if entry.stacked else part, entry.axes)

            parts[name].append(make)
        for name, makes in parts.items():
            yield Planned(name, entry.their_shape, dtype, tuple(makes))
