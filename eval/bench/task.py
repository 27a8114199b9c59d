"""The interface of an evaluation task: documents, a prompt, generation settings, a scorer and a version.

A data set (`xgqa`) is one file of `eval/bench/tasks/`; a task (`xgqa_bn`) is one of its subsets, usually a language.
Two profiles score the same responses. `paper` repeats the scoring of the printed tables, with its faults (comments name
them). `fixed` has correct rules.
"""

import abc
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Profile = Literal["paper", "fixed"]
PROFILES: tuple[Profile, ...] = ("paper", "fixed")
OWN = "own"  # the group of data sets that PangeaBench does not have
IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class Subset:
    """One language of a data set, or one direction of translation.

    Attributes:
      name: the file `<name>.jsonl` and the second half of the task's name.
      language: the language of the answer, a code of `pangea_jax.languages`.
      column: the column of the paper's tables that averages this subset, if any.
      size: number of documents; None if the source does not say.
    """

    name: str
    language: str
    column: Literal["en", "mul", "none"]
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Document:
    """One row of `<data_dir>/<data set>/<subset>.jsonl`; images are paths relative to that folder."""

    id: str
    row: Mapping[str, Any]

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(self.row.get("images", ()))

    @property
    def cluster(self) -> str:
        """The same for dependent documents: documents with the same picture, or translations of one text."""
        return self.images[0] if self.images else self.id

    @property
    def hash(self) -> str:
        return digest(self.row)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The user's message: text with `<image>` marks, and the pictures in their order."""

    text: str
    images: tuple[str, ...] = ()

    def with_marks(self) -> str:
        """The text with marks. If it has none, all marks come first, as in Pangea's wrapper of lmms-eval."""
        if not self.images or IMAGE_MARK in self.text:
            return self.text
        return " ".join([IMAGE_MARK] * len(self.images)) + "\n" + self.text


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a response is made: text up to a length, or log-likelihoods of given continuations.

    Attributes:
      output_type: `generate_until` or `loglikelihood`, the words of lm-eval.
      until: stop strings; the response is cut before them.
      chat: whether the prompt goes into the chat template; lm-eval's text sets use raw text.
    """

    max_new_tokens: int = 0
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    chat: bool = True
    output_type: Literal["generate_until", "loglikelihood"] = "generate_until"


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of one response.

    Attributes:
      filtered: the answer that was read from the response; None if it is unreadable.
      metrics: by name, each between 0 and 1 (a judge's scores keep the judge's scale).
      statistics: numbers to sum over documents; `Dataset.combine` computes the subset's score from the sums.
    """

    filtered: Any
    metrics: Mapping[str, float]
    statistics: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Failed:
    """The reason why a document has no score; it is counted but not averaged."""

    reason: str


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """The messages to a judge about one response, and the sampling settings."""

    system: str
    user: str
    params: Mapping[str, float]


class Source(NamedTuple):
    """Where the rows of a subset come from: the arguments of `datasets.load_dataset`."""

    path: str
    config: str | None
    split: str


