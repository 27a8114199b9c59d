"""Tables and figures of a finished run: scores, time, the loss curve, scores per language.

They show `results.json` and `metrics.jsonl`. Scores are fractions in the files and percent in tables and figures.
matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from rich.table import Column, Table

from pangea_jax import languages
from pangea_jax.figures import style as fig
from pangea_jax.figures.text_render import fit_text
from pangea_jax.sample.answer_sheet import answer_sheet as answer_sheet  # one of the figures
from pangea_jax.sample.scores import METRIC_TITLES, RANK_CHANCE, wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

METRICS = ("exact_match", "rank_accuracy")
COLUMNS = tuple(f"{prefix}{metric}" for metric in METRICS for prefix in ("", "image_blind_"))
MEAN_ROW = "multilingual"
CHANCE_LINE = {"color": fig.INK, "linewidth": 0.8, "linestyle": (0, (4, 3))}
WIDTH, LEFT = 9.2, 0.12  # inches: width of the languages figure, left edge of its text

Rows = Mapping[str, Mapping[str, float]]  # language or MEAN_ROW -> its scores


def results_table(results: Mapping[str, Any]) -> Table:
    """Scores of every split and language.

    Args:
      results: the contents of results.json.

    Raises:
      ValueError: a score is missing or outside [0, 1]. The message names split, language and field.
    """
    numbers = ("exact match", "blind", "rank accuracy", "blind", "n")
    table = Table(
        "split",
        "language",
        *(Column(name, justify="right") for name in numbers),
        title="Scores in percent",
        caption=f"Chance: {RANK_CHANCE:.1%} rank accuracy. Blind: the image-blind floor, which is "
        "the score when the picture is replaced. What a score has above it comes from the picture.",
    )
    for split, scores in results["splits"].items():
        rows = _rows(split, scores)
        for i, (code, row) in enumerate(rows.items()):
            cells = [f"{100 * row[column]:.1f}" for column in COLUMNS]
            table.add_row(
                split.replace("_", " ") if i == 0 else "",
                _label(code, rows) + ("" if code == MEAN_ROW else f" ({code})"),
                *cells,
                f"{int(row['n']):,}",
                style="bold" if code in ("en", MEAN_ROW) else None,
                end_section=code == MEAN_ROW or i == len(rows) - 1,
            )
    return table


def timing_table(timing: Mapping[str, Mapping[str, float]]) -> Table:
    """The seconds of each phase of a run, from the timer's `summary()`."""
    numbers = (Column(name, justify="right") for name in ("seconds", "share"))
    table = Table("phase", *numbers, title="Where the time went")
    for phase, spent in timing.items():
        style = "bold" if phase == "total" else None
        table.add_row(phase, f"{spent['seconds']:,.1f}", f"{spent['share']:.1%}", style=style)
    return table


def plot_loss(metrics_path: str | Path, out_dir: str | Path) -> tuple[Path, Path]:
    """Draws `loss.png` and `loss.svg`: loss and learning rate over the steps.

    A second axis counts examples if the lines have a running total `examples`.

    Args:
      metrics_path: metrics.jsonl as `Telemetry` writes it.
      out_dir: folder for the figures.

    Raises:
      ValueError: a line is not JSON, or no line has a loss.
    """
    from matplotlib.figure import Figure

    columns = _read_metrics(Path(metrics_path))
    steps, loss, rate = columns["step"], columns["loss"], columns["learning_rate"]
    has_rate = bool(np.isfinite(rate).any())
    with fig.style():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        panels = figure.subplots(
            1 + has_rate, sharex=True, squeeze=False, height_ratios=[4, 1][: 1 + has_rate]
        )
        upper, lower = panels[0, 0], panels[-1, 0]
        _draw_loss(upper, steps, loss)
        if has_rate:
            lower.plot(steps, rate, color=fig.MUTED, linewidth=1.2)
            lower.set_ylim(bottom=0)
            lower.set_ylabel("learning\nrate")
            lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        lower.set_xlabel("optimiser step")
        lower.xaxis.get_major_locator().set_params(integer=True)
        if columns["examples"][-1] > 0:
            _add_examples_axis(upper, columns["examples"][-1] / (steps[-1] + 1))
        return fig.save(figure, Path(out_dir) / "loss")


def _draw_loss(axes: Axes, steps: np.ndarray, loss: np.ndarray) -> None:
    window = max(1, round(len(loss) / 50))
    if window == 1:
        axes.plot(steps, loss, color=fig.BLUE, linewidth=1.6)
    else:
        axes.plot(steps, loss, color=fig.BLUE, alpha=0.25, linewidth=0.7, label="each logged step")
        label = f"mean of {window} logged steps"
        axes.plot(steps, _smooth(loss, window), color=fig.BLUE, linewidth=1.6, label=label)
        axes.legend(loc="upper right")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_xlim(0, max(1, steps[-1]))


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
    from matplotlib.figure import Figure

    splits = {split: _rows(split, scores) for split, scores in results["splits"].items()}
    order = _row_order(splits)
    if len(splits) > len(fig.SERIES):
        raise ValueError(f"{len(splits)} splits {list(splits)}: one figure shows {len(fig.SERIES)}")
    with fig.style():
        lines, size = fit_text(title, 72 * (WIDTH - 2 * LEFT), 12, min_size=9, max_lines=3)
        head = 0.66 + 0.2 * len(lines)  # inches
        height = 0.57 + head + (0.34 if len(order) <= 14 else 0.235) * len(order)
        figure = Figure(figsize=(WIDTH, height))
        panels = figure.subplots(1, 2, sharey=True)
        figure.subplots_adjust(
            left=2.25 / WIDTH, right=0.985, wspace=0.09, bottom=0.55 / height, top=1 - head / height
        )
        for panel, metric in zip(panels, METRIC_TITLES, strict=True):
            _draw_bars(panel, splits, order, metric)
        panels[0].axvline(100 * RANK_CHANCE, **CHANCE_LINE)
        _label_rows(panels[0], order, results.get("mixture", {}).get("examples_per_language"))
        x, y = LEFT / WIDTH, 1 - 0.14 / height
        figure.text(x, y, "\n".join(lines), size=size, va="top", parse_math=False)
        handles = _legend_handles(splits)
        place = (x - 0.008, 1 - (head - 0.36) / height)
        figure.legend(
            handles=handles, loc="center left", bbox_to_anchor=place, ncols=len(handles),
            columnspacing=1.4, handlelength=1.6,
        )  # fmt: skip
        return fig.save(figure, Path(out_dir) / "languages")


