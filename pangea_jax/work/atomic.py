"""Files that are there whole or not at all, whoever is killed while writing; and where two of JSON differ."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def partial_path(path: Path) -> Path:
    """Where to write a file that is then renamed to `path`.

    The name is new every time: a worker that outlives its killed build, or that Beam runs twice,
    never writes into the file of another.
    """
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file; its folder must be there."""
    partial = partial_path(path)
    partial.write_bytes(data)
    os.replace(partial, path)


def write_json(path: Path, value: Any, *, ensure_ascii: bool = True) -> None:
    """Writes a file of JSON, indented as transformers does; its folder must be there."""
    text = json.dumps(value, indent=2, ensure_ascii=ensure_ascii) + "\n"
    write_bytes(path, text.encode())


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    partial = partial_path(path)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial, compression="zstd")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def differences(theirs: Any, ours: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ.

    Args:
      key: that of the values themselves, of which the others begin.

    Returns:
      key, as `llm.model`, to what is there and here; None where one has no such key.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = {}
        for name in sorted(theirs.keys() | ours.keys()):
            below = f"{key}.{name}".lstrip(".")
            found |= differences(theirs.get(name), ours.get(name), below)
        return found
    return {} if theirs == ours else {key: (theirs, ours)}
