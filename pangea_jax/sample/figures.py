"""Figures of the scores of a finished run: for each language, and for each kind of question.

They show `results.json`. Scores are fractions in the file and percent in the figures. matplotlib is imported when a
figure is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pangea_jax.figures import style as fig
from pangea_jax.figures.text_render import fit_text
from pangea_jax.sample.scores import (
    BLIND,
    BY_METRIC,
    MEAN_ROW,
    SCORES,
    Rows,
    examples_of,
    rows_of,
    wilson_interval,
)
from pangea_jax.sample.tables import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

BY_LANGUAGE = tuple(BY_METRIC[metric] for metric in ("rank_accuracy", "exact_match"))
CHANCE_LINE = {"color": fig.INK, "linewidth": 0.8, "linestyle": (0, (4, 3))}
WIDTH, LEFT = 9.2, 0.12  # inches: width of a figure, left edge of its text


@dataclass(frozen=True)
class Bar:
    """A score with its floor, in [0, 1], and the number of questions; None: a mean, without an interval."""

    score: float
    floor: float
    n: int | None

    @classmethod
    def of(cls, rows: Rows, code: str, metric: str) -> Bar | None:
        """The bar of a row of scores; None if there is no such score."""
        row = rows.get(code, {})
        if metric not in row:
            return None
        return cls(row[metric], row[BLIND + metric], None if code == MEAN_ROW else int(row["n"]))


def plot_languages(
    results: Mapping[str, Any], out_dir: str | Path, title: str
) -> tuple[Path, Path]:
    """Draws `languages.png` and `languages.svg`: scores of every language on every split.

    English comes first, then the mean of the others, then the others by falling rank accuracy.
    The mean has no interval, since languages are not repeated samples of one quantity.

    Args:
      results: the contents of results.json.
      out_dir: folder for the figures.
      title: what was trained, for example "40 % English, 8 languages".

    Raises:
      ValueError: as `results_table`, or there are more splits than colours.
    """

    splits = _read(results)
    order = _row_order(splits)
    with fig.style():
        rows = (0.34 if len(order) <= 14 else 0.235) * len(order)
        figure, panels = _page(title, splits, rows, left=2.25, panels=2)
        for panel, score in zip(panels, BY_LANGUAGE, strict=True):
            for i, rows in enumerate(splits.values()):
                bars = [Bar.of(rows, code, score.metric) for code in order]
                _draw_bars(panel, bars, series=i, of=len(splits))
            _finish(panel, score.title, len(order))
            if score.chance:
                panel.axvline(100 * score.chance, **CHANCE_LINE)
            if MEAN_ROW in order:
                panel.axhline(order.index(MEAN_ROW) + 0.5, color=fig.FAINT, linewidth=0.8)
        _label_rows(panels[0], order, examples_of(results))
        return fig.save(figure, Path(out_dir) / "languages")


def plot_tasks(results: Mapping[str, Any], out_dir: str | Path, title: str) -> tuple[Path, Path]:
    """Draws `tasks.png` and `tasks.svg`: every score, in English and as the mean of the others.

    Args and errors are those of `plot_languages`.
    """
    splits = _read(results)
    codes = tuple(dict.fromkeys(code for rows in splits.values() for code in rows))
    groups = [code for code in ("en", MEAN_ROW) if code in codes] or list(codes)
    with fig.style():
        figure, panels = _page(title, splits, 0.46 * len(SCORES), left=2.75, panels=len(groups))
        for panel, code in zip(panels, groups, strict=True):
            for i, rows in enumerate(splits.values()):
                bars = [Bar.of(rows, code, score.metric) for score in SCORES]
                _draw_bars(panel, bars, series=i, of=len(splits))
            for y, score in enumerate(SCORES):
                if score.chance:
                    panel.vlines(100 * score.chance, y - 0.44, y + 0.44, **CHANCE_LINE)
            _finish(panel, label(code, codes), len(SCORES))
        panels[0].set_yticks(range(len(SCORES)), [score.title for score in SCORES])
        panels[0].tick_params(axis="y", labelsize=9, labelcolor=fig.INK)
        return fig.save(figure, Path(out_dir) / "tasks")


def _read(results: Mapping[str, Any]) -> dict[str, Rows]:
    splits = {split: rows_of(split, scores) for split, scores in results["splits"].items()}
    if len(splits) > len(fig.SERIES):
        raise ValueError(f"{len(splits)} splits {list(splits)}: one figure shows {len(fig.SERIES)}")
    return splits


def _page(
    title: str, splits: Collection[str], rows: float, *, left: float, panels: int
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with title, legend and panels side by side.

    Args:
      rows: height of the panels, in inches.
      left: room to the left of them, in inches.
    """
    from matplotlib.figure import Figure

    lines, size = fit_text(title, 72 * (WIDTH - 2 * LEFT), 12, min_size=9, max_lines=3)
    head = 0.66 + 0.2 * len(lines)  # inches
    height = 0.57 + head + rows
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(
        left=left / WIDTH, right=0.985, wspace=0.09, bottom=0.55 / height, top=1 - head / height
    )
    x, y = LEFT / WIDTH, 1 - 0.14 / height
    figure.text(x, y, "\n".join(lines), size=size, va="top", parse_math=False)
    handles = _legend_handles(splits)
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(x - 0.008, 1 - (head - 0.36) / height),
        ncols=len(handles), columnspacing=1.4, handlelength=1.6,
    )  # fmt: skip
    return figure, axes


