"""The sample's scores: chance, titles, intervals, and one answer. Figures and the statistics of sweeps use them."""

import unicodedata
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

RANK_CHANCE = 0.1  # the true name is ranked among ten names of its language
METRIC_TITLES = {
    "rank_accuracy": "Rank accuracy: true name first of ten",
    "exact_match": "Exact match: the name written in full",
}


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
        """Whether answer and truth are equal after NFC and without outer white space."""
        answer, truth = (
            unicodedata.normalize("NFC", text).strip() for text in (self.answer, self.truth)
        )
        return answer == truth


def wilson_interval(score: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of the share `score` in `n` trials (Wilson 1927)."""
    from scipy.stats import binomtest  # half a second to import

    interval = binomtest(round(score * n), n).proportion_ci(method="wilson")
    return interval.low, interval.high
