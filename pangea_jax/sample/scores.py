"""The sample's scores: the table of tasks, intervals, and one answer. Figures and the statistics of sweeps use them."""

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class Score:
    """How well the model answers one kind of question.

    Attributes:
      metric: its key in results.json.
      name: a few letters, for the head of a column.
      title: for the head of a figure.
      chance: the score of guessing, in [0, 1].
    """

    metric: str
    name: str
    title: str
    chance: float


# In the order of tables. All else that names the scores derives from this table.
SCORES = (
    Score("exact_match", "name", "Exact match: the name written in full", 0.0),
    Score("rank_accuracy", "rank", "Rank accuracy: true name first of ten", 1 / 10),
    Score("letter_accuracy", "letter", "Letter: the right one of four names", 1 / 4),
    Score("yes_no_accuracy", "yes or no", "Yes or no: is it this?", 1 / 2),
    Score("two_pictures_accuracy", "two pictures", "Two pictures: which one shows it?", 1 / 2),
)
BY_METRIC = {score.metric: score for score in SCORES}
# Before the key of a score: its floor, the score when the pictures are replaced.
BLIND = "image_blind_"
MEAN_ROW = "multilingual"  # in results.json: the mean of the languages but English

Rows = Mapping[str, Mapping[str, float]]
"""Language, or MEAN_ROW -> its scores."""


def rows_of(split: str, scores: Mapping[str, Any]) -> Rows:
    """The scores of one split of results.json, checked: English, mean, others by code.

    Runs from before a score existed do not have it.

    Raises:
      ValueError: a score is outside [0, 1], or has no floor, or there is no number of questions.
    """
    rows = {"en": scores["english"]} if scores.get("english") else {}
    if scores.get(MEAN_ROW):
        rows[MEAN_ROW] = scores[MEAN_ROW]
    rows |= {code: row for code, row in sorted(scores["languages"].items()) if code not in rows}
    for code, row in rows.items():
        for name in [
            "n",
            *(p + metric for metric in BY_METRIC if metric in row for p in ("", BLIND)),
        ]:
            value = row.get(name)
            lowest, highest = (1, math.inf) if name == "n" else (0, 1)
            if value is None or not lowest <= value <= highest:
                raise ValueError(
                    f"results, split {split!r}, {code!r}: {name} is {value!r}, expected "
                    f"{'a count of 1 or more' if name == 'n' else 'a fraction between 0 and 1'}"
                )
    return rows


def examples_of(results: Mapping[str, Any]) -> Mapping[str, int] | None:
    """Number of examples per language that were trained on; without it, that were chosen."""
    return (results.get("seen") or results.get("mixture", {})).get("examples_per_language")


@dataclass(frozen=True)
class AnswerExample:
    """A question about a picture, the model's answer (any text, or none) and the true answer.

    `language` is the language code of the three texts; `split` names the split of the example.
    """

    picture: UInt8[np.ndarray, "height width 3"]
    language: str
    question: str
    answer: str
    truth: str
    split: str

    @property
    def is_right(self) -> bool:
        """Whether answer and truth are the same text."""
        return same_text(self.answer, self.truth)


def same_text(one: str, other: str) -> bool:
    """Whether two texts are equal after NFC and without outer white space."""
    one, other = (unicodedata.normalize("NFC", text).strip() for text in (one, other))
    return one == other


def wilson_interval(score: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of the share `score` in `n` trials (Wilson 1927)."""
    from scipy.stats import binomtest  # half a second to import

    interval = binomtest(round(score * n), n).proportion_ci(method="wilson")
    return interval.low, interval.high