def _row_order(splits: Mapping[str, Rows]) -> list[str]:
    codes = dict.fromkeys(code for rows in splits.values() for code in rows)

    def mean_rank(code: str) -> float:
        return float(np.mean([r[code]["rank_accuracy"] for r in splits.values() if code in r]))

    first = [code for code in ("en", MEAN_ROW) if code in codes]
    return first + sorted((c for c in codes if c not in first), key=mean_rank, reverse=True)


def _draw_bars(axes: Axes, bars: Sequence[Bar | None], *, series: int, of: int) -> None:
    """One bar a row, of number `series` among the `of` bars that share a row."""
    thickness = 0.78 / of
    half = thickness * 0.46
    for place, bar in enumerate(bars):
        if bar is None:
            continue
        y = place + (series - (of - 1) / 2) * thickness
        axes.barh(y, 100 * bar.score, 2 * half, color=fig.SERIES[series])
        axes.vlines(100 * bar.floor, y - half, y + half, color=fig.INK, linewidth=1.6)
        if bar.n is not None:
            low, high = wilson_interval(bar.score, bar.n)
            axes.hlines(y, 100 * low, 100 * high, color=fig.INK, linewidth=0.8)


def _finish(axes: Axes, title: str, rows: int) -> None:
    axes.set_title(title)
    axes.set_xlim(0, 101)
    axes.set_ylim(rows - 0.45, -0.55)
    axes.set_xlabel("percent of questions")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _label_rows(axes: Axes, order: Sequence[str], examples: Mapping[str, int] | None) -> None:
    """Writes the names of the rows and each language's share of the training examples."""
    axes.set_yticks(range(len(order)), [""] * len(order))
    where = {"transform": axes.get_yaxis_transform(), "va": "center"}
    small = {"ha": "right", "size": 8, "color": fig.MUTED}
    for y, code in enumerate(order):
        colour = fig.MUTED if code == MEAN_ROW else fig.INK
        axes.text(-0.63, y, label(code, order), color=colour, **where)
        if examples and code != MEAN_ROW:
            share = f"{100 * examples.get(code, 0) / sum(examples.values()):.1f} %"
            axes.text(-0.04, y, share, **where, **small)
    if examples:
        above = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate("share of examples", (-0.04, 1), xytext=(0, 6), **above, **small)


def _legend_handles(splits: Collection[str]) -> list[Patch | Line2D]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels = (split.replace("_", " ") for split in splits)
    return [
        *(Patch(color=c, label=label) for label, c in zip(labels, fig.SERIES, strict=False)),
        Line2D([], [], color=fig.INK, marker="|", ls="", ms=9, mew=1.6, label="image-blind floor"),
        Line2D([], [], color=fig.INK, linewidth=0.8, label="95 % interval"),
        Line2D([], [], label="chance", **CHANCE_LINE),
    ]
