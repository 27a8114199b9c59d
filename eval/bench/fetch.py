"""Downloads PangeaBench from the Hugging Face hub into the layout of eval/bench/documents.py.

The field names of the hub's data sets come from their cards and from the harnesses that read them. The name of a
picture file is a hash of its pixels, so that a picture shared by several languages is stored once.
"""

import ast
import base64
import binascii
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console

from eval.bench import documents
from eval.bench.metrics.choices import LETTERS
from eval.bench.models import png
from eval.bench.task import Subset, Task
from eval.bench.tasks import DATASETS, cvqa, flores, m3exam, mmmlu
from pangea_jax import languages
from pangea_jax.data import image
from pangea_jax.work import atomic

Row = Mapping[str, Any]
_RETRIES = 2
_CONVERTED = "hf://datasets/{}@refs%2Fconvert%2Fparquet"


class Source(NamedTuple):
    """Where the rows of a subset come from: the arguments of `datasets.load_dataset`."""

    path: str
    config: str | None
    split: str


class Converted(NamedTuple):
    """A row of the layout without its pictures, and the pictures as the hub gives them."""

    row: dict[str, Any]
    pictures: Sequence[Any] = ()


def fetch(
    tasks: Sequence[Task],
    data_dir: Path,
    *,
    console: Console,
    limit: float | None = None,
    load: Callable[[Source], Iterator[Row]] | None = None,
) -> int:
    """Writes the missing files of `tasks`; returns 1 if some files could not be made.

    Args:
      limit: rows of each file. A file with fewer rows than its source gets a marker (`documents.limit_mark`), and a
        later call with a higher limit writes it again.
      load: reads the rows of a source; the hub by default.

    Raises:
      DataError: the limit is a share below 1; the number of rows is unknown before the download.
    """
    if limit is not None and limit != int(limit):
        raise documents.DataError(f"--limit={limit}: fetch takes a number of rows, 1 or more")
    files: dict[Source, list[_TaskFile]] = {}
    for task in tasks:
        path = documents.task_file(task, data_dir)
        if path.exists() and (limit or math.inf) <= documents.rows_fetched(path):
            console.print(f"{task.name}: there already")
            continue
        make_source, _ = _SOURCES[task.dataset.name]
        source = make_source(task.subset)
        files.setdefault(source, []).append(_TaskFile(task, path, source, limit or math.inf))
    failed = False
    for source in list(files):
        members = files.pop(source)
        _read_source(source, members, load or load_from_hub)
        for file in members:
            file.finish(console)
            failed |= file.error is not None
    return int(failed)


def load_from_hub(source: Source) -> Iterator[Row]:
    """The rows of a data set on the hub, streamed; pictures stay encoded.

    The datasets package no longer runs loading scripts; for repositories with one, the hub's Parquet copy is read.
    """
    try:
        import datasets
    except ImportError:
        raise documents.DataError(
            "fetching needs the datasets package; run: pip install -r requirements-eval.txt"
        ) from None
    # The hub's client also retries, with its own waits; the default of 20 would take ten minutes.
    datasets.config.STREAMING_READ_MAX_RETRIES = _RETRIES
    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split, streaming=True)
    except (RuntimeError, ValueError) as error:
        if not re.search("dataset scripts|trust_remote_code", str(error), re.IGNORECASE):
            raise
        files = f"{_CONVERTED.format(source.path)}/{source.config or 'default'}/{source.split}"
        rows = datasets.load_dataset(
            "parquet", data_files=f"{files}/*.parquet", split="train", streaming=True
        )
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    yield from rows