class Dataset(abc.ABC):
    """One data set of PangeaBench, or one of your own (`own_tasks.OwnTask`).

    Attributes:
      name, title: the name in task names, and the name in the paper's tables.
      group: `multimodal` (Table 2), `text` (Table 3) or `OWN`.
      profiles: the rules by which its responses are scored.
      version: raised when prompt, settings or scores change; part of every result.
      changes: version -> what changed with it; `rescore` says it.
      metric: name of the headline metric among `Scored.metrics`.
      hub, hub_config, hub_split: the source on the Hugging Face hub; `{}` stands for the name of the subset.
      fields: the required fields of a row and their types.
      gold: the field with the gold answer.
      about: rough number of all documents, if the sources give no exact sizes of the subsets.
      bounded: whether the headline score lies between 0 and 100.
      judged: whether scores need a judge's replies.
      paper_scores_failures: whether the paper's scorer gives a score even if the judge's reply is missing.
      structural_zeros: subset -> why its paper score is at or near 0 for every model.
      code: the Python file of `--include` that defines it, None for all others.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    group: ClassVar[Literal["multimodal", "text", "own"]]
    profiles: ClassVar[tuple[Profile, ...]] = PROFILES
    version: ClassVar[int] = 1
    changes: ClassVar[Mapping[int, str]] = MappingProxyType({})
    metric: ClassVar[str] = "acc"
    hub: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    hub_split: ClassVar[str] = "{}"
    subsets: ClassVar[tuple[Subset, ...]]
    fields: ClassVar[Mapping[str, type | tuple[type, ...]]]
    gold: ClassVar[str] = "answer"
    generation: ClassVar[Generation]
    about: ClassVar[int | None] = None
    bounded: ClassVar[bool] = True
    judged: ClassVar[bool] = False
    paper_scores_failures: ClassVar[bool] = False
    structural_zeros: ClassVar[Mapping[str, str]] = MappingProxyType({})
    code: Path | None = None

    def file(self, subset: Subset, data_dir: Path) -> Path:
        """The JSONL file of a subset; its pictures lie in the same folder."""
        return data_dir / self.name / f"{subset.name}.jsonl"

    def prepare(self, row: Any, number: int) -> Any:
        """The row as it is checked and kept; `number` is its line in the file."""
        return row

    def source(self, subset: Subset) -> Source:
        config = self.hub_config and self.hub_config.format(subset.name)
        return Source(self.hub, config, self.hub_split.format(subset.name))

    @abc.abstractmethod
    def from_hub(self, row: Mapping[str, Any], subset: Subset, index: int) -> dict[str, Any] | None:
        """The row of the hub with that index as a row of our layout; None if it is not of this subset.

        `images` has the pictures as the hub gives them.

        Raises:
          KeyError: the hub's row lacks a field.
        """

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """The error in a row whose fields have the right types, or None."""
        return None

    @abc.abstractmethod
    def prompt(self, document: Document, subset: Subset, profile: Profile) -> Prompt:
        """The question to the model; the profiles differ only where the paper's prompt damages a question."""

    @abc.abstractmethod
    def score(
        self, document: Document, response: Any, subset: Subset, profile: Profile, reply: str | None
    ) -> Scored | Failed:
        """Scores one response; `reply` is the judge's, for judged data sets."""

    def mean_score(self, filtered: Any, **metrics: float) -> Scored:
        """A score whose subset value is 100 times the mean of the headline metric."""
        values = {name: float(value) for name, value in metrics.items()}
        return Scored(filtered, values, (values[self.metric], 1.0))

    def target(self, document: Document) -> Any:
        """The gold answer, for the logs."""
        return document.row[self.gold]

    def generation_for(self, subset: Subset) -> Generation:
        return self.generation

    def choices(self, document: Document) -> tuple[str, ...]:
        """The continuations whose log-likelihoods are compared, with their leading space."""
        return ()

    def judge_request(self, document: Document, response: str) -> JudgeRequest:
        raise TypeError(f"{self.name} has no judge")

    def readable(self, reply: str) -> bool:
        """Whether a judge's reply has a score."""
        raise TypeError(f"{self.name} has no judge")

    def combine(
        self, sums: Float[np.ndarray, "*draws statistics"], profile: Profile
    ) -> Float[np.ndarray, "*draws"]:
        """The score of a subset, on the scale of the paper's tables, from summed statistics."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return 100 * sums[..., 0] / sums[..., 1]

    def corpus_metrics(
        self,
        documents: Sequence[Document],
        filtered: Sequence[Any],
        subset: Subset,
        profile: Profile,
    ) -> dict[str, float]:
        """Metrics that exist only for a whole subset."""
        return {}


@dataclasses.dataclass(frozen=True)
class Task:
    """One subset of a data set."""

    dataset: Dataset
    subset: Subset

    @property
    def name(self) -> str:
        return f"{self.dataset.name}_{self.subset.name}"

    @property
    def generation(self) -> Generation:
        return self.dataset.generation_for(self.subset)


def schema(**types: type | tuple[type, ...]) -> Mapping[str, type | tuple[type, ...]]:
    """The fields of a data set's rows, for `Dataset.fields`."""
    return MappingProxyType(types)


def digest(value: Any) -> str:
    """Hash of a JSON value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def answer_text(response: str) -> str:
    """A response without the reasoning in `<think>` tags that some models write first."""
    return re.sub(r"^.*</think>", "", response, flags=re.DOTALL).strip()


def language_subsets(sizes: Mapping[str, int | None]) -> tuple[Subset, ...]:
    """One subset per language code: English in the column en, all others in mul."""
    return tuple(
        Subset(code, code, "en" if code == "en" else "mul", size) for code, size in sizes.items()
    )
