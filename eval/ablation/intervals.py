"""Reads the results of a sweep and computes 95 % intervals, comparisons and correlations.

With one seed, intervals are Wilson's over the questions as independent trials. All languages are asked about the same
pictures, so their mean counts pictures, not questions. With several seeds, intervals are Student's t over the seeds,
which differ in examples and initial weights but not in questions. Differences between points are paired by seed.
"""

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pangea_jax.sample.scores import BLIND, wilson_interval
from pangea_jax.work import paths

SWEEP_FILE, RESULTS_FILE = "sweep.json", "results.json"
BENCH_FOLDER = "pangeabench"  # where eval/run.py writes for a run that does not evaluate itself
ENGLISH, OTHERS = "english", "multilingual"
AVERAGE = "average"  # the split of the means over the data sets of PangeaBench
METRICS = ("rank_accuracy", "score")
DRAWS = 2000
NUM_LANGUAGES = "ablate_num_languages"  # its designs are sweeps to compare with each other
# These ablations vary a number. In the others, each point is a method.
ORDERED = ("ablate_en_ratio", "ablate_language_popularity", "ablate_num_samples", NUM_LANGUAGES)


class SweepError(ValueError):
    """The sweep cannot be reported. The message names the file and what was expected."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained point and its results.json; `splits` may come from PangeaBench."""

    point: str
    x: float
    seed: int
    results: Mapping[str, Any]

    def row(self, split: str, who: str) -> Mapping[str, float] | None:
        """The scores of ENGLISH, OTHERS or a language."""
        scores = self.results["splits"][split]
        return scores[who] if who in (ENGLISH, OTHERS) else scores["languages"].get(who)

    @property
    def examples(self) -> dict[str, int]:
        """Number of examples per language that were trained on, repeats included."""
        return (self.results.get("seen") or self.results["mixture"])["examples_per_language"]

    @property
    def drawn(self) -> dict[str, int]:
        """Number of examples per language that the mixture chose."""
        return self.results["mixture"]["examples_per_language"]

    def is_cut(self, share: float = 1.0) -> bool:
        """Whether the run ended more than a step before it had seen a share of the chosen examples."""
        seen = sum(self.examples.values())
        return seen + seen / max(1, self.results["steps"]) < share * sum(self.drawn.values())


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of one ablation under one design.

    Attributes:
      ablation: stem of the config, such as "ablate_en_ratio".
      points: name -> quantity varied, in order.
      missing: names of the runs that are not finished.
      note: what the sweep cannot show, because its runs were shortened; "" for a complete one.
    """

    directory: Path
    ablation: str
    command: str
    design: str
    question: str
    axis: str
    points: dict[str, float]
    runs: tuple[Run, ...]
    missing: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_ordered(self) -> bool:
        return self.ablation in ORDERED

    @property
    def overrides(self) -> str:
        """The flags that change values of the config, as they were given."""
        words = shlex.split(self.command)
        return " ".join(word for word in words if word.startswith("--config."))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.runs[0].results["splits"])

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages with a score, English first."""
        splits = [split for run in self.runs for split in run.results["splits"].values()]
        codes = {code for split in splits for code in split["languages"]}
        return tuple(sorted(codes, key=lambda code: (code != "en", code)))

    @property
    def finished(self) -> tuple[str, ...]:
        """The points that have a run, in order."""
        done = {run.point for run in self.runs}
        return tuple(point for point in self.points if point in done)

    def at(self, point: str) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.point == point)

    def has(self, split: str, metric: str) -> bool:
        """Whether a run has this score. Runs from before a score existed do not have it."""
        rows = (run.results["splits"][split]["languages"].values() for run in self.runs)
        return any(metric in row for row in itertools.chain.from_iterable(rows))

    def metric(self, split: str) -> str:
        """The main metric of a split."""
        return next(metric for metric in METRICS if self.has(split, metric))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and the value of each seed."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def sign(self) -> int:
        """1 if the interval lies above 0, -1 if below, else 0."""
        return (self.low > 0) - (self.high < 0)