@dataclasses.dataclass
class _TaskFile:
    """The file of a task while it is made; its error does not affect other files."""

    task: Task
    path: Path
    source: Source
    limit: float
    lines: list[str] = dataclasses.field(default_factory=list)
    ids: set[str] = dataclasses.field(default_factory=set)
    limited: bool = False  # the source has more
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.limited or self.error is not None

    def add(self, hub_row: Row, index: int) -> None:
        """Takes a row of the source if it belongs to this task."""
        self.limited = len(self.lines) >= self.limit
        if self.done:
            return
        try:
            self._add(hub_row, index)
        except Exception as error:
            self.error = error

    def _add(self, hub_row: Row, index: int) -> None:
        _, convert = _SOURCES[self.task.dataset.name]
        where = f"{self.source.path}, row {index}"
        try:
            converted = convert(hub_row, self.task.subset, index)
        except KeyError as error:
            fields = ", ".join(sorted(hub_row))
            raise documents.DataError(
                f"row {index} has no field {error}; it has {fields}"
            ) from None
        if converted is None:
            return
        row = converted.row
        if "images" in self.task.dataset.fields:
            row["images"] = [save_picture(p, self.path.parent) for p in converted.pictures]
        document = documents.parse_row(row, self.task.dataset, where)
        if document.id in self.ids:
            raise documents.DataError(f"{where}: id {document.id!r} occurs twice")
        self.ids.add(document.id)
        self.lines.append(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, console: Console) -> None:
        """Writes the file, or prints the error."""
        try:
            if self.error:
                raise self.error
            if not self.lines:
                raise documents.DataError(f"{self.source} has no row of {self.task.subset.name}")
            self._write()
            cut = ", not all" if self.limited else ""
            console.print(f"{self.task.name}: {len(self.lines)} documents{cut}")
        except Exception as error:
            self.error = error
            where = f"{self.task.name}: {self.task.dataset.hub}"
            console.print(f"{where}: {type(error).__name__}: {error}", markup=False)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Marked before the file is written: a kill in between must not leave a short file without its mark.
        mark = documents.limit_mark(self.path)
        if self.limited:
            mark.touch()
        atomic.write_bytes(self.path, "".join(self.lines).encode())
        if not self.limited:
            mark.unlink(missing_ok=True)


def _read_source(source: Source, files: Sequence[_TaskFile], load) -> None:
    """Reads a source once for all its tasks: CVQA has 72 tasks from the same gigabytes."""
    try:
        for index, hub_row in enumerate(load(source)):
            for file in files:
                file.add(hub_row, index)
            if all(file.done for file in files):
                break
    # The hub's client raises errors of many libraries; the other tasks must go on.
    except Exception as error:
        for file in files:
            if not file.done:
                file.error = error


def save_picture(picture: Any, folder: Path) -> str:
    """Stores a picture under `folder`/images and returns its relative path.

    Args:
      picture: encoded bytes, base64 text, `{"bytes": ...}` as datasets has it, or a PIL image.

    Raises:
      ImageError: it cannot be decoded.
    """
    encoded = _encoded(picture)
    decoded = image.decode(encoded)
    name = hashlib.sha256(repr(decoded.size).encode() + decoded.tobytes()).hexdigest()[:20]
    suffix = "jpg" if encoded.startswith(b"\xff\xd8") else "png"
    path = folder / "images" / f"{name}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "png" and not encoded.startswith(b"\x89PNG"):
            encoded = png(decoded)
        atomic.write_bytes(path, encoded)
    return f"images/{path.name}"


def _encoded(picture: Any) -> bytes:
    if isinstance(picture, Mapping):
        picture = picture["bytes"]
    if isinstance(picture, Image.Image):
        return png(picture.convert("RGB"))
    if isinstance(picture, str):
        try:
            return base64.b64decode(picture.partition("base64,")[2] or picture, validate=True)
        except binascii.Error:
            raise image.ImageError("", "the text is not base64") from None
    if not isinstance(picture, bytes):
        raise image.ImageError(
            "", f"expected bytes, base64 or a picture, got {type(picture).__name__}"
        )
    return picture


def _numbered(row: Row, pattern: str, numbers: Sequence[int]) -> list[Any]:
    """The pictures in fields such as `image_1`, up to the first that is empty."""
    pictures = []
    for number in numbers:
        picture = row.get(pattern.format(number))
        if picture in (None, "None", ""):
            break
        pictures.append(picture)
    return pictures


def _xchat(row: Row, subset: Subset, index: int) -> Converted:
    names = ("system_prompt", "input", "reference_answer")
    converted = {"id": f"{row['task']}/{row['instance_idx']}"} | {n: row[n] for n in names}
    return Converted(converted | {"rubric": dict(row["score_rubric"])}, [row["image"]])


