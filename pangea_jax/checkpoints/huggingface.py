"""Load and save public checkpoints, tensor by tensor."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from pangea_jax.checkpoints import config as config_file
from pangea_jax.checkpoints import names
from pangea_jax.checkpoints.config import PANGEA_TOKENS, SpecialTokens, config_from_folder
from pangea_jax.checkpoints.files import CheckpointError, Planned, TensorFiles, write, write_json
from pangea_jax.model import Pangea, PangeaConfig
from pangea_jax.model.params import flatten, unflatten

MAX_SHARD_BYTES = 5_000_000_000


def load(
    path: str | os.PathLike,
    config: PangeaConfig | None = None,
    *,
    only: Sequence[str] | None = None,
    dtype: jnp.dtype | None = None,
    shardings: nnx.State | None = None,
) -> nnx.State:
    """Reads parameters from safetensors in any layout of `names.LAYOUTS`.

    Each parameter goes straight to its devices; the host holds one at a time, and of a sharded one
    the part of a device. Every tensor of the file must be used and every parameter found.

    Args:
      path: a folder (one file or a sharded index) or a .safetensors file.
      config: sizes; by default from the folder's config.json.
      only: some of "vision", "projector", "newline", "language", to start from a tower or a decoder
        alone; tensors of other parts are then left alone.
      dtype: of the parameters; by default as in the file.
      shardings: a state shaped like the result with a `jax.sharding.Sharding` for every parameter.

    Returns:
      State with the parameters (of `only`), for `nnx.update(model, state)` or `nnx.merge`.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: names the missing, unexpected or misshapen tensors, or the broken file.
    """
    files = TensorFiles(path)
    config = config or config_from_folder(path)
    parts = _checked_parts(only)
    shapes = {
        dotted: value.shape
        for dotted, value in flatten(abstract_state(config)).items()
        if names.part_of_path(dotted) in parts
    }
    layout, entries = _best_layout(files, shapes, config)
    _account(files, layout, entries, parts, everything=only is None, config=config)
    targets = flatten(shardings) if shardings is not None else {}
    missing = [entry.path for entry in entries if targets and entry.path not in targets]
    if missing:
        raise ValueError(f"shardings lack {', '.join(missing)}")
    return unflatten(
        {entry.path: _read(files, entry, dtype, targets.get(entry.path)) for entry in entries}
    )


def load_model(path: str | os.PathLike, config: PangeaConfig | None = None, **kwargs) -> Pangea:
    """The whole model from a folder; arguments as of `load`."""
    if kwargs.get("only") is not None:
        raise ValueError("load_model() makes whole models; use load(only=...) and nnx.update")
    config = config or config_from_folder(path)
    return nnx.merge(_abstract(config)[0], load(path, config, **kwargs))


def save(
    model: Pangea | nnx.State,
    config: PangeaConfig,
    path: str | os.PathLike,
    *,
    dtype: jnp.dtype | None = None,
    tokens: SpecialTokens = PANGEA_TOKENS,
    layout: str = "transformers-4",
    only: Sequence[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that transformers' LlavaNextForConditionalGeneration loads.

    On a pod every process must call it; process 0 writes. A run that is cut off leaves `.partial`
    files behind and what was there before in place.

    Args:
      model: a `Pangea` or the state of its parameters.
      config: its sizes.
      path: a folder, made if need be; weights of an earlier checkpoint in it are replaced.
      dtype: of the tensors written, float32, bfloat16 or float16; by default the parameters' own.
      tokens: ids for config.json; those of Pangea-7B by default.
      layout: one of `names.LAYOUTS`; by default the names of neulab/Pangea-7B-hf, which
        transformers 4 and 5 read. Of the shorter ones that transformers 5 writes, transformers 4
        does not find the tower.
      only: the parts to write, as of `load`; the folder is then no whole checkpoint.
      max_shard_bytes: where a new file starts.

    Raises:
      ValueError: an unknown layout or part, a special token outside of the vocabulary, parameters that
        do not fit `config`, or a value too large for float16.
    """
    if layout not in names.LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(names.LAYOUTS)}")
    parts = _checked_parts(only)
    state = flatten(nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model)
    state = {dotted: v for dotted, v in state.items() if names.part_of_path(dotted) in parts}
    shapes = {dotted: tuple(value.shape) for dotted, value in state.items()}
    expected = {
        dotted: tuple(value.shape)
        for dotted, value in flatten(abstract_state(config)).items()
        if names.part_of_path(dotted) in parts
    }
    if shapes != expected:
        wrong = sorted(set(shapes.items()) ^ set(expected.items()))
        raise ValueError(f"parameters do not fit the config: {wrong[:6]}")
    written = np.dtype(dtype or next(iter(state.values())).dtype)
    content = config_file.to_transformers(config, written.name, tokens)
    folder = Path(path)
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    entries = names.entries(shapes, config, names.LAYOUTS[layout])
    plan = list(_plan(state, entries, dtype))
    write(folder, plan, max_shard_bytes, dry=not writes)
    if writes:
        write_json(folder / "generation_config.json", config_file.generation_config(tokens))
        write_json(folder / "config.json", content)