def load(directory: Path) -> Sweep:
    """Reads the work directory of launch/sweep.py.

    Raises:
      SweepError: there is no sweep or no finished run, or the runs do not belong together.
    """
    path = directory / SWEEP_FILE
    try:
        plan = _json(path)
    except FileNotFoundError:
        raise SweepError(f"no {path}: expected the --workdir of launch/sweep.py") from None
    runs, missing = [], []
    for run in plan["runs"]:
        if results := _results(directory / run["name"]):
            x = plan["points"][run["point"]]
            runs.append(Run(run["point"], x, run["seed"], results))
        else:
            missing.append(run["name"])
    if not runs:
        raise SweepError(
            f"no run of {directory} is finished and scored; to continue, run: {plan['command']}. If its runs do "
            f"not evaluate themselves, score each with eval/run.py --output_path=RUN/{BENCH_FOLDER}"
        )
    fields = {k: plan[k] for k in ("ablation", "command", "design", "question", "axis", "points")}
    sweep = Sweep(directory, **fields, runs=tuple(runs), missing=tuple(missing))
    return dataclasses.replace(sweep, note=check(sweep))


def _json(path: Path) -> Any:
    try:
        return json.loads(paths.read_bytes(path).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise SweepError(
            f"{path} is not JSON ({error}); remove it and start its run again"
        ) from None


def _results(workdir: Path) -> dict | None:
    """results.json of a run with scores in it; None if there are none yet."""
    if not (workdir / RESULTS_FILE).exists():
        return None
    results = _json(workdir / RESULTS_FILE)
    bench = workdir / BENCH_FOLDER / RESULTS_FILE
    if not results["splits"] and bench.exists():
        results["splits"] = bench_splits(_json(bench))
    return results if results["splits"] else None


def bench_splits(bench: Mapping[str, Any]) -> dict[str, dict]:
    """PangeaBench's results.json in the form of a run's `splits`: one split per data set, scores in [0, 1].

    The last split is the average over the data sets, if there are several.
    """
    profile, splits = bench["profile"], {}
    for name, dataset in bench["datasets"].items():
        rows: dict[str, list] = {}
        for task in bench["tasks"].values():
            if task["dataset"] == name and task[profile]["score"] is not None:
                rows.setdefault(task["language"], []).append(task[profile])
        languages = {
            code: {
                "score": float(np.mean([task["score"] for task in tasks])) / 100,
                "n": sum(task["n"] for task in tasks),
            }
            for code, tasks in rows.items()
        }
        splits[name] = {"languages": languages, ENGLISH: None, OTHERS: None}
        for who, key in ((ENGLISH, "en"), (OTHERS, "mul")):
            if mean := dataset[profile].get(key):
                n = sum(row["n"] for c, row in languages.items() if (c == "en") == (key == "en"))
                splits[name][who] = {"score": mean["score"] / 100, "n": n}
    return splits | ({AVERAGE: _average(splits)} if len(splits) > 1 else {})


def _average(splits: Mapping[str, dict]) -> dict[str, Any]:
    """The unweighted means over the data sets, for English, the others and each language."""

    def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
        if not rows:
            return None
        # So many questions have the variance of the mean, if the scores are about equal.
        n = round(len(rows) ** 2 / sum(1 / row["n"] for row in rows))
        return {"score": float(np.mean([row["score"] for row in rows])), "n": n}

    codes = dict.fromkeys(code for split in splits.values() for code in split["languages"])
    languages = [s["languages"] for s in splits.values()]
    return {
        "languages": {
            code: mean([own[code] for own in languages if code in own]) for code in codes
        },
        **{who: mean([s[who] for s in splits.values() if s[who]]) for who in (ENGLISH, OTHERS)},
    }


def check(sweep: Sweep) -> str:
    """Checks that every run has the examples and steps of the design, so that only one quantity varies.

    Returns:
      A note, if flags such as --config.steps have shortened or changed the runs; else "".

    Raises:
      SweepError: a run of a sweep without such flags differs; the message names it.
    """
    largest = max(sweep.runs, key=lambda run: run.x)
    if largest.is_cut(largest.x / 100 if sweep.design == "one_run" else 1.0):
        seen, drawn = (sum(found.values()) for found in (largest.examples, largest.drawn))
        by_number = sweep.design in ("separate", "one_run", "fixed_multilingual")
        less = ", so the points differ less than their names say"
        return (
            f"Shortened runs: {largest.point} saw {seen:,} of its {drawn:,} examples"
            f"{less if by_number or sweep.ablation == NUM_LANGUAGES else ''}."
        )
    for run in sweep.runs:
        for quantity, value, expected in _fixed(sweep, run, largest):
            if value == expected:
                continue
            differs = f"{run.point} with seed {run.seed} has {quantity} {value}, expected {expected} as in"
            if sweep.overrides:
                return (
                    f"Changed runs ({sweep.overrides}): {differs} {largest.point}, so the points do not differ as "
                    "their names say."
                )
            raise SweepError(
                f"{sweep.directory}: {differs} {largest.point}: these are not runs of one sweep"
            )
    return ""


def _fixed(sweep: Sweep, run: Run, largest: Run):
    """(quantity, its value, the expected value) for all that the design keeps fixed."""
    total, most = sum(run.drawn.values()), sum(largest.drawn.values())
    steps, longest = run.results["steps"], largest.results["steps"]
    seen = [sum(one.examples.values()) for one in (run, largest)]
    per_step = ("examples a step", round(seen[0] / steps), round(seen[1] / longest))
    if sweep.design == "fixed_multilingual":
        others = [{c: n for c, n in one.drawn.items() if c != "en"} for one in (run, largest)]
        yield "other languages' examples", *others
        yield per_step
    elif sweep.design == "separate" or sweep.ablation == NUM_LANGUAGES:
        yield "examples", total, round(run.x / largest.x * most)
        yield per_step
    elif sweep.design == "one_run":
        yield "examples", total, most
        yield "steps", steps, round(run.x / largest.x * longest)
    else:
        yield "examples", total, most
        yield "steps", steps, longest


def scores(sweep: Sweep, point: str, split: str, who: str, metric: str) -> tuple[float, ...]:
    """The score of each seed that has it, in [0, 1]."""
    rows = [run.row(split, who) for run in sweep.at(point)]
    return tuple(row[metric] for row in rows if row and metric in row)


def trials(sweep: Sweep, split: str, who: str) -> int:
    """Number of independent questions of a score, see the docstring of this module."""
    run = sweep.runs[0]
    if who != OTHERS:
        return int(run.row(split, who)["n"])
    rows = run.results["splits"][split]["languages"]
    others = [int(row["n"]) for code, row in rows.items() if code != "en"]
    return round(sum(others) / len(others))


def estimate(values: Sequence[float], n: int) -> Estimate:
    """A score and its interval: over the seeds, or over `n` questions if there is one seed."""
    if len(values) > 1:
        return _student(values)
    return Estimate(values[0], *wilson_interval(values[0], n), tuple(values))


def headline(sweep: Sweep, point: str, split: str, who: str) -> Estimate:
    """The split's main score at a point, over its seeds."""
    values = scores(sweep, point, split, who, sweep.metric(split))
    return estimate(values, trials(sweep, split, who))


def difference(first: Sequence[float], second: Sequence[float], n: int) -> Estimate:
    """`first` - `second`, paired by seed; with one seed by the method of `newcombe`."""
    if len(first) != len(second):
        raise SweepError(f"{len(first)} and {len(second)} seeds cannot be paired")
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    if len(gaps) > 1:
        return _student(gaps)
    return Estimate(gaps[0], *newcombe(first[0], n, second[0], n), tuple(gaps))


def newcombe(first: float, n_first: int, second: float, n_second: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares (Newcombe 1998, method 10)."""
    low_1, high_1 = wilson_interval(first, n_first)
    low_2, high_2 = wilson_interval(second, n_second)
    below = math.hypot(first - low_1, high_2 - second)
    above = math.hypot(high_1 - first, second - low_2)
    return first - second - below, first - second + above


def _student(values: Sequence[float]) -> Estimate:
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))


def compare(sweep: Sweep, first: str, second: str, split: str, who: str) -> Estimate:
    """The main score at `first` minus that at `second`, over the seeds that both have."""
    metric = sweep.metric(split)
    rows = [{run.seed: run.row(split, who) for run in sweep.at(p)} for p in (first, second)]
    seeds = sorted(s for s in rows[0] if rows[0][s] and rows[1].get(s))
    if not seeds:
        raise SweepError(f"{sweep.directory}: {first} and {second} have no seed in common")
    values = [[side[seed][metric] for seed in seeds] for side in rows]
    return difference(*values, trials(sweep, split, who))


def above_floor(sweep: Sweep, point: str, split: str, who: str) -> Estimate:
    """The main score minus its image-blind floor."""
    metric = sweep.metric(split)
    seen = scores(sweep, point, split, who, metric)
    blind = scores(sweep, point, split, who, BLIND + metric)
    return difference(seen, blind, trials(sweep, split, who))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A least-squares line and Spearman's rho; slope and rho have intervals."""

    slope: Estimate
    intercept: float
    rho: Estimate


def can_fit(pairs: Mapping[str, tuple[float, float]]) -> bool:
    """Whether there are four pairs or more, which are not all the same in one number."""
    return len(pairs) >= 4 and all(len(set(numbers)) > 1 for numbers in zip(*pairs.values()))


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fits at least four pairs. The interval of rho is Bonett and Wright's (2000)."""
    if len(x) < 4:
        raise SweepError(f"a correlation of {len(x)} pairs has no interval; at least 4 are needed")
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2)) * line.stderr
    rho = float(stats.spearmanr(x, y).statistic)
    # At +-1 the transformation is infinite and the interval is one point.
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, rho)))
    width = 1.959964 * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    low, high = math.tanh(z - width), math.tanh(z + width)
    slope = Estimate(line.slope, line.slope - half, line.slope + half, (line.slope,))
    return Fit(slope, float(line.intercept), Estimate(rho, low, high, (rho,)))