def _rows(split: str, scores: Mapping[str, Any]) -> Rows:
    """Checks the scores. Returns language code or MEAN_ROW -> scores: English, mean, others by code."""
    rows = {"en": scores["english"]} if scores.get("english") else {}
    if scores.get(MEAN_ROW):
        rows[MEAN_ROW] = scores[MEAN_ROW]
    rows |= {code: row for code, row in sorted(scores["languages"].items()) if code not in rows}
    for code, row in rows.items():
        for name in (*COLUMNS, "n"):
            value = row.get(name)
            lowest, highest = (1, np.inf) if name == "n" else (0, 1)
            if value is None or not lowest <= value <= highest:
                raise ValueError(
                    f"results, split {split!r}, {code!r}: {name} is {value!r}, expected "
                    f"{'a count of 1 or more' if name == 'n' else 'a fraction between 0 and 1'}"
                )
    return rows


def _row_order(splits: Mapping[str, Rows]) -> list[str]:
    codes = dict.fromkeys(code for rows in splits.values() for code in rows)

    def mean_rank(code: str) -> float:
        return float(np.mean([r[code]["rank_accuracy"] for r in splits.values() if code in r]))

    first = [code for code in ("en", MEAN_ROW) if code in codes]
    return first + sorted((c for c in codes if c not in first), key=mean_rank, reverse=True)


def _label(code: str, codes: Collection[str]) -> str:
    if code == MEAN_ROW:
        return f"mean of {sum(other not in ('en', MEAN_ROW) for other in codes)} others"
    return languages.get(code).english_name


def _draw_bars(axes: Axes, splits: Mapping[str, Rows], order: Sequence[str], metric: str) -> None:
    thickness = 0.78 / len(splits)
    for i, (rows, colour) in enumerate(zip(splits.values(), fig.SERIES, strict=False)):
        shift = (i - (len(splits) - 1) / 2) * thickness
        for place, code in enumerate(order):
            if code not in rows:
                continue
            y, row = place + shift, rows[code]
            axes.barh(y, 100 * row[metric], thickness * 0.92, color=colour)
            floor, half = 100 * row[f"image_blind_{metric}"], thickness * 0.46
            axes.vlines(floor, y - half, y + half, color=fig.INK, linewidth=1.6)
            if code != MEAN_ROW:
                low, high = wilson_interval(row[metric], int(row["n"]))
                axes.hlines(y, 100 * low, 100 * high, color=fig.INK, linewidth=0.8)
    axes.set_title(METRIC_TITLES[metric])
    axes.set_xlim(0, 101)
    axes.set_ylim(len(order) - 0.45, -0.55)
    axes.set_xlabel("percent of pictures")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if MEAN_ROW in order:
        axes.axhline(order.index(MEAN_ROW) + 0.5, color=fig.FAINT, linewidth=0.8)


def _label_rows(axes: Axes, order: Sequence[str], examples: Mapping[str, int] | None) -> None:
    """Writes the names of the rows and each language's share of the training examples."""
    axes.set_yticks(range(len(order)), [""] * len(order))
    where = {"transform": axes.get_yaxis_transform(), "va": "center"}
    small = {"ha": "right", "size": 8, "color": fig.MUTED}
    for y, code in enumerate(order):
        colour = fig.MUTED if code == MEAN_ROW else fig.INK
        axes.text(-0.63, y, _label(code, order), color=colour, **where)
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


def _read_metrics(path: Path) -> dict[str, Float[np.ndarray, " lines"]]:
    """Columns of the lines that have a loss; NaN if a line lacks the metric."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, {error}") from error
        if "loss" in line:
            lines.append(line)
    if not lines:
        raise ValueError(
            f"{path}: no line has a loss; expected the metrics.jsonl of a training run"
        )
    names = ("step", "loss", "learning_rate", "examples")
    return {name: np.array([line.get(name) for line in lines], float) for name in names}


def _smooth(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """Centred moving mean of the finite values in a window, which is shorter at the ends."""
    finite, kernel = np.isfinite(values), np.ones(window)
    total = np.convolve(np.where(finite, values, 0), kernel, mode="same")
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.convolve(finite, kernel, mode="same")


def _add_examples_axis(axes: Axes, examples_per_step: float) -> None:
    top = axes.secondary_xaxis(
        "top", functions=(lambda s: s * examples_per_step, lambda e: e / examples_per_step)
    )
    top.set_xlabel("training examples")
    top.spines["top"].set_visible(True)
    top.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
