"""Writes files completely or not at all, even if the process is killed; and compares JSON values."""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.work import paths
from pangea_jax.work.untrusted import parse_json

REMOVE = "remove it, and run the same command again"


def partial_path(path: Path) -> Path:
    """A temporary name beside `path`: write there, then rename. Makes the folder if it is missing.

    The name is new every time. So two workers never write to the same file, even if one survives
    its killed job or Beam runs one twice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file on a disk to write. When the block has ended without an error, it is at `path`, also in a bucket."""
    if paths.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="pangea-") as folder:
            local = Path(folder, path.name)
            yield local
            paths.store(path).put_file(str(local), os.fspath(path))
        return
    partial = partial_path(path)
    yield partial
    os.replace(partial, path)


def write_bytes(path: Path, data: bytes) -> None:
    if paths.is_remote(path):  # an object appears when it is complete
        path.write_bytes(data)
        return
    with writing(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Writes JSON, indented as transformers does."""
    text = json.dumps(value, indent=2, ensure_ascii=ensure_ascii) + "\n"
    write_bytes(path, text.encode())


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    with writing(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_parquet(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows that `write_parquet` has written.

    Raises:
      ValueError: the file is damaged; the message names it.
    """
    try:
        with pq.ParquetFile(paths.for_arrow(path), page_checksum_verification=True) as file:
            return file.read(columns).to_pylist()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} is damaged ({said:.120}); {REMOVE}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      JSONDecodeError: it is not JSON; the message names the file.
    """
    try:
        return parse_json(paths.read_bytes(path).decode("utf-8"))
    except ValueError as error:
        said = f"{path} is damaged: not JSON ({error}); {REMOVE}"
        raise json.JSONDecodeError(said, "", 0) from None


def json_sum(value: Any) -> str:
    """A checksum of a JSON value, equal after it was written and read again."""
    again = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(again, sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """The value after writing it as JSON and reading it back. Other types become texts."""
    return json.loads(json.dumps(value, default=str))


def differences(theirs: Any, ours: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Finds where two JSON values differ.

    Args:
      key: a prefix of the keys.

    Returns:
      key, such as `llm.model` -> (their value, our value); None stands for a missing key.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = {}
        for name in sorted(theirs.keys() | ours.keys()):
            below = f"{key}.{name}".lstrip(".")
            found |= differences(theirs.get(name), ours.get(name), below)
        return found
    return {} if theirs == ours else {key: (theirs, ours)}