def relative(sweep: Sweep, point: str, split: str) -> dict[str, tuple[float, float]]:
    """Language -> (examples, score), both in percent of English at the same point, as in the
    paper's Figure 7. Scores are means over the seeds."""
    metric, pairs = sweep.metric(split), {}
    english = np.mean(scores(sweep, point, split, ENGLISH, metric) or [0.0])
    examples = sweep.at(point)[0].examples
    for code in sweep.languages:
        mine = scores(sweep, point, split, code, metric)
        if code != "en" and mine and english and examples.get("en"):
            share = 100 * examples.get(code, 0) / examples["en"]
            pairs[code] = (share, float(100 * np.mean(mine) / english))
    return pairs


def by_examples(sweep: Sweep, split: str) -> dict[str, list[tuple[int, float]]]:
    """Language -> (examples, score) at every point, sorted. Scores are means over the seeds."""
    metric, table = sweep.metric(split), {code: [] for code in sweep.languages}
    for code, point in itertools.product(table, sweep.finished):
        if mine := scores(sweep, point, split, code, metric):
            table[code].append((sweep.at(point)[0].examples.get(code, 0), float(np.mean(mine))))
    return {code: sorted(rows) for code, rows in table.items()}


def shared_languages(sweeps: Sequence[Sweep]) -> tuple[str, ...]:
    """The languages but English that all sweeps have scores of."""
    common = set.intersection(*(set(sweep.languages) for sweep in sweeps)) - {"en"}
    return tuple(sorted(common))


