"""Scores a choice among continuations by their log-likelihoods."""

from collections.abc import Sequence
from typing import Any

from eval.bench.task import Dataset, Failed, Scored


def score(dataset: Dataset, response: Any, choices: Sequence[str], gold: int) -> Scored | Failed:
    """`acc` takes the continuation with the largest log-likelihood, `acc_norm` the largest per byte.

    Args:
      response: one log-likelihood for each choice.
    """
    if not (
        isinstance(response, list)
        and len(response) == len(choices)
        and all(isinstance(value, int | float) and value == value for value in response)
    ):
        return Failed(f"expected {len(choices)} log-likelihoods, got {response!r:.80}")
    normalised = [v / len(c.encode()) for v, c in zip(response, choices, strict=True)]
    best, best_normalised = (values.index(max(values)) for values in (response, normalised))
    return dataset.mean_score(best, acc=best == gold, acc_norm=best_normalised == gold)
