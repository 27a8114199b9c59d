"""Safetensors on disk: find and read the tensors of a folder, write them part by part."""

import collections
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pangea_jax.work.atomic import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file or tensor, and what to do."""


class Tensor:
    """A tensor in a file. Slicing reads the rows asked for, with plain reads.

    The library maps whole files into memory; what was touched of a map counts as this process's
    memory until the file is closed, which adds up to the checkpoint.
    """

    def __init__(self, file: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int):
        self.name, self.shape = name, shape
        self._file, self._dtype, self._offset = file, dtype, offset

    @property
    def dtype(self) -> np.dtype:
        if self._dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._file}: tensor {self.name} is {self._dtype}, but only "
                f"{', '.join(_DTYPES)} are supported; quantised checkpoints are not"
            )
        return _DTYPES[self._dtype]

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        start, stop, _ = index[0].indices(self.shape[0])
        row = math.prod(self.shape[1:])
        found = np.fromfile(
            self._file,
            self.dtype,
            count=(stop - start) * row,
            offset=self._offset + start * row * self.dtype.itemsize,
        )
        if found.size != (stop - start) * row:
            raise CheckpointError(f"{self._file} ends within tensor {self.name}; fetch it again")
        return found.reshape(stop - start, *self.shape[1:])[(slice(None), *index[1:])]


class TensorFiles:
    """The tensors of a safetensors file, or of a folder with one file or a sharded index.

    Headers alone are read here; `tensor(name)[slices]` reads the bytes it needs.

    Raises:
      FileNotFoundError: nothing to read at `path`.
      CheckpointError: pickled weights only, a broken file, an index that does not match its files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._tensors: dict[str, Tensor] = {}
        file_of: dict[str, Path] = {}
        for file in _weight_files(self.path):
            for tensor in _header(file):
                self._tensors[tensor.name], file_of[tensor.name] = tensor, file
        _check_index(self.path, file_of)

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, names: Sequence[str]) -> np.dtype:
        """What several tensors are that become one parameter.

        Raises:
          CheckpointError: not all the same.
        """
        found = {self._tensors[name].dtype.name: name for name in names}
        if len(found) > 1:
            listed = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(found.items()))
            raise CheckpointError(f"{self.path}: {listed}; choose a dtype for all")
        return self._tensors[names[0]].dtype


def _header(file: Path) -> list[Tensor]:
    """The tensors of one file, after the library has found its header sound and its bytes complete."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is named by {INDEX} but is not there; copy it here"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); fetch it again"
        ) from None
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return [
        Tensor(file, name, x["dtype"], tuple(x["shape"]), 8 + length + x["data_offsets"][0])
        for name, x in header.items()
    ]


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no .safetensors file; {_CONVERT}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint at {path}: expected a folder or a .safetensors file"
        )
    if (path / INDEX).is_file():
        return [path / file for file in sorted(set(_weight_map(path).values()))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(f"{path} has pickled weights only ({', '.join(pickled)}); {_CONVERT}")
    raise FileNotFoundError(f"no {SINGLE} and no {INDEX} in {path}")


_CONVERT = (
    "unpickling runs code from the file, so it is not done here: load it with transformers "
    "where you trust it and call save_pretrained(..., safe_serialization=True)"
)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX} is no index of tensors ({error!r})") from None
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / INDEX}: tensor {name!r} is placed in {file!r}, which is not a "
                ".safetensors file of this folder"
            )
    return weight_map


def _check_index(path: Path, file_of: dict[str, Path]):
    if not (path / INDEX).is_file():
        return
    wrong = [
        name for name, file in _weight_map(path).items() if file_of.get(name, Path()).name != file
    ]
    if wrong:
        raise CheckpointError(
            f"{path / INDEX} does not match its files, which lack {len(wrong)} of its tensors "
            f"({', '.join(sorted(wrong)[:5])}); fetch the folder again"
        )


class Planned(NamedTuple):
    """A tensor to write: what `parts` return, one after the other, is the whole."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Sequence[Callable[[], np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(jobs: Iterable[Callable], threads: int) -> Iterator:
    """What the jobs return, in their order; `threads` of them run ahead, by twice their number."""
    if not threads:
        yield from (job() for job in jobs)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def write(
    folder: Path,
    tensors: Iterable[Planned],
    max_shard_bytes: int,
    *,
    dry: bool = False,
    threads: int = 0,
    progress: Callable[[int], None] = lambda nbytes: None,
):
    """Writes tensors into one file or, beyond `max_shard_bytes`, several with an index.

    A few parts are in memory at a time. Files appear under their names when all of them are
    complete; weights of an earlier checkpoint in the folder go then.

    Args:
      dry: make every part and write nothing, for the processes of a pod that only help to gather.
      threads: that make parts ahead of the writing.
      progress: told the bytes written since it was last called.
    """
    shards = _shards(list(tensors), max_shard_bytes)
    total = len(shards)
    names = (
        [SINGLE]
        if total == 1
        else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )
    if dry:
        parts = (part for shard in shards for planned in shard for part in planned.parts)
        collections.deque(in_order(parts, threads), maxlen=0)
        return
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / f"{name}.partial", shard, threads, progress)
    for old in (folder / INDEX, *folder.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    for name in names:
        os.replace(folder / f"{name}.partial", folder / name)
    if total > 1:
        weight_map = {planned.name: name for name, shard in zip(names, shards) for planned in shard}
        size = sum(planned.nbytes for shard in shards for planned in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def cast(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds to `dtype`; float16 is the one target that bfloat16 and float32 overflow."""
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype, copy=False)
    narrowed = dtype == np.float16 and x.dtype != np.float16
    if narrowed and np.isinf(rounded).any() and not np.isinf(x).any():
        raise ValueError(f"{name} has values beyond float16; choose bfloat16 or float32")
    return rounded


def require_new(target: Path) -> None:
    """
    Raises:
      FileExistsError: `target` is neither a new nor an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; remove it or give another --to")


def _shards(tensors, max_shard_bytes):
    shards, size = [[]], 0
    for planned in tensors:
        if shards[-1] and size + planned.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    return shards


def _write_file(file: Path, tensors: list[Planned], threads, progress):
    """Length of the header, JSON header, bytes: the library itself only writes from memory."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for planned in tensors:
        header[planned.name] = {
            "dtype": _DTYPE_NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # keeps the tensors aligned
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for part in in_order((part for planned in tensors for part in planned.parts), threads):
            stream.write(part.reshape(-1).view(np.uint8).data)
            progress(part.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
        if stream.tell() != 8 + len(encoded) + offset:
            raise AssertionError(f"{file}: the parts are not the size of their tensors")
