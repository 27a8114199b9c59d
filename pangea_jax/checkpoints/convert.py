"""Converts a checkpoint from one form to another in small parts, never with the whole model in memory."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pangea_jax.checkpoints import config as config_file
from pangea_jax.checkpoints import huggingface, names, orbax, processor, rounded
from pangea_jax.checkpoints.adapted import AdapterFolder
from pangea_jax.checkpoints.files import (
    CheckpointError,
    Planned,
    check_fit,
    in_order,
    require_new,
    write,
)
from pangea_jax.checkpoints.folder import config_from_folder, load_policy, open_weights
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.model import PangeaConfig
from pangea_jax.sharding import quantized_part
from pangea_jax.work import paths
from pangea_jax.work.atomic import write_json

FORMATS = ("orbax", "hf")
# transformers reads both, vLLM reads the first. The other layouts in `names.LAYOUTS` can only be read.
LAYOUTS = ("transformers-4", "transformers-5")
PART_BYTES = 2**26


def convert(
    source: Path | AdapterFolder,
    target: Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_files: Path,
    form: str = "orbax",
    dtype: np.dtype | None = None,
    layout: str = "transformers-4",
    form_of_weights: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Writes the model in `source` to `target`: weights, config, tokenizer, processor, reading policy.

    The files are written to `<target>.partial`, which is renamed when it is complete. If an earlier
    call left such a folder, it is removed first. The parameters are the flags of launch/convert.py.

    Args:
      source: a folder in any form that `pangea_jax.checkpoints.load` reads; adapters are merged into
        the model below them.
      target: a new or empty folder.
      tokenizer: the model's; its special tokens go into config.json.
      tokenizer_files: the folder or file of the tokenizer.
      form: one of `FORMATS`.
      dtype: float32, bfloat16 or float16; by default as in the source.
      layout: one of `LAYOUTS`, the names of the tensors if `form` is "hf".
      form_of_weights: one of `pangea_jax.model.quantized.FORMS`; by default as in the source.
      progress: called with (bytes written so far, all bytes).

    Returns:
      Sentences that say what the result cannot do; none if it is complete.

    Raises:
      CheckpointError, FileNotFoundError: `source` is damaged or incomplete; `target` is unchanged.
      FileExistsError: `target` exists already.
      ValueError: the form or layout is unknown, or values do not fit `dtype`.
    """
    for value, allowed in ((form, FORMATS), (layout, LAYOUTS)):
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
    require_new(target)
    policy = load_policy(source)
    config, weights = _open(source, form_of_weights)
    _check_vocabulary(source, config, tokenizer)
    tokens = config_file.SpecialTokens.of(tokenizer)
    entries = names.entries(weights.shapes, config, names.LAYOUTS[layout])
    dtypes = {
        name: np.dtype((None if quantized_part(name)[1] else dtype) or weights.dtype(name))
        for name in (entry.path for entry in entries)
    }
    written_dtype = dtypes["language.final_norm.scale"].name
    content = config_file.to_transformers(config, written_dtype, tokens)

    partial = target.with_name(f"{target.name}.partial")
    paths.remove_tree(partial)
    paths.make_folder(partial)
    _write_weights(partial, form, entries, dtypes, weights, progress)
    notes = processor.write(partial, config, tokenizer, tokenizer_files)
    write_json(partial / "generation_config.json", config_file.generation_config(tokens))
    write_json(partial / "config.json", content)
    policy.save(partial)
    if not paths.is_remote(partial):
        for name in paths.sizes(partial):
            with open(partial / name, "rb") as stream:
                os.fsync(stream.fileno())
    paths.move_tree(partial, target, last="config.json")
    return notes


def _open(source: Path, form: str | None):
    """The config and all weights of a model without adapters, in a form of `model.quantized`."""
    config = rounded.choose_form(config_from_folder(source), form, source)
    if config.language.lora.rank:
        ends = "adapter/ has them" if config.language.weights else "model/ has the merged weights"
        raise CheckpointError(
            f"{source} trains adapters, which no public layout has. When the run ends, its folder {ends}. Before "
            "that, use checkpoints.save(checkpoints.load_model(DIR), config, OUT) in Python, or "
            "--format=peft for the adapters alone"
        )
    weights = open_weights(source, config)
    if isinstance(weights, orbax.OrbaxArrays):
        unexpected = weights.names - set(weights.shapes)
        check_fit(weights.path, "parameters", weights.shapes, weights.shapes, unexpected)
    return config, weights


def _check_vocabulary(source: Path, config: PangeaConfig, tokenizer: Tokenizer):
    below = source.base if isinstance(source, AdapterFolder) else source
    named = config_file.image_token(below)
    if named not in (None, tokenizer.image_id):
        raise CheckpointError(
            f"{source}: config.json has <image> at {named}, the tokenizer at "
            f"{tokenizer.image_id}; pass the model's own with --tokenizer"
        )
    if tokenizer.vocab_size > config.language.vocab_size:
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only "
            f"{config.language.vocab_size}; pass the model's own with --tokenizer"
        )


def _write_weights(folder, form, entries, dtypes, weights, progress) -> None:
    total = sum(int(np.prod(e.shape)) * dtypes[e.path].itemsize for e in entries)
    done = 0

    def count(nbytes):
        nonlocal done
        done += nbytes
        progress(done, total)

    count(0)
    if form == "hf":
        plan = _plan_public(entries, dtypes, weights)
        write(folder, plan, huggingface.MAX_SHARD_BYTES, threads=weights.threads, progress=count)
        return
    arrays = {e.path: (e.shape, _chunk(e, dtypes[e.path]), dtypes[e.path]) for e in entries}
    parts = _plan_orbax(entries, dtypes, weights)
    for nbytes in in_order(orbax.write(folder, arrays, parts), weights.threads):
        count(nbytes)


def _chunk(entry, dtype) -> tuple[int, ...]:
    """The shape of the parts of an array in Orbax's files."""
    shape = list(entry.shape)
    shape[0] = 1 if entry.stacked else shape[0]
    shape[entry.major_axis] = entry.block_rows(dtype.itemsize, _part_bytes(entry))
    return tuple(shape)


def _part_bytes(entry) -> int:
    """A part of codes or scales is a whole layer, so that codes and scale are made together."""
    return 1 << 62 if quantized_part(entry.path)[1] else PART_BYTES


def _plan_orbax(entries, dtypes, weights) -> Iterator[orbax.Part]:
    for entry in entries:
        dtype = dtypes[entry.path]
        for _, index in entry.blocks(dtype.itemsize, _part_bytes(entry)):
            read = functools.partial(weights.read, entry.path, index, dtype)
            yield orbax.Part(entry.path, index, read)


def _plan_public(entries, dtypes, weights) -> Iterator[Planned]:
    for entry in entries:
        dtype = dtypes[entry.path]
        parts = {name: [] for name in entry.names}
        for name, index in entry.blocks(dtype.itemsize, _part_bytes(entry)):

            def make(entry=entry, index=index, dtype=dtype):
                part = weights.read(entry.path, index, dtype)
                return names.to_theirs(part[0] if entry.stacked else part, entry.axes)

            parts[name].append(make)
        for name, makes in parts.items():
            yield Planned(name, entry.their_shape, dtype, tuple(makes))