def abstract_state(config: PangeaConfig) -> nnx.State:
    """Shapes of all parameters, nothing allocated."""
    return _abstract(config)[1]


def _abstract(config):
    return nnx.split(nnx.eval_shape(lambda: Pangea(config, rngs=nnx.Rngs(0))))


def _checked_parts(only) -> tuple[str, ...]:
    unknown = set(only or ()) - set(names.PARTS)
    if unknown or isinstance(only, str):
        raise ValueError(f"only={only!r}: choose some of {tuple(names.PARTS)}")
    return tuple(only) if only is not None else tuple(names.PARTS)


def _best_layout(files: TensorFiles, shapes, config):
    """The layout that explains most of the tensors."""

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


def _account(files: TensorFiles, layout, entries, parts, *, everything: bool, config):
    """Raises one error with all that is missing, left over or of another shape."""
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
        if not names.BUFFERS.search(name) and (everything or layout.part_of(name) in parts)
    }
    missing = set(expected) - files.names
    misshapen = [
        f"{name} is {files.shape(name)}, the config says {shape}"
        for name, shape in sorted(expected.items())
        if name in files.names and files.shape(name) != shape
    ]
    problems = [
        f"{label} {len(found)}: {', '.join(sorted(found)[:8])}{', ...' if len(found) > 8 else ''}"
        for label, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{files.path} does not fit the config; tensors " + "; ".join(problems)
        )


def _read(files: TensorFiles, entry: names.Entry, dtype, sharding) -> jax.Array:
    """One of our parameters, each device's part put together from its slices of the file."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, entry.shape))
        layers = range(index[0].start, index[0].stop) if entry.stacked else (0,)
        rest = index[1:] if entry.stacked else index
        out = None
        for i, layer in enumerate(layers):
            name = entry.names[layer]
            piece = names.read_part(files.tensor(name), entry.axes, entry.layer_shape, rest)
            if out is None:
                out = np.empty((len(layers), *piece.shape), dtype or piece.dtype)
            out[i] = _cast(piece, out.dtype, name)
        return out if entry.stacked else out[0]

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(entry.shape)))
    return jax.make_array_from_callback(entry.shape, sharding, part)


def _plan(state, entries, dtype) -> Iterator[Planned]:
    for entry in entries:
        value = state[entry.path]
        target = np.dtype(dtype or value.dtype)
        for i, name in enumerate(entry.names):

            def fetch(value=value, entry=entry, i=i, name=name, target=target):
                layer = _on_host(value[i] if entry.stacked else value)
                return _cast(names.to_theirs(layer, entry.axes), target, name)

            yield Planned(name, entry.their_shape, target, fetch)


def _on_host(x: jax.Array) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _cast(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds to `dtype`; float16 is the one target that bfloat16 and float32 overflow."""
    with np.errstate(over="ignore"):
        cast = x.astype(dtype, copy=False)
    narrowed = dtype == np.float16 and x.dtype != np.float16
    if narrowed and np.isinf(cast).any() and not np.isinf(x).any():
        raise ValueError(f"{name} has values beyond float16; choose bfloat16 or float32")
    return cast
