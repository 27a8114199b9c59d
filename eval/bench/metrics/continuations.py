"""Choosing among continuations by their log-likelihood."""

from collections.abc import Sequence
from typing import Any

from eval.bench.task import Failed, Scored, mean_of


def score(response: Any, choices: Sequence[str], gold: int) -> Scored | Failed:
    """Accuracy of the likeliest continuation (summed log-likelihood), and `acc_norm`, per byte of it.

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
    best = max(range(len(choices)), key=lambda i: response[i])
    best_normalised = max(range(len(choices)), key=lambda i: normalised[i])
    metrics = {"acc": float(best == gold), "acc_norm": float(best_normalised == gold)}
    return mean_of(metrics, "acc", best)
