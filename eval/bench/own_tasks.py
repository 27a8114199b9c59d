"""Tasks of one's own: `OwnTask` for a class in Python, `DeclaredTask` for one that a YAML declares (inclusion.py).

A declared task runs no code: its template has places for the fields of a row and nothing else, and `READERS` names how
an answer is read and scored, with the readers and metrics of PangeaBench's tasks.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from eval.bench import task
from eval.bench.metrics import captions, chrf, continuations, numbers, squad
from eval.bench.reading.letter import letter
from eval.bench.reading.mentions import LETTERS
from eval.bench.reading.number import number
from eval.bench.reading.short import plain, same_value, short
from eval.bench.reading.truth import truth
from eval.bench.tasks import xchat

_PLACE = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_TRIM = re.compile(r"(?:\.strip\(\)|\s*\|\s*trim)$")
_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*|\[\d{1,9}\])*")
_STEP = re.compile(r"[^\W\d]\w*|\d+")
_TEXTS = (str, int, float, list)


class OwnTask(task.Dataset):
    """A data set of one's own: files of JSON lines, nothing to fetch, nothing published, one profile.

    A row without an `id` gets the number of its line. Pictures are paths relative to the JSONL file.

    Attributes:
      files: language -> path of its JSONL file, relative to `folder`.
      folder: that of the file with the class; set when it is read.
    """

    group = task.OWN
    profiles = ("fixed",)
    hub = ""
    files: ClassVar[Mapping[str, str]]
    folder: Path = Path()

    @property
    def subsets(self) -> tuple[task.Subset, ...]:
        return task.language_subsets(dict.fromkeys(self.files))

    def file(self, subset, data_dir):
        return self.folder / self.files[subset.name]

    def prepare(self, row, number):
        if not isinstance(row, dict):
            return row
        given = row.get("id", number)
        is_number = isinstance(given, int) and not isinstance(given, bool)
        return row | {"id": str(given) if is_number else given}

    def from_hub(self, row, subset, index):
        raise TypeError(f"{self.name} is a task of one's own; there is nothing to fetch")


@dataclasses.dataclass(frozen=True)
class Template:
    """Text with places for the fields of a row: `{{question}}`, `{{options[0]}}`, `{{text | trim}}`.

    These are places of Jinja, without its expressions, blocks and filters but `trim`. A list becomes one line per
    entry, with a letter before it.

    Attributes:
      parts: texts, and paths into a row: names and indices, and whether spaces around the value go.
    """

    parts: tuple[str | tuple[tuple[str | int, ...], bool], ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """
        Raises:
          ValueError: it has something other than places.
        """
        if block := re.search(r"\{[%#]", text):
            raise ValueError(
                f"{text[block.start() : block.start() + 40]!r} is a block; only places such as {{{{question}}}} are "
                "filled. Write the loop's result into the data, or the task as a Python file"
            )
        parts: list = []
        for i, piece in enumerate(_PLACE.split(text)):
            if i % 2 == 0:
                parts += [piece] if piece else []
                continue
            path, trims = _TRIM.sub("", piece), bool(_TRIM.search(piece))
            if not _PATH.fullmatch(path):
                raise ValueError(
                    f"{{{{{piece:.60}}}}} is an expression; expected the name of a field, as in {{{{question}}}} or "
                    "{{options[0]}}"
                )
            steps = _STEP.findall(path)
            parts.append((tuple(int(s) if s.isdecimal() else s for s in steps), trims))
        return cls(tuple(parts))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that it needs."""
        paths = (part[0] for part in self.parts if not isinstance(part, str))
        return tuple(dict.fromkeys(str(path[0]) for path in paths))

    def value(self, row: Mapping[str, Any]) -> Any:
        """The value itself if the template is one place, else the filled text; errors as in `fill`."""
        if len(self.parts) == 1 and not isinstance(self.parts[0], str):
            found = _look_up(row, self.parts[0][0])
            return found.strip() if self.parts[0][1] and isinstance(found, str) else found
        return self.fill(row)

    def fill(self, row: Mapping[str, Any]) -> str:
        """
        Raises:
          ValueError: a place has no value in the row, or one that is no text, number or list.
        """
        return "".join(part if isinstance(part, str) else _shown(row, *part) for part in self.parts)


def _look_up(row: Mapping[str, Any], path: Sequence[str | int]) -> Any:
    value: Any = row
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"no {step!r} in {_written(path)}") from None
    return value


def _written(path: Sequence[str | int]) -> str:
    rest = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path[1:])
    return f"{{{{{path[0]}{''.join(rest)}}}}}"