def _m_llavabench(row: Row, subset: Subset, index: int) -> Converted:
    caption = row["caption"]
    converted = {
        "id": str(row["question_id"]),
        "question": row["question"] if "question" in row else row["text"],
        "caption": caption if isinstance(caption, str) else "\n".join(caption),
        "gpt_answer": row["gpt_answer"],
        "category": row["category"],
    }
    return Converted(converted, [row["image"]])


def _cvqa(row: Row, subset: Subset, index: int) -> Converted | None:
    pair = subset.name.removeprefix("translated-")
    if row["Subset"] != cvqa.PAIRS[pair][1]:
        return None
    prefix = "Translated " if subset.name.startswith("translated-") else ""
    label = int(row["Label"])
    if not 0 <= label < len(row[f"{prefix}Options"]):
        # The paper's harness makes option D of a hidden label, -1.
        raise documents.DataError(f"{row['ID']}: the label is {label}, this copy hides its answers")
    converted = {
        "id": str(row["ID"]),
        "question": row[f"{prefix}Question"],
        "options": list(row[f"{prefix}Options"]),
        "answer": LETTERS[label],
    }
    return Converted(converted, [row["image"]])


_MARVL_PROMPT = re.compile(
    r"^(?:<image>\s*)?(?:Does the content of the image support the given text\? Text: )?(.*?)"
    r"(?:\s*Options: \(a\) false \(b\) true.*)?$",
    re.DOTALL,
)


def _marvl(row: Row, subset: Subset, index: int) -> Converted:
    if "hypothesis" in row:
        hypothesis, label = row["hypothesis"], row["label"]
        picture = row.get("horizontally_stacked_img", row.get("image"))
    else:
        question, answer = (turn["value"] for turn in row["conversations"][:2])
        hypothesis, label, picture = _MARVL_PROMPT.match(question).group(1), answer, row["image"]
    truth = str(label).strip().lower() in ("true", "1", "yes")
    converted = {"id": str(row.get("id", index)), "hypothesis": hypothesis.strip(), "answer": truth}
    return Converted(converted, [picture])


def _xm100(row: Row, subset: Subset, index: int) -> Converted:
    captions = row.get("captions", row.get("caption"))
    captions = [captions] if isinstance(captions, str) else list(captions)
    return Converted({"id": str(row["image_id"]), "captions": captions}, [row["image"]])


def _xgqa(row: Row, subset: Subset, index: int) -> Converted:
    converted = {"id": str(index), "question": row["question"], "answer": row["answer"]}
    return Converted(converted, [row["image"]])


def _maxm(row: Row, subset: Subset, index: int) -> Converted:
    converted = {"id": str(row.get("question_id", index)), "question": row["question"]}
    return Converted(converted | {"answers": list(row["answers"])}, [row["image"]])


def _xmmmu(row: Row, subset: Subset, index: int) -> Converted:
    options = row["options"]
    if isinstance(options, str):
        options = ast.literal_eval(options.replace("\n", " ")) if options.strip() else []
    answer = row["answer"]
    if isinstance(answer, str) and answer.startswith("["):
        answer = ast.literal_eval(answer)
    converted = {
        "id": str(row["id"]),
        "question": row["question"],
        "options": [str(option) for option in options],
        "answer": answer,
        "question_type": row["question_type"],
    }
    return Converted(converted, _numbered(row, "image_{}", range(1, 8)))


_M3EXAM_MARK = re.compile(r"\(image\)\[(.*?)\]")


def _m3exam(row: Row, subset: Subset, index: int) -> Converted:
    """Marks `(image)[name]` become `<image 1>`, `<image 2>` ... in the order of background, question, options."""
    pictures = _numbered(row, "image_{}", range(10))
    seen: dict[str, int] = {}

    def mark(match: re.Match) -> str:
        number = seen.setdefault(match.group(1), len(seen) + 1)
        return f"<image {number}>" if number <= len(pictures) else ""

    def marked(text: str) -> str:
        return _M3EXAM_MARK.sub(mark, text)

    converted = {
        "id": str(row.get("id", index)),
        "background": [marked(text) for text in row["background_description"]],
        "question": marked(row["question_text"]),
        "options": [marked(text) for text in row["options"]],
        "answer": str(row["answer_text"]),
        "subject": row["subject_category"],
    }
    return Converted(converted, pictures)


