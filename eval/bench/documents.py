"""Reads documents from `DATA_DIR/<data set>/<subset>.jsonl`, one row per line; pictures are files beside it.

Every row has an `id`, unique in its file, and the fields of its data set (`Dataset.fields`). `images` is a list of
paths relative to `DATA_DIR/<data set>/`. Subsets share picture files, and translations of one document share their id,
because bootstrap intervals are clustered by both.
"""

import json
import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from eval.bench.task import OWN, Dataset, Document, Task

T = TypeVar("T")


class DataError(ValueError):
    """Evaluation data is missing or malformed; the message names the file and the line."""


def own_fault(error: BaseException, code: Path) -> DataError:
    """What a Python file of one's own raised, and in which of its lines."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(code)]
    if isinstance(error, SyntaxError) and error.filename == str(code):
        lines = [error.lineno]
    where = f"{code}, line {lines[-1]}" if lines else str(code)
    problem = " ".join(str(error).split())[:300]
    return DataError(f"{where}: {type(error).__name__}: {problem}; correct the file")


def call(dataset: Dataset, kind: type[T] | tuple[type, ...], method: Callable[..., T], *args) -> T:
    """The result of a method of a data set.

    Raises:
      DataError: the code of one's own task raised, or gave something of another kind.
    """
    if dataset.code is None:
        return method(*args)
    of = f"document {args[0].id!r:.60} in {type(dataset).__name__}.{method.__name__}"
    try:
        found = method(*args)
    except Exception as error:
        raise DataError(f"{own_fault(error, dataset.code)} ({of})") from error
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise DataError(f"{dataset.code}: {of} gave {found!r:.60}, expected {names}")
    return found


def task_file(task: Task, data_dir: Path | None) -> Path:
    """The file of a task. One's own tasks name theirs, and need no data folder."""
    return task.dataset.file(task.subset, data_dir or Path())


def limit_mark(path: Path) -> Path:
    """The marker beside `path`; it exists if `fetch --limit` wrote only the first rows of the source."""
    return path.with_name(path.name + ".limited")


def rows_fetched(path: Path) -> float:
    """The number of rows in a task's file; infinite if it has all rows of its source."""
    return sum(1 for _ in read_lines(path)) if limit_mark(path).exists() else math.inf


def load(task: Task, data_dir: Path | None, *, limit: float | None = None) -> list[Document]:
    """The documents of a task, or the first ones if there is a limit.

    Args:
      limit: a number of documents, or a share of them if below 1.

    Raises:
      DataError: the file is missing, or a row does not follow the layout.
    """
    path = task_file(task, data_dir)
    if not path.is_file():
        raise DataError(f"{path}: no such file, needed by {task.name}; {_remedy(task, 'make it')}")
    documents, seen = [], set()
    for number, row in read_lines(path):
        where = f"{path}, line {number}"
        document = parse_row(task.dataset.prepare(row, number), task.dataset, where)
        if task.dataset.group == OWN:
            _check_pictures(document, path.parent, where)
        if document.id in seen:
            raise DataError(f"{where}: id {document.id!r} occurs twice; ids are unique in a file")
        seen.add(document.id)
        documents.append(document)
    if not documents:
        raise DataError(f"{path}: no documents; {_remedy(task, 'delete the file and make it')}")
    return documents[: cut(len(documents), limit)]


def cut(whole: int, limit: float | None) -> int:
    """The number of documents that a limit leaves of `whole`."""
    if limit is None:
        return whole
    return min(whole, max(1, round(limit * whole)) if limit < 1 else int(limit))


def count(path: Path) -> int:
    """The number of documents in a file, 0 if there is no file."""
    if not path.is_file():
        return 0
    with path.open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def _remedy(task: Task, action: str) -> str:
    if task.dataset.group == OWN:
        return (
            "data_files, or files of a class, names a JSONL file relative to the task's own file, with one JSON object "
            "per line, see docs/evaluation.md"
        )
    return f"{action} on a machine with a network: python eval/run.py fetch --tasks={task.name} --data_dir=DIR"


def _check_pictures(document: Document, folder: Path, where: str) -> None:
    """One's own data is corrected before a model is asked; a public set may lack a picture."""
    for name in document.images:
        if not (folder / name).is_file():
            raise DataError(
                f"{where}: picture {name!r} does not exist in {folder}; paths are relative to the JSONL file"
            )


def parse_row(row: Any, dataset: Dataset, where: str) -> Document:
    """Checks a row and returns it as a document."""
    if not isinstance(row, dict):
        found = f"got {type(row).__name__}; a file has one object per line, and no list around them"
        raise DataError(f"{where}: expected a JSON object, {found}")

    def refuse(name: str, expected: str):
        raise DataError(f"{where}: field {name!r} is {row.get(name)!r:.60}, expected {expected}")

    if not isinstance(row.get("id"), str) or not row["id"]:
        refuse("id", "a text")
    for name, kind in dataset.fields.items():
        if name not in row:
            raise DataError(
                f"{where}: no field {name!r}; {dataset.name} needs {', '.join(dataset.fields)}"
            )
        value, kinds = row[name], kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            refuse(name, " or ".join(k.__name__ for k in kinds))
        if kind is list and not all(isinstance(item, str) for item in value):
            refuse(name, "a list of texts")
        if name == dataset.gold and value == []:
            raise DataError(f"{where}: field {name!r} is empty, expected at least one text")
    if problem := dataset.problem(row):
        raise DataError(f"{where}: {problem}")
    images = row.get("images", [])
    if not (isinstance(images, list) and all(isinstance(path, str) for path in images)):
        refuse("images", "a list of paths")
    for path in images:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise DataError(f"{where}: picture {path!r} is outside the folder of {dataset.name}")
    return Document(row["id"], row)


def read_answers(path: Path, field: str) -> dict[tuple[str, str], Any]:
    """(task, document) -> `field`, of a JSONL file whose lines have `task`, `doc_id` and `field`.

    Raises:
      DataError: a line lacks one of them, or repeats a document.
    """
    found: dict[tuple[str, str], Any] = {}
    for number, row in read_lines(path):
        where = f"{path}, line {number}"
        for name in ("task", "doc_id", field):
            if not isinstance(row, dict) or name not in row:
                raise DataError(f"{where}: no field {name!r}; expected task, doc_id and {field}")
        if not all(isinstance(row[name], str | int | float) for name in ("task", "doc_id")):
            raise DataError(f"{where}: expected texts or numbers as task and doc_id")
        key = str(row["task"]), str(row["doc_id"])
        if key in found:
            raise DataError(f"{where}: a second {field} to {key[0]:.80} {key[1]!r:.80}")
        found[key] = row[field]
    return found


def drop_cut_line(path: Path) -> None:
    """Removes an incomplete last line, which a killed run may leave in a file that it appends to."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each non-empty line of a JSONL file.

    Raises:
      DataError: a line is not JSON, is nested too deeply, or has half a character or an endless number, or the file is
        not UTF-8.
    """
    with path.open("rb") as lines:
        try:
            for number, content in enumerate(lines, 1):
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    value = json.loads(line)
                    if "\\ud" in line.lower():
                        # JSON can spell one half of a UTF-16 surrogate pair, which UTF-8 cannot.
                        json.dumps(value, ensure_ascii=False).encode()
                    yield number, value
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deeply") from None
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}, line {number}: half a character ({error}); write it whole, or \\ufffd"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 text ({error}); save the file as UTF-8"
            ) from error
        except ValueError as error:  # Python reads no number of thousands of digits
            raise DataError(f"{path}, line {number}: {error}"[:300]) from None