def by_mean_examples(
    sweep: Sweep, split: str, codes: Sequence[str]
) -> list[tuple[float, Estimate]]:
    """(examples per language, the mean score) of the languages `codes` at every finished point."""
    metric, found = sweep.metric(split), []
    for point in sweep.finished:
        runs = sweep.at(point)
        means = [np.mean([run.row(split, code)[metric] for code in codes]) for run in runs]
        examples = np.mean([runs[0].examples.get(code, 0) for code in codes])
        one = estimate([float(mean) for mean in means], trials(sweep, split, codes[0]))
        found.append((float(examples), one))
    return found


def natural_point(sweep: Sweep) -> str | None:
    """The point at which each language has its own share of PangeaIns, if the sweep has one."""
    if (sweep.ablation, sweep.design) != ("ablate_language_popularity", "alpha"):
        return None
    return next((point for point in sweep.finished if sweep.points[point] == 1), None)


def can_rank(sweep: Sweep) -> bool:
    """Whether the sweep trained every language at three or more numbers of examples."""
    if (sweep.ablation, sweep.design) != ("ablate_language_popularity", "rotate"):
        return False
    table = by_examples(sweep, sweep.splits[-1])
    return all(len({x for x, _ in rows}) >= 3 for rows in table.values())


def within_rho(table: Mapping[str, Sequence[tuple[float, float]]], *, seed: int = 0) -> Estimate:
    """The mean over languages of Spearman's rho within each; the interval is a bootstrap over languages.

    Args:
      table: language -> (examples, score) pairs with at least 3 different numbers of examples.
    """
    rhos = []
    for code, rows in table.items():
        x, y = zip(*rows, strict=True) if rows else ((), ())
        if len(set(x)) < 3:
            found = f"{code} has {len(set(x))} different numbers of examples"
            raise SweepError(f"{found}; at least 3 are needed")
        # If the score is constant there is no rank order, so no correlation.
        rhos.append(float(stats.spearmanr(x, y).statistic) if len(set(y)) > 1 else 0.0)
    rng = np.random.default_rng(seed)
    means = np.mean(rng.choice(rhos, (DRAWS, len(rhos))), axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(np.mean(rhos)), float(low), float(high), tuple(rhos))
