"""Safetensors on disk: find and read the tensors of a folder, write them one at a time."""

import collections
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file or tensor, and what to do."""


class TensorFiles:
    """The tensors of a safetensors file, or of a folder with one file or a sharded index.

    Headers alone are read here; `tensor[slices]` reads the bytes it needs.

    Raises:
      FileNotFoundError: nothing to read at `path`.
      CheckpointError: pickled weights only, a broken file, an index that does not match its files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._files = {file: _open(file) for file in _weight_files(self.path)}
        self._file_of: dict[str, Path] = {}
        for file, opened in self._files.items():
            self._file_of.update(dict.fromkeys(opened.keys(), file))
        _check_index(self.path, self._file_of)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def tensor(self, name: str):
        """A lazy view with `get_shape()` and slicing."""
        return self._files[self._file_of[name]].get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).get_shape())


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is named by {INDEX} but is not there; copy it here"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); fetch it again"
        ) from None


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
    """A tensor to write: `fetch()` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write(folder: Path, tensors: Iterable[Planned], max_shard_bytes: int, *, dry: bool = False):
    """Writes tensors into one file or, beyond `max_shard_bytes`, several with an index.

    One tensor is in memory at a time. Files appear under their names when all of them are complete;
    weights of an earlier checkpoint in the folder go then.

    Args:
      dry: fetch every tensor and write nothing, for the processes of a pod that only help to
        gather.
    """
    shards = _shards(list(tensors), max_shard_bytes)
    total = len(shards)
    names = (
        [SINGLE]
        if total == 1
        else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )
    if dry:
        collections.deque((planned.fetch() for shard in shards for planned in shard), maxlen=0)
        return
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / f"{name}.partial", shard)
    for old in (folder / INDEX, *folder.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    for name in names:
        os.replace(folder / f"{name}.partial", folder / name)
    if total > 1:
        weight_map = {planned.name: name for name, shard in zip(names, shards) for planned in shard}
        size = sum(planned.nbytes for shard in shards for planned in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(file: Path, content: dict):
    """Writes JSON so that a reader sees the old file or the new one, never half of one."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, file)


def _shards(tensors, max_shard_bytes):
    shards, size = [[]], 0
    for planned in tensors:
        if shards[-1] and size + planned.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    return shards


def _write_file(file: Path, tensors: list[Planned]):
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
        for planned in tensors:
            stream.write(planned.fetch().reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