def _shown(row: Mapping[str, Any], path: Sequence[str | int], trims: bool) -> str:
    value = _look_up(row, path)
    if isinstance(value, list):
        if len(value) > len(LETTERS):
            raise ValueError(f"{_written(path)} has {len(value)} entries, at most {len(LETTERS)}")
        return "\n".join(f"{key}. {text}" for key, text in zip(LETTERS, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise ValueError(f"{_written(path)} is {kind}, expected a text, a number or a list")
    return str(value).strip() if trims else str(value)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a YAML says of a task; the words are its keys, see docs/evaluation.md.

    Attributes:
      files: language -> JSONL file.
      choices: the options of every row, or where a row has them.
      image: the field with the path of a picture, or with a list of paths.
      rubric: for every row, or the field with it.
    """

    name: str
    title: str
    version: int
    files: Mapping[str, str]
    text: Template
    target: Template
    reader: str
    metric: str
    generation: task.Generation
    choices: Template | tuple[str, ...] | None = None
    image: str | None = None
    delimiter: str = " "
    rubric: Mapping[str, str] | str | None = None


class DeclaredTask(OwnTask):
    """A task that a YAML declares."""

    def __init__(self, declared: Declaration, folder: Path):
        self.declared, self.folder, self.files = declared, folder, declared.files
        self.name, self.title, self.version = declared.name, declared.title, declared.version
        self.generation, self.metric = declared.generation, declared.metric
        self.judged = declared.reader == "judge"
        self._reader = READERS[declared.reader]
        self.fields, self.gold = self._fields(), ""

    def _fields(self) -> Mapping[str, type | tuple[type, ...]]:
        declared = self.declared
        fields: dict[str, Any] = dict.fromkeys(declared.text.fields, (*_TEXTS, dict))
        fields |= dict.fromkeys(declared.target.fields, (*_TEXTS, dict, bool))
        if len(declared.target.parts) == 1 and len(declared.target.parts[0][0]) == 1:
            fields[declared.target.fields[0]] = self._reader.gold
        if isinstance(declared.choices, Template):
            fields |= dict.fromkeys(declared.choices.fields, (*_TEXTS, dict))
            if len(declared.choices.parts[0][0]) == 1:
                fields[declared.choices.fields[0]] = list
        if isinstance(declared.rubric, str):
            fields[declared.rubric] = dict
        return MappingProxyType(fields)

    def prepare(self, row, number):
        row, name = super().prepare(row, number), self.declared.image
        if name and isinstance(row, dict) and name in row:
            given = row[name]
            row = row | {"images": [given] if isinstance(given, str) else given}
        return row

    def problem(self, row):
        image = self.declared.image
        if image and not row.get("images"):
            return f"field {image!r} is missing or empty, expected the path of a picture"
        try:
            self.declared.text.fill(row)
            self._reader.check(self, row)
        except ValueError as error:
            return str(error)
        return None

    def options(self, row: Mapping[str, Any]) -> list[str]:
        """The choices of a question.

        Raises:
          ValueError: they are not a list of two texts or more.
        """
        choices = self.declared.choices
        found = choices.value(row) if isinstance(choices, Template) else list(choices or ())
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"the choices are {found!r:.60}, expected a list of texts")
        if not 2 <= len(found) <= len(LETTERS):
            raise ValueError(f"{len(found)} choices, expected 2 to {len(LETTERS)}")
        return found

    def target_of(self, row: Mapping[str, Any]) -> Any:
        return self.declared.target.value(row)

    def target(self, document):
        return self.target_of(document.row)

    def prompt(self, document, subset, profile):
        return task.Prompt(self.declared.text.fill(document.row), document.images)

    def choices(self, document):
        if self.generation.output_type != "loglikelihood":
            return ()
        return tuple(self.declared.delimiter + text for text in self.options(document.row))

    def score(self, document, response, subset, profile, reply=None):
        if isinstance(response, str):
            response = task.answer_text(response)
        given = reply if self.judged else response
        return self._reader.score(self, document, given, subset.language)

    def combine(self, sums, profile):
        if self.declared.reader == "translation":
            return chrf.combine(sums)
        return super().combine(sums, profile)

    def corpus_metrics(self, documents, filtered, subset, profile):
        if self.declared.reader != "caption":
            return {}
        references = [_segmented(_texts(self, d.row), subset.language) for d in documents]
        values = captions.cider([text.split(" ") for text in filtered], references)
        return {"cider": float(values.mean())} if len(values) else {}

    def judge_request(self, document, response):
        row, rubric = document.row, self.rubric(document.row)
        return xchat.grading(self.declared.text.fill(row), response, self.target_of(row), rubric)

    def rubric(self, row: Mapping[str, Any]) -> Mapping[str, str]:
        """
        Raises:
          ValueError: it lacks a description, or has one that is no text.
        """
        given = self.declared.rubric
        found = row[given] if isinstance(given, str) else given or {}
        for name in xchat.RUBRIC_FIELDS:
            if not isinstance(found.get(name), str):
                raise ValueError(f"the rubric has no text {name!r}")
        return found

    def readable(self, reply):
        return xchat.read_grade(reply) is not None


def _texts(own: DeclaredTask, row: Mapping[str, Any]) -> list[str]:
    """The reference answers of a row.

    Raises:
      ValueError: there is none, or one is no text.
    """
    found = own.target_of(row)
    found = [found] if isinstance(found, str | int | float) else found
    if not found or not all(isinstance(text, str | int | float) for text in found):
        raise ValueError(f"the answer is {found!r:.60}, expected a text or a list of texts")
    return [str(text) for text in found]


def _one_text(own: DeclaredTask, row: Mapping[str, Any]) -> None:
    if not isinstance(own.target_of(row), str):
        raise ValueError(f"the answer is {own.target_of(row)!r:.60}, expected a text")
    if own.judged:
        own.rubric(row)


def _truth_value(own: DeclaredTask, row: Mapping[str, Any]) -> bool:
    if not isinstance(own.target_of(row), bool):
        raise ValueError(f"the answer is {own.target_of(row)!r:.60}, expected true or false")
    return own.target_of(row)


def _numeral(own: DeclaredTask, row: Mapping[str, Any]):
    found = own.target_of(row)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise ValueError(f"the answer is {found!r:.60}, expected a number")
    return numbers.parse(str(found))


def _place(own: DeclaredTask, row: Mapping[str, Any]) -> int:
    """The number of the right choice, from its letter, its text or its number (from 0).

    Raises:
      ValueError: there is no such choice, or there are two.
    """
    options, given = own.options(row), own.target_of(row)
    if isinstance(given, int) and not isinstance(given, bool):
        found = {given} & {*range(len(options))}
    else:
        found = {i for i, text in enumerate(options) if text == given}
        found |= {i for i, key in enumerate(LETTERS[: len(options)]) if key == given}
    if len(found) != 1:
        known = f"a letter of {LETTERS[: len(options)]}, a number from 0, or the text of one choice"
        problem = "could be two choices" if found else "is none of the choices"
        raise ValueError(f"answer {given!r:.60} {problem}; expected {known}")
    return found.pop()


def _segmented(texts: Sequence[str], language: str) -> list[list[str]]:
    return [captions.caption_tokens(text, language) for text in texts]


def _score_choice(own: DeclaredTask, document, response, language):
    row = document.row
    return continuations.score(own, response, own.choices(document), _place(own, row))


def _score_letter(own: DeclaredTask, document, response, language):
    options, gold = own.options(document.row), LETTERS[_place(own, document.row)]
    chosen = letter(response, options, language)
    return own.mean_score(chosen, acc=chosen == gold, unreadable=chosen is None)


def _score_truth(own: DeclaredTask, document, response, language):
    read, gold = truth(response, language), str(_truth_value(own, document.row)).lower()
    return own.mean_score(read, acc=read == gold, unreadable=read is None)


def _score_number(own: DeclaredTask, document, response, language):
    value = number(response, language)
    right, read = value == _numeral(own, document.row), None if value is None else str(value)
    return own.mean_score(read, exact_match=right, unreadable=value is None)


def _score_short(own: DeclaredTask, document, response, language):
    golds, text = _texts(own, document.row), short(response, language)
    read = same_value(text, language)
    right = read in [same_value(gold, language) for gold in golds]
    words = squad.scores(plain(text, language), [plain(gold, language) for gold in golds])
    return own.mean_score(read, exact_match=right, f1=max(words["f1"], float(right)))


def _score_caption(own: DeclaredTask, document, response, language):
    candidate, *references = _segmented([response, *_texts(own, document.row)], language)
    value = captions.rouge_l(candidate, references)
    return own.mean_score(" ".join(candidate), rouge_l=value)


def _score_translation(own: DeclaredTask, document, response, language):
    hypothesis = " ".join(response.split())
    counts = chrf.counts(hypothesis, _texts(own, document.row))
    return task.Scored(hypothesis, {"chrf": chrf.score(counts) / 100}, counts)


def _score_judged(own: DeclaredTask, document, reply, language):
    grade = xchat.read_grade(reply) if reply is not None else None
    if grade is None:
        ending = "" if reply is None else f" {reply[-60:]!r}"
        return task.Failed(f"no score at the end of the judge's reply{ending}")
    return own.mean_score(grade, points=(grade - 1) / 4, grade=grade)


class Reader(NamedTuple):
    """How answers are read and scored.

    Attributes:
      metrics: the first is the headline, unless `metric_list` begins with another.
      gold: types of the field with the answer.
      check: raises ValueError if a row's answer cannot be scored.
      score: (task, document, response or judge's reply, language) -> the score.
    """

    metrics: tuple[str, ...]
    max_new_tokens: int
    gold: tuple[type, ...]
    check: Callable[[DeclaredTask, Mapping[str, Any]], Any]
    score: Callable[..., task.Scored | task.Failed]


LIKELIHOOD = "loglikelihood"
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "letter": Reader(("acc",), 16, (str, int), _place, _score_letter),
        "truth": Reader(("acc",), 16, (bool,), _truth_value, _score_truth),
        "number": Reader(("exact_match",), 256, (str, int, float), _numeral, _score_number),
        "short": Reader(("exact_match", "f1"), 64, (str, int, float, list), _texts, _score_short),
        "caption": Reader(("rouge_l",), 128, (str, list), _texts, _score_caption),
        "translation": Reader(("chrf",), 256, (str, list), _texts, _score_translation),
        "judge": Reader(("points",), 1024, (str,), _one_text, _score_judged),
        LIKELIHOOD: Reader(("acc", "acc_norm"), 0, (str, int), _place, _score_choice),
    }
)
