"""A paired comparison of two runs on the documents that both have scored, and what it leaves out."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from eval.bench import report, scoring
from eval.bench.metrics import bootstrap
from eval.bench.task import Profile
from eval.bench.tasks import ALL_TASKS, DATASETS
from pangea_jax.figures import inert
from pangea_jax.sample.scores import wilson_interval


def table_of(first: Path, second: Path, profile: Profile) -> Table:
    """Paired differences of two runs, per data set and column, on the documents both have scored."""
    runs = [_load_scores(folder, profile) for folder in (first, second)]
    table = Table(title=f"{first} minus {second}, {profile} scores")
    for name in ("data set", "column", "documents", "difference", "95 % interval", "p"):
        table.add_column(name, justify="left" if name in ("data set", "column") else "right")
    common = {
        name: runs[0][name].scored.keys() & runs[1][name].scored
        for name in runs[0]
        if name in runs[1]
    }
    for dataset in DATASETS.values():
        names = [name for name, ids in common.items() if ids and ALL_TASKS[name].dataset is dataset]
        if not names:
            continue
        sides = [[run[name].only(common[name]) for name in names] for run in runs]
        sampled = [scoring.draws(side) for side in sides]
        values = [
            scoring.dataset_columns({s.task.subset.name: s.value for s in side}, dataset.name)
            for side in sides
        ]
        for column in values[0]:
            difference = values[0][column] - values[1][column]
            bounds, p_value = bootstrap.compare(*(side[column.upper()] for side in sampled))
            members = [score for score in sides[0] if score.task.subset.column == column]
            low, high = _widened(bounds, difference, members)
            shown = "[–, –]" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"
            cells = [str(sum(score.n for score in members)), f"{difference:+.1f}", shown]
            table.add_row(inert.line(dataset.title), column, *cells, f"{p_value:.4f}")
    return table


def _widened(
    bounds: tuple[float, float], difference: float, scores: Sequence[scoring.TaskScores]
) -> tuple[float, float]:
    """The interval of a difference that is the same in all draws: Wilson's of no case among as many as clusters."""
    if not bootstrap.is_collapsed(bounds):
        return bounds
    if not scores[0].task.dataset.bounded:
        return math.nan, math.nan
    clusters = {cluster for score in scores for cluster, _ in score.statistics}
    half = 100 * wilson_interval(0.0, len(clusters))[1]
    return max(-100.0, difference - half), min(100.0, difference + half)


def notes(first: Path, second: Path, profile: Profile) -> list[str]:
    """What a comparison leaves out, and in what the two runs differ besides the model."""
    runs = [report.read_results(folder) for folder in (first, second)]
    scores = [_load_scores(folder, profile) for folder in (first, second)]
    found = []
    for here, there, folder in ((0, 1, first), (1, 0, second)):
        if only := [name for name in scores[here] if name not in scores[there]]:
            found.append(f"left out, only in {folder}: {', '.join(only)}")
    for name in (name for name in scores[0] if name in scores[1]):
        ids = [set(side[name].scored) for side in scores]
        counts = [len(ids[0] - ids[1]), len(ids[1] - ids[0])]
        said = [f"{n} scored in {f} only" for n, f in zip(counts, (first, second)) if n]
        asked = [run["documents"][name] for run in runs]
        if missing := [n - len(found) for n, found in zip(asked, ids)]:
            said += [
                f"{n} without a score in {f}" for n, f in zip(missing, (first, second)) if n > 0
            ]
        if said:
            found.append(f"{name}: {len(ids[0] & ids[1])} documents compared; {', '.join(said)}")
    for flag in ("limit", "gen_kwargs", "profile", "judge"):
        values = [run["config"].get(flag) or "none" for run in runs]
        if values[0] != values[1]:
            found.append(f"different --{flag}: {values[0]} and {values[1]}")
    common = [name for name in runs[0]["tasks"] if name in runs[1]["tasks"]]
    for name in common:
        versions = [run["tasks"][name].get("version") for run in runs]
        if versions[0] != versions[1]:
            found.append(f"{name}: version {versions[0]} and version {versions[1]} of its scores")
    return found


def _load_scores(folder: Path, profile: Profile) -> dict[str, scoring.TaskScores]:
    names = report.read_results(folder)["documents"]
    return {name: scoring.read_scores(folder, ALL_TASKS[name], profile) for name in names}
