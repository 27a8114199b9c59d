"""Tables of a finished run for the terminal: scores and time. Scores are percent here, fractions in results.json."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from rich.table import Column, Table

from pangea_jax import languages
from pangea_jax.sample.scores import BLIND, MEAN_ROW, SCORES, Rows, Score, examples_of, rows_of

MISSING = "–"  # a run from before a score existed


def results_table(results: Mapping[str, Any]) -> Table:
    """Scores of every language, of all splits in one cell; at most 100 columns wide.

    Args:
      results: the contents of results.json.

    Raises:
      ValueError: a score is not within [0, 1]. The message names split, language and field.
    """
    splits = [rows_of(split, scores) for split, scores in results["splits"].items()]
    examples = examples_of(results)
    codes = tuple(dict.fromkeys(code for rows in splits for code in rows))
    questions = max(
        int(row["n"]) for rows in splits for code, row in rows.items() if code != MEAN_ROW
    )
    names = " / ".join(split.replace("_", " ") for split in results["splits"])
    table = Table(
        "language",
        *(Column(score.name, justify="right") for score in SCORES),
        *([Column("examples", justify="right")] if examples else []),
        title=f"Scores in percent: {names}",
        caption=f"{questions} questions of each kind per language. The image-blind floor, here the mean over the "
        "languages, is the score when the pictures are replaced. What is above it comes from the pictures.",
    )
    for i, code in enumerate(codes):
        cells = [_cell(splits, code, score) for score in SCORES]
        name = label(code, codes) + ("" if code == MEAN_ROW else f" ({code})")
        table.add_row(
            name,
            *cells,
            *([_examples(examples, code)] if examples else []),
            style="bold" if code in ("en", MEAN_ROW) else None,
            end_section=code == MEAN_ROW or i == len(codes) - 1,
        )
    table.add_row("image-blind floor", *(_floor(splits, score) for score in SCORES))
    table.add_row("chance", *(f"{100 * score.chance:.0f}" for score in SCORES))
    return table


def _cell(splits: Collection[Rows], code: str, score: Score) -> str:
    return _join([rows.get(code, {}).get(score.metric) for rows in splits])


def _floor(splits: Collection[Rows], score: Score) -> str:
    """The mean over the languages of each split's floor."""
    means = []
    for rows in splits:
        found = [row.get(BLIND + score.metric) for code, row in rows.items() if code != MEAN_ROW]
        means.append(None if None in found else float(np.mean(found)))
    return _join(means)


def _join(values: Collection[float | None]) -> str:
    return " / ".join(f"{MISSING if v is None else format(100 * v, '.0f'):>3}" for v in values)


def _examples(examples: Mapping[str, int], code: str) -> str:
    """The number of training examples of a language, or the mean of those but English."""
    if code != MEAN_ROW:
        return f"{examples.get(code, 0):,}"
    return f"{np.mean([n for other, n in examples.items() if other != 'en']):,.0f}"


def label(code: str, codes: Collection[str]) -> str:
    """The name of a row of scores among those of `codes`."""
    if code == MEAN_ROW:
        return f"mean of {sum(other not in ('en', MEAN_ROW) for other in codes)} others"
    return languages.get(code).english_name


def timing_table(timing: Mapping[str, Mapping[str, float]]) -> Table:
    """The seconds of each phase of a run, from the timer's `summary()`."""
    numbers = (Column(name, justify="right") for name in ("seconds", "share"))
    table = Table("phase", *numbers, title="Where the time went")
    for phase, spent in timing.items():
        style = "bold" if phase == "total" else None
        table.add_row(phase, f"{spent['seconds']:,.1f}", f"{spent['share']:.1%}", style=style)
    return table
