"""Parameters in Orbax checkpoints: our own form of a model, and the checkpoints of training.

Our form is a folder with `config.json`, the tokenizer's files and `params/`: an Orbax checkpoint of the flat dict of
parameters, which `orbax.checkpoint.v1.load` can read. Its arrays are plain Zarr 3. A file holds at most one layer and
has a checksum, so a part can be read or written without the rest.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from pangea_jax.checkpoints.files import CheckpointError, cast, check_finite, check_fit
from pangea_jax.work import paths
from pangea_jax.work.untrusted import parse_json

PARAMS = "params"
_ITEM = "state"  # Orbax's name for the only tree of a checkpoint
_COMPLETE = "commit_success.txt"
# Fields of `pangea_jax.train.state.TrainState` that hold parameters.
_IN_TRAIN_STATE = ("trainable", "frozen")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where the parameters of a model are.

    Attributes:
      arrays: the folder with Orbax's `_METADATA`.
      config: the config.json of the model.
      trained: whether the checkpoint is a train state.
    """

    arrays: Path
    config: Path
    trained: bool


def find(path: str | os.PathLike) -> Location | None:
    """The parameters of a folder in our form, or of the newest step of a run; None if `path` is neither.

    Args:
      path: a folder in our form, a work directory of `launch/train.py`, its `checkpoints` folder, or one step in it.
    """
    path = paths.absolute(paths.path(path))  # "." and "100" have parents too
    if (path / PARAMS / _ITEM / "_METADATA").is_file():
        return Location(path / PARAMS / _ITEM, path / "config.json", trained=False)
    if (path / _ITEM / "_METADATA").is_file() and path.name.isdecimal():
        return Location(path / _ITEM, path.parents[1] / "config.json", trained=True)
    for steps in (path / "checkpoints", path):
        # The name of a step is no number until the step is complete. In a bucket, Orbax marks complete steps.
        done = [step for step in steps.glob(f"*/{_ITEM}/_METADATA") if step.parts[-3].isdecimal()]
        if paths.is_remote(path):
            done = [step for step in done if (step.parents[1] / _COMPLETE).exists()]
        if done:
            newest = max(done, key=lambda file: int(file.parts[-3]))
            return Location(newest.parent, steps.parent / "config.json", trained=True)
    return None


class OrbaxArrays:
    """Parameters at a `Location`, by dotted name. `read` reads only the chunks it needs.

    Args:
      shapes: shapes of the parameters to read; the checkpoint may hold others.

    Raises:
      CheckpointError: metadata or an array cannot be read, or parameters are missing or have another shape.
    """

    def __init__(self, location: Location, shapes: Mapping[str, tuple[int, ...]]):
        self.path = location.arrays
        try:
            metadata = parse_json((self.path / "_METADATA").read_text())
            found = [
                tuple(str(key["key"]) for key in leaf["key_metadata"])
                for leaf in metadata["tree_metadata"].values()
                if leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray")
            ]
            use_ocdbt, use_zarr3 = metadata["use_ocdbt"], metadata["use_zarr3"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{self.path / '_METADATA'} is no metadata of Orbax ({error!r})"
            ) from None
        if location.trained:
            found = [path for path in found if path[0] in _IN_TRAIN_STATE and len(path) == 2]
        files = paths.url(self.path)
        self._arrays, self._whole, self._lock = {}, (None, None), threading.Lock()
        for path in found:
            stored = ".".join(path)
            ocdbt = {"driver": "ocdbt", "base": files, "path": f"{stored}/"}
            spec = {
                "driver": "zarr3" if use_zarr3 else "zarr",
                "kvstore": ocdbt if use_ocdbt else f"{files}{stored}/",
                # Otherwise a missing chunk would read as zeros.
                "fill_missing_data_reads": False,
            }
            self._arrays[path[-1]] = self._open(path[-1], spec)
        # With one thread `convert` reads the parameters in order, so `_read` keeps only one of them.
        self.shapes, self.threads = dict(shapes), 1 if location.trained else 2
        there = {name: tuple(array.shape) for name, array in self._arrays.items()}
        check_fit(self.path, "parameters", there, self.shapes)

    def _open(self, name, spec):
        try:
            return ts.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be opened ({_short(error)})"
            ) from None

    @property
    def names(self) -> set[str]:
        return set(self._arrays)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._arrays[name].dtype.numpy_dtype)

    def read(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`array[index]` of one parameter in `dtype`.

        A training checkpoint may hold a parameter as one compressed chunk. The chunk is decoded once and kept until
        another parameter is read.
        """
        try:
            part = self._read(name, self._arrays[name], index)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: {name} is damaged or incomplete ({_short(error)}); "
                "copy or convert it again"
            ) from None
        return cast(check_finite(part, self.path, name), dtype, name)

    def _read(self, name, array, index):
        if array.chunk_layout.read_chunk.shape != array.shape:
            return array[index].read().result()
        with self._lock:
            if self._whole[0] != name:
                self._whole = (None, None)  # frees the last one before it reads the next
                self._whole = (name, array.read().result())
            return self._whole[1][index]


def _short(error: Exception) -> str:
    """The first clause of TensorStore's message, without its list of source lines."""
    return str(error).split(" [")[0]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of one of our parameters to write: `make()` returns `array[index]`."""

    name: str
    index: tuple[slice, ...]
    make: Callable[[], np.ndarray]


def write(
    folder: Path,
    arrays: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], np.dtype]],
    parts: Iterator[Part],
) -> Iterator[Callable[[], int]]:
    """Writes `folder`/params part by part.

    Args:
      arrays: name to (shape, chunk shape, dtype).
      parts: each chunk belongs to one part.

    Yields:
      for each part a function that makes it, writes it and returns its number of bytes. The functions may run in
      threads. The checkpoint is complete when all have returned. The caller then syncs the files to disk.
    """
    # Orbax writes its metadata with arrays of one element. The real arrays then replace these.
    stand_ins = {
        name: np.zeros((1,) * len(shape), dtype) for name, (shape, _, dtype) in arrays.items()
    }
    options = ocp.Context()
    options.array.saving.use_ocdbt = False
    options.array.saving.use_zarr3 = True
    options.array.saving.use_compression = False
    target = paths.absolute(folder / PARAMS)
    with options:
        ocp.save(target, stand_ins)
    # With a sync for each file the disk would often be idle.
    context = ts.Context({"file_io_sync": False})
    opened = {
        name: _create(target / _ITEM / name, *described, context)
        for name, described in arrays.items()
    }

    def job(part):
        def run():
            made = np.ascontiguousarray(part.make())
            opened[part.name][part.index].write(made).result()
            return made.nbytes

        return run

    return (job(part) for part in parts)


def _create(folder: Path, shape, chunk, dtype, context):
    spec = {
        "driver": "zarr3",
        "kvstore": paths.url(folder),
        "metadata": {
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
            "fill_value": dtype.type(0).item(),
        },
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, delete_existing=True, context=context).result()