def _tydiqa(row: Row, subset: Subset, index: int) -> Converted | None:
    name = str(row["id"]).partition("-")[0]  # "swahili-123-1"
    if name != languages.get(subset.language).english_name.lower():
        return None
    answers = row["answers"]["text"] if isinstance(row["answers"], Mapping) else row["answers"]
    converted = {"id": str(row["id"]), "context": row["context"], "question": row["question"]}
    return Converted(converted | {"answers": list(dict.fromkeys(answers))})


def _flores(row: Row, subset: Subset, index: int) -> Converted:
    source, target = (flores.CODES[code] for code in subset.name.split("-"))
    texts = {"source": row[f"sentence_{source}"], "target": row[f"sentence_{target}"]}
    return Converted({"id": str(row.get("id", index + 1))} | texts)


def _xstorycloze(row: Row, subset: Subset, index: int) -> Converted:
    converted = {
        "id": str(row.get("story_id", index)),
        "sentences": [row[f"input_sentence_{i}"] for i in range(1, 5)],
        "endings": [row["sentence_quiz1"], row["sentence_quiz2"]],
        "answer": int(row["answer_right_ending"]) - 1,
    }
    return Converted(converted)


def _mgsm(row: Row, subset: Subset, index: int) -> Converted:
    answer = str(row["answer_number"])
    return Converted({"id": str(index), "question": row["question"], "answer": answer})


def _mmmlu(row: Row, subset: Subset, index: int) -> Converted:
    if subset.language == "en":
        options, answer = list(row["choices"]), LETTERS[int(row["answer"])]
        question, subject = row["question"], row["subject"]
    else:
        options, answer = [str(row[key]) for key in LETTERS[:4]], row["Answer"]
        question, subject = row["Question"], row["Subject"]
    converted = {"question": question, "options": options, "answer": answer, "subject": subject}
    return Converted({"id": str(index)} | converted)


def _mmmlu_source(subset: Subset) -> Source:
    if subset.language == "en":
        return Source("cais/mmlu", "all", "test")
    return Source(mmmlu.DATASET.hub, mmmlu.LOCALES[subset.language], "test")


def _flores_source(subset: Subset) -> Source:
    codes = "-".join(flores.CODES[code] for code in subset.name.split("-"))
    return Source(flores.DATASET.hub, codes, "devtest")


def _m3exam_source(subset: Subset) -> Source:
    return Source(m3exam.DATASET.hub, None, languages.get(subset.name).english_name.lower())


def _maxm_source(subset: Subset) -> Source:
    return Source(DATASETS["maxm"].hub, None, "iw" if subset.name == "he" else subset.name)


def _at(dataset: str, config: str | None, split: str) -> Callable[[Subset], Source]:
    """The source of each subset; `{}` in config or split stands for the subset's name."""
    return lambda subset: Source(
        DATASETS[dataset].hub, config and config.format(subset.name), split.format(subset.name)
    )


_SOURCES: dict[str, tuple[Callable[[Subset], Source], Callable[..., Converted | None]]] = {
    "xchat": (_at("xchat", None, "{}"), _xchat),
    "m_llavabench": (_at("m_llavabench", None, "{}"), _m_llavabench),
    "cvqa": (_at("cvqa", None, "test"), _cvqa),
    "marvl": (_at("marvl", None, "{}"), _marvl),
    "xm100": (_at("xm100", None, "{}"), _xm100),
    "xgqa": (_at("xgqa", None, "{}"), _xgqa),
    "maxm": (_maxm_source, _maxm),
    "xmmmu": (_at("xmmmu", None, "{}"), _xmmmu),
    "m3exam": (_m3exam_source, _m3exam),
    "tydiqa": (_at("tydiqa", "secondary_task", "validation"), _tydiqa),
    "flores": (_flores_source, _flores),
    "xstorycloze": (_at("xstorycloze", "{}", "eval"), _xstorycloze),
    "mgsm": (_at("mgsm", "{}", "test"), _mgsm),
    "mmmlu": (_mmmlu_source, _mmmlu),
}
