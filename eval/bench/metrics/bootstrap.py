"""Bootstrap intervals and tests over clusters of dependent documents.

Questions about one picture are drawn together, and so are the translations of one text, over all languages. Languages
without a common cluster are drawn separately, so that each keeps its size.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

DRAWS = 2000
Statistics = Mapping[str, Sequence[tuple[str, Sequence[float]]]]  # subset -> (cluster, statistics)
Combine = Callable[[Float[np.ndarray, "draws statistics"]], Float[np.ndarray, " draws"]]


def draw_subsets(
    statistics: Statistics, combine: Combine, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Float[np.ndarray, " draws"]]:
    """The score of each subset under `draws` resamplings of its clusters, the same for all subsets."""
    clusters = sorted({cluster for rows in statistics.values() for cluster, _ in rows})
    place = {cluster: i for i, cluster in enumerate(clusters)}
    sums = {}
    for name, rows in statistics.items():
        table = np.zeros((len(clusters), len(rows[0][1])))
        for cluster, values in rows:
            table[place[cluster]] += values
        sums[name] = table
    rng = np.random.default_rng(seed)
    totals = {name: np.zeros((draws, table.shape[1])) for name, table in sums.items()}
    members = {name: {cluster for cluster, _ in rows} for name, rows in statistics.items()}
    for names, shared in _components(members):
        places = sorted(place[cluster] for cluster in shared)
        size = len(places)
        for start in range(0, draws, 256):  # a whole weight matrix of 10,000 clusters is 160 MB
            rows = slice(start, min(start + 256, draws))
            weights = rng.multinomial(size, np.full(size, 1 / size), size=rows.stop - rows.start)
            for name in names:
                totals[name][rows] += weights @ sums[name][places]
    return {name: combine(total) for name, total in totals.items()}


def _components(members: Mapping[str, set[str]]) -> list[tuple[list[str], set[str]]]:
    """(subsets, clusters) of the groups of subsets that share clusters, directly or through others."""
    groups: list[tuple[list[str], set[str]]] = []
    for name, clusters in members.items():
        touching = [group for group in groups if group[1] & clusters]
        names = [name, *(other for group in touching for other in group[0])]
        merged = names, clusters.union(*(group[1] for group in touching))
        groups = [group for group in groups if group not in touching] + [merged]
    return groups


def interval(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws, without the draws that have no value (no scored document)."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def is_collapsed(bounds: tuple[float, float]) -> bool:
    """Whether all draws were the same, so that they say nothing of the uncertainty."""
    return bounds[1] - bounds[0] < 1e-9


def compare(
    first: Float[np.ndarray, " draws"], second: Float[np.ndarray, " draws"]
) -> tuple[tuple[float, float], float]:
    """95 % interval and two-sided p of a difference, from draws with the same seed over the same documents.

    p is twice the smaller share of draws on one side of zero, with one added to the counts.
    """
    differences = first - second
    differences = differences[np.isfinite(differences)]
    if not differences.size:
        return (float("nan"), float("nan")), float("nan")
    tail = 1 + min((differences <= 0).sum(), (differences >= 0).sum())
    return interval(differences), float(min(1.0, 2 * tail / (1 + differences.size)))
