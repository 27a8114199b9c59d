"""What the sample's scores mean. Both the figures and the statistics of sweeps need it."""

from scipy.stats import binomtest

RANK_CHANCE = 0.1  # the true name is ranked among ten names of its language
METRIC_TITLES = {
    "rank_accuracy": "Rank accuracy: true name first of ten",
    "exact_match": "Exact match: the name written in full",
}


def wilson_interval(score: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of the share `score` in `n` trials (Wilson 1927)."""
    interval = binomtest(round(score * n), n).proportion_ci(method="wilson")
    return interval.low, interval.high
