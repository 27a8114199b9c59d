"""Pictures that stand inside the records: bytes of a Parquet column, data URLs, base64 in a table.

Reading moves them into one SQLite file and leaves a reference in the record. So the record is plain JSON, and every
picture is kept once, under the hash of its bytes.
"""

import base64
import binascii
import contextlib
import hashlib
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pangea_jax.data.build import archives

ARCHIVE = ":inside the records:"
"""What `archives.Place.archive` says of these pictures. No archive has this name."""

_REFERENCE = "\0embedded"
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
# The first letters of JPEG, PNG, GIF, WebP and BMP in base64. Shorter texts may be names of files.
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0")
_SHORTEST = 200


def digest(data: bytes) -> str:
    """The name of a picture by its bytes: 128 bits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def reference_of(value: Any) -> tuple[str, int] | None:
    """The digest and the number of bytes that a reference holds; None if the value is not a reference."""
    if isinstance(value, Mapping) and isinstance(value.get(_REFERENCE), str):
        return value[_REFERENCE], int(value.get("size") or 0)
    return None


def without_reference(value: dict[str, Any]) -> dict[str, Any]:
    """An object of JSON text inside a record, which may not name a picture that `Writer` has taken."""
    return {name: part for name, part in value.items() if name != _REFERENCE}


class Writer:
    """Takes pictures out of records. A new writer forgets what an earlier one has written."""

    def __init__(self, database: Path):
        database.parent.mkdir(parents=True, exist_ok=True)
        database.unlink(missing_ok=True)
        self._path, self._database = database, None

    def take(self, value: Any) -> Any:
        """The record with a reference in the place of each picture.

        A picture is bytes, `{"bytes": ...}` as `datasets` writes an Image column, a data URL, or base64.
        """
        if isinstance(value, bytes):
            return self._keep(value) if value else None
        if isinstance(value, str):
            return self._taken_from_text(value)
        if isinstance(value, Mapping):
            if isinstance(value.get("bytes"), bytes) and value["bytes"]:
                return self._keep(value["bytes"])
            # A record that has the name of a reference itself could name any picture.
            return {name: self.take(part) for name, part in value.items() if name != _REFERENCE}
        if isinstance(value, list | tuple):
            return [self.take(part) for part in value]
        return value

    def _taken_from_text(self, text: str) -> Any:
        url = _DATA_URL.match(text[:100])
        if not url and (len(text) < _SHORTEST or not text.startswith(_BASE64)):
            return text
        try:
            data = base64.b64decode(text[url.end() if url else 0 :], validate=True)
        except (binascii.Error, ValueError):
            return text
        return self._keep(data)

    def _keep(self, data: bytes) -> dict[str, Any]:
        """A reference to a picture. One that is too large to be read is not kept."""
        name = digest(data)
        if len(data) > archives.MAX_BYTES:
            return {_REFERENCE: name, "size": len(data)}
        if self._database is None:
            self._database = sqlite3.connect(self._path, check_same_thread=False)
            self._database.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE pictures (digest TEXT PRIMARY KEY, data BLOB)"
            )
        self._database.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?)", (name, data))
        return {_REFERENCE: name, "size": len(data)}

    def close(self) -> None:
        """Writes all pictures to disk."""
        if self._database is not None:
            self._database.commit()
            self._database.close()
            self._database = None


def read(database: Path, name: str) -> bytes:
    """The bytes of a picture by its digest.

    Raises:
      OSError: the file does not have it.
    """
    uri = f"{database.resolve().as_uri()}?immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            query = "SELECT data FROM pictures WHERE digest = ?"
            row = connection.execute(query, (name,)).fetchone()
    except sqlite3.Error as error:
        raise OSError(f"{database} cannot be read: {error}") from None
    if row is None:
        raise OSError(f"{database} has no picture {name}")
    return row[0]
