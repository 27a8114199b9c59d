"""Scores a choice among continuations by their log-likelihoods."""

import math
import reprlib
from collections.abc import Sequence
from typing import Any

from eval.bench.task import Dataset, Failed, Scored

# Of a long text whose every token is all but impossible.
_LARGEST = 1e9


def _is_log_likelihood(value: Any) -> bool:
    """Whether a value is a number of a possible size; minus infinity is a probability of 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == -math.inf or -_LARGEST <= value <= _LARGEST


def score(dataset: Dataset, response: Any, choices: Sequence[str], gold: int) -> Scored | Failed:
    """`acc` takes the continuation with the largest log-likelihood, `acc_norm` the largest per byte.

    Args:
      response: one log-likelihood for each choice.
    """
    if not (
        isinstance(response, list)
        and len(response) == len(choices)
        and all(map(_is_log_likelihood, response))
    ):
        return Failed(f"expected {len(choices)} log-likelihoods, got {reprlib.repr(response)}")
    normalised = [v / len(c.encode()) for v, c in zip(response, choices, strict=True)]
    best, best_normalised = (values.index(max(values)) for values in (response, normalised))
    return dataset.mean_score(best, acc=best == gold, acc_norm=best_normalised == gold)
