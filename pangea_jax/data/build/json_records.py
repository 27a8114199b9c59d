"""Streams records from JSON: one array, or one value a line. A record that cannot be used ends nothing.

A record is parsed alone, within limits on its length, depth and numbers. What breaks a limit is yielded as an object
with the key `pangea_jax.data.record.UNREADABLE`, which `Conversation.from_pangeains` rejects with its id. Bytes that
are not UTF-8 become halves of surrogate pairs, which are rejected in the same way. Only a file whose records cannot
be told apart is an error.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from pangea_jax.data.record import UNREADABLE

MAX_BYTES = 16 << 20  # a record of PangeaIns has 2 kB
MAX_NESTING = 100  # records of PangeaIns have 3 levels
TOO_DEEP = f"nested more than {MAX_NESTING} levels deep"
TOO_LONG = f"longer than {MAX_BYTES:,} bytes"
_LEAST_INTEGER, _MOST_INTEGER, _MOST_DIGITS = -(1 << 63), (1 << 64) - 1, 20
_BLOCK = 1 << 18
_SPACE = re.compile(r"[ \t\n\r]*")
_MARKS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
_ID = re.compile(r'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?[\d.]{1,30})')
# The beginnings of the words of JSON that a block may cut.
_CUT_WORD = re.compile(
    r"-?(I|In|Inf|Infi|Infin|Infini|Infinit)?|t|tr|tru|f|fa|fal|fals|n|nu|nul|N|Na|\.|[eE][+-]?"
)


class Malformed(ValueError):
    """The text is not JSON from some byte on.

    Attributes:
      problem: what is wrong.
      offset: the byte.
      ended: whether the text only ends too early.
    """

    def __init__(self, problem: str, offset: int, *, ended: bool = False):
        self.problem, self.offset, self.ended = problem, offset, ended
        super().__init__(f"byte {offset:,}: {problem}")


def read_array(file: BinaryIO, on_bytes: Callable[[int], Any]) -> Iterator[Any]:
    """The values of one JSON array.

    Raises:
      Malformed: the file is no array, or the array is broken.
    """
    text = _Text(file, on_bytes)
    if text.peek() == "\ufeff":  # the byte order mark
        text.at += 1
    if text.peek() != "[":
        raise Malformed(f"expected an array of records, found {text.peek()!r}", 0)
    text.at += 1
    if text.peek() == "]":
        text.at += 1
    else:
        yield from _items(text)
    if text.peek():
        raise Malformed("trailing garbage after the array", text.offset())


def _items(text: "_Text") -> Iterator[Any]:
    """The values up to the `]` of the array, which is read too."""
    while True:
        if not text.peek():
            raise Malformed("no more values", text.offset(), ended=True)
        yield text.value()
        mark = text.peek()
        if mark not in (",", "]"):
            raise Malformed("expected ',' or ']'", text.offset(), ended=not mark)
        text.at += 1
        if mark == "]":
            return


def read_lines(file: BinaryIO, on_bytes: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """(number from 1 on, value) of every line that is not empty.

    Raises:
      Malformed: a line is not JSON.
    """
    decoder, offset, number = _Decoder(), 0, 0
    while line := file.readline(MAX_BYTES + 1):
        number, size, rest = number + 1, len(line), line
        while not rest.endswith(b"\n") and (rest := file.readline(MAX_BYTES)):
            size += len(rest)
        on_bytes(size)
        mark = len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
        text = line[mark:].decode("utf-8", "surrogateescape")
        if size > MAX_BYTES:
            yield number, unreadable(text[:1000], TOO_LONG)
        elif text.strip():
            yield number, _of_line(decoder, text, number, offset + mark)
        offset += size


def _of_line(decoder: "_Decoder", text: str, number: int, offset: int) -> Any:
    try:
        value, end = decoder.value(text, _SPACE.match(text).end())
        end = _SPACE.match(text, end).end()
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except json.JSONDecodeError as error:
        raise Malformed(f"line {number}: {error.msg}", offset + _size(text[: error.pos])) from None
    except RecursionError:
        return unreadable(text[:1000], TOO_DEEP)


def unreadable(head: str, why: str) -> dict[str, str]:
    """What stands for a record that cannot be read.

    Args:
      head: its beginning, in which its id may be.
    """
    found = _ID.search(head)
    try:
        id = str(json.loads(found[1])) if found else ""
    except ValueError:
        id = ""
    return {"id": id, UNREADABLE: why}


def stand_in(record: Any, why: str) -> dict[str, Any]:
    """What stands for a record that was read, but breaks a limit."""
    id = record.get("id", "") if isinstance(record, dict) else ""
    id = id[:200] if isinstance(id, str) else id if isinstance(id, int | float) else ""
    return {"id": id, UNREADABLE: why}


class _Decoder:
    """Parses single values, and replaces those that break a limit."""

    def __init__(self):
        self._faults: list[str] = []
        self._json = json.JSONDecoder(
            parse_int=self._integer, parse_float=self._float, parse_constant=self._fault
        )

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """The value at a place of a text, and the place after it.

        Raises:
          JSONDecodeError, RecursionError: as `raw_decode`.
        """
        self._faults.clear()
        value, end = self._json.raw_decode(text, at)
        why = self._faults[0] if self._faults else ""
        if not is_shallow(value):
            why = TOO_DEEP
        elif end - at > MAX_BYTES:
            why = TOO_LONG
        if why:
            value = stand_in(value, why)
        return value, end

    def _integer(self, digits: str) -> int | str:
        if len(digits) > _MOST_DIGITS or not _LEAST_INTEGER <= int(digits) <= _MOST_INTEGER:
            return self._fault(digits)
        return int(digits)

    def _float(self, digits: str) -> float | str:
        number = float(digits)
        return number if math.isfinite(number) else self._fault(digits)

    def _fault(self, text: str) -> str:
        """The text of a number that cannot be used; its beginning if it is long."""
        short = text if len(text) <= 40 else f"{text[:30]}... ({len(text):,} characters)"
        self._faults.append(f"holds the number {short}, which is not finite or needs over 64 bits")
        return short


class _Text:
    """The text of a file, of which only the part in front is in memory.

    Attributes:
      at: place of the next character in that part.
    """

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], Any]):
        self._file, self._on_bytes = file, on_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._decoder = _Decoder()
        self._part, self.at, self._start, self._ended = "", 0, 0, False

    def offset(self, at: int | None = None) -> int:
        """The byte of a place in the part in memory, by default of `at`."""
        return self._start + _size(self._part[: self.at if at is None else at])

    def peek(self) -> str:
        """The next character that is no space; `at` is moved to it. Empty at the end."""
        while True:
            self.at = _SPACE.match(self._part, self.at).end()
            if self.at < len(self._part):
                return self._part[self.at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Parses the value at `at` and moves behind it.

        Raises:
          Malformed: it is not JSON, or the file ends in it.
        """
        while True:
            try:
                value, end = self._decoder.value(self._part, self.at)
            except RecursionError:
                return self._skip(TOO_DEEP)
            except json.JSONDecodeError as error:
                if not _at_end(error):
                    problem = f"{error.msg} at {self._part[error.pos : error.pos + 10]!r}"
                    raise Malformed(problem, self.offset(error.pos)) from None
                if len(self._part) - self.at > MAX_BYTES:
                    return self._skip(TOO_LONG)
                if not self._more():
                    end = self.offset(len(self._part))
                    raise Malformed(error.msg, end, ended=True) from None
            else:
                # The next block may have more digits of a number.
                if end < len(self._part) or not self._more():
                    self.at = end
                    return value

    def _more(self) -> bool:
        """Drops what is before `at`, and reads as much as is left of it, at least a block; False at the end."""
        if self._ended:
            return False
        self._start, left = self.offset(), self._part[self.at :]
        data = self._file.read(max(_BLOCK, len(left)))
        self._on_bytes(len(data))
        self._ended = not data
        self._part, self.at = left + self._utf8.decode(data, final=self._ended), 0
        return len(self._part) > len(left) or not self._ended

    def _skip(self, why: str) -> dict[str, str]:
        """Moves behind the value at `at` without keeping it."""
        stand_in, depth, quoted = unreadable(self._part[self.at : self.at + 1000], why), 0, False
        while True:
            seen = self.at
            for mark in _MARKS.finditer(self._part, self.at):
                seen = mark.end()
                if mark[0] == '"':
                    quoted = not quoted
                elif not quoted and mark[0] in "[{":
                    depth += 1
                elif not quoted and mark[0] in "]}":
                    depth -= 1
                if not quoted and depth <= 0 and mark[0] in '"]}':
                    self.at = seen
                    return stand_in
            # A backslash at the end belongs to the next character.
            cut = self._part.endswith("\\") and seen < len(self._part)
            self.at = len(self._part) - cut
            if not self._more():
                raise Malformed(why, self.offset(len(self._part)), ended=True)


def _at_end(error: json.JSONDecodeError) -> bool:
    """Whether the fault may only be that the text ends here."""
    if error.msg.startswith("Unterminated string"):
        return True
    rest = error.doc[error.pos : error.pos + 10]
    # An escape that is cut, `\u12`, is named by the place of its digits.
    escape = "escape" in error.msg and error.pos + 6 >= len(error.doc)
    return escape or (len(rest) < 10 and bool(_CUT_WORD.fullmatch(rest.rstrip(" \t\n\r"))))


def _size(text: str) -> int:
    """The number of bytes in the file."""
    return len(text.encode("utf-8", "surrogateescape"))


def is_shallow(record: Any) -> bool:
    """Whether a record is nested so little that every writer and worker can handle it."""
    level = [record]
    for _ in range(MAX_NESTING + 1):
        level = [value for value in level if isinstance(value, dict | list | tuple)]
        if not level:
            return True
        level = [
            part
            for value in level
            for part in (value.values() if isinstance(value, dict) else value)
        ]
    return False


def within_depth(record: Any) -> Any:
    """The record itself, or what stands for it if it is nested too deeply."""
    return record if is_shallow(record) else stand_in(record, TOO_DEEP)
