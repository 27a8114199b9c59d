"""Safetensors on disk: finds and reads the tensors of a folder, and writes them part by part."""

import collections
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pangea_jax.work import paths, untrusted
from pangea_jax.work.atomic import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_INDEX = 256 << 20  # bytes
_HEAD = 1 << 20  # holds the headers of most files

_DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
# Codes of weights in 8 and 4 bits, see `rounded.py`; no other tensor may hold whole numbers.
_CODE_DTYPES = {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
_DTYPE_NAMES |= {dtype: name for name, dtype in _CODE_DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file or tensor and says what to do."""


class Tensor:
    """A tensor in a file. A slice reads only its rows.

    The safetensors library would map whole files into memory. Pages that were read then count as memory of this process
    until the file is closed, in the end the whole checkpoint.
    """

    def __init__(self, file: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int):
        self.file, self.name, self.shape = file, name, shape
        self._dtype, self._offset = dtype, offset

    @property
    def dtype(self) -> np.dtype:
        if self.name.endswith(".codes") and self._dtype in _CODE_DTYPES:
            return _CODE_DTYPES[self._dtype]
        if self._dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} is {self._dtype}, but only "
                f"{', '.join(_DTYPES)} are supported; quantised checkpoints are not"
            )
        return _DTYPES[self._dtype]

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        start, stop, _ = index[0].indices(self.shape[0])
        row = math.prod(self.shape[1:])
        size = row * self.dtype.itemsize
        first, last = self._offset + start * size, self._offset + stop * size
        if paths.is_remote(self.file):
            found = np.frombuffer(bytearray(paths.read_range(self.file, first, last)), np.uint8)
        else:
            found = np.fromfile(self.file, np.uint8, count=last - first, offset=first)
        if found.size != last - first:
            raise CheckpointError(f"{self.file} ends within tensor {self.name}; fetch it again")
        return found.view(self.dtype).reshape(stop - start, *self.shape[1:])[
            (slice(None), *index[1:])
        ]


class TensorFiles:
    """The tensors of a safetensors file, or of a folder with one file or a sharded index.

    Only headers are read here. `tensor(name)[slices]` reads the bytes it needs.

    Raises:
      FileNotFoundError: there are no weights at `path`.
      CheckpointError: only pickled weights, a broken file, or an index that does not match its files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = paths.path(path)
        index = _weight_map(self.path) if (self.path / INDEX).is_file() else {}
        found = [tensor for file in _weight_files(self.path, index) for tensor in _header(file)]
        self._tensors = {tensor.name: tensor for tensor in found}
        present = {(tensor.name, tensor.file.name) for tensor in found}
        wrong = sorted(name for name, file in index.items() if (name, file) not in present)
        if wrong:
            raise CheckpointError(
                f"{self.path / INDEX} does not match its files, which lack {len(wrong)} of its tensors "
                f"({', '.join(wrong[:5])}); fetch the folder again"
            )

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def dtype(self, names: Sequence[str]) -> np.dtype:
        """The common dtype of these tensors, which become one parameter.

        Raises:
          CheckpointError: they have different dtypes.
        """
        found = {self._tensors[name].dtype.name: name for name in names}
        if len(found) > 1:
            listed = ", ".join(f"{name} is {dtype}" for dtype, name in sorted(found.items()))
            raise CheckpointError(f"{self.path}: {listed}; choose a dtype for all")
        return self._tensors[names[0]].dtype


def _header(file: Path) -> list[Tensor]:
    """The tensors of one file. The library checks first that header and bytes are complete."""
    try:
        untrusted.require_regular(file)
        header, offset = _checked_header(file)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} is named by {INDEX} but is not there; copy it here"
        ) from None
    except untrusted.NotRegular as error:
        raise CheckpointError(str(error)) from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); fetch it again"
        ) from None
    return [
        Tensor(file, name, x["dtype"], tuple(x["shape"]), offset + x["data_offsets"][0])
        for name, x in header.items()
    ]


def _checked_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, which the library has checked against its size, and where the bytes of tensors begin.

    The library reads files on disks alone. So it gets a file of the same size with the same header, and no other bytes.
    """
    with contextlib.ExitStack() as held:
        local = file
        if paths.is_remote(file):
            local = Path(
                held.enter_context(tempfile.NamedTemporaryFile(suffix=".safetensors")).name
            )
            head = paths.read_range(file, 0, _HEAD)
            length = int.from_bytes(head[:8], "little")
            if _HEAD < 8 + length <= _MOST_INDEX:
                head += paths.read_range(file, _HEAD, 8 + length)
            local.write_bytes(head)
            os.truncate(local, paths.size(file))
        safe_open(local, framework="numpy")
        with open(local, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _weight_files(path: Path, index: dict[str, str]) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is no .safetensors file; {_CONVERT}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint at {path}: expected a folder or a .safetensors file"
        )
    if index:
        return [path / file for file in sorted(set(index.values()))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(f"{path} has pickled weights only ({', '.join(pickled)}); {_CONVERT}")
    raise FileNotFoundError(f"no {SINGLE} and no {INDEX} in {path}")


_CONVERT = (
    "unpickling runs code from the file, so it is not done here: if you trust the file, load it with "
    "transformers and call save_pretrained(..., safe_serialization=True)"
)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = untrusted.parse_json(untrusted.read_regular(path / INDEX, _MOST_INDEX))
        weight_map = content["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError(f"weight_map is a {type(weight_map).__name__}, not an object")
    except (ValueError, KeyError, TypeError, untrusted.NotRegular, untrusted.TooLarge) as error:
        raise CheckpointError(f"{path / INDEX} is no index of tensors ({error!r})") from None
    for name, file in weight_map.items():
        if not _is_plain_name(file):
            raise CheckpointError(
                f"{path / INDEX}: tensor {name!r} is placed in {file!r}, which is not a "
                ".safetensors file of this folder"
            )
    return weight_map


def _is_plain_name(file: Any) -> bool:
    """Whether a value is the name of a .safetensors file without a folder."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
        return False
    # Systems have a limit of 255 bytes. Half a surrogate pair is not printable.
    return Path(file).name == file and len(file.encode()) <= 255


class Planned(NamedTuple):
    """A tensor to write. Its bytes are what `parts` return, one after the other."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Sequence[Callable[[], np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(jobs: Iterable[Callable], threads: int) -> Iterator:
    """Yields the results of the jobs in order.

    `threads` threads run jobs ahead, up to twice as many jobs as threads. 0 runs the jobs in this thread.
    """
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

    Only a few parts are in memory at a time. Files get their names when all are complete. Then weights of an earlier
    checkpoint in the folder are removed.

    Args:
      dry: make every part but write nothing, for processes of a pod that only help to gather.
      threads: number of threads that make parts before they are written.
      progress: called with the number of bytes written since its last call.
    """
    tensors = list(tensors)
    if dry:
        parts = (part for planned in tensors for part in planned.parts)
        collections.deque(in_order(parts, threads), maxlen=0)
        return
    shards, size = [[]], 0
    for planned in tensors:
        if shards[-1] and size + planned.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    total = len(shards)
    names = [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    names = [SINGLE] if total == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / f"{name}.partial", shard, threads, progress)
    for old in (folder / INDEX, *folder.glob("model*.safetensors")):
        old.unlink(missing_ok=True)
    for name in names:
        (folder / f"{name}.partial").replace(folder / name)
    if total > 1:
        weight_map = {planned.name: name for name, shard in zip(names, shards) for planned in shard}
        size = sum(planned.nbytes for planned in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


# The exponent of NaN and infinity, by dtype.
_NOT_FINITE = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float32): np.uint32(0x7F800000),
}
_CHECKED = 1 << 20  # values at once, so that the check takes little memory


def check_finite(x: np.ndarray, file: Path, name: str) -> np.ndarray:
    """Returns `x`. It reads the bits, which is several times as fast as `np.isfinite`.

    Raises:
      CheckpointError: a value is NaN or infinite; the message names the tensor.
    """
    mask = _NOT_FINITE.get(x.dtype)
    if mask is None:
        return x
    bits = np.ascontiguousarray(x).reshape(-1).view(mask.dtype)
    for start in range(0, bits.size, _CHECKED):
        part = bits[start : start + _CHECKED]
        if ((part & mask) == mask).any():
            raise CheckpointError(
                f"{file}: {name} has values that are NaN or infinite; fetch it again"
            )
    return x


def cast(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Rounds to `dtype`.

    Raises:
      ValueError: a finite value is too large for float16. The other dtypes have the range of float32.
    """
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype, copy=False)
    narrowed = dtype == np.float16 and x.dtype != np.float16
    if narrowed and np.isinf(rounded).any() and not np.isinf(x).any():
        raise ValueError(f"{name} has values beyond float16; choose bfloat16 or float32")
    return rounded


def check_fit(
    path: Path,
    what: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    unexpected: Collection[str] = (),
) -> None:
    """Compares the shapes in a checkpoint with those of its config.

    Raises:
      CheckpointError: one message names everything that is missing, unexpected or of another shape.
    """
    misshapen = [
        f"{name} is {found[name]}, the config says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{label} {len(names)}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for label, names in (
            ("missing", set(expected) - set(found)),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the config; {what} " + "; ".join(problems))


def require_new(target: Path) -> None:
    """Raises FileExistsError if `target` is neither a new nor an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; remove it or give another --to")


def _write_file(file: Path, tensors: list[Planned], threads, progress):
    """Writes header length, JSON header and bytes. The library can only write tensors that are all in memory."""
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
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for part in in_order((part for planned in tensors for part in planned.parts), threads):
            stream.write(part.reshape(-1).view(np.uint8).data)
            progress(part.nbytes)
        if not paths.is_remote(file):
            stream.flush()
            os.fsync(stream.fileno())
        if stream.tell() != 8 + len(encoded) + offset:
            raise AssertionError(f"{file}: the parts are not the size of their tensors")
