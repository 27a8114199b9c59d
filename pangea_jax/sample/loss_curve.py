"""The figure of a run's losses and learning rate, from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from pangea_jax.figures import style as fig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From this ratio of the largest to the smallest loss on, the axis is logarithmic.
LOG_FROM = 4


def plot_loss(metrics_path: str | Path, out_dir: str | Path) -> tuple[Path, Path]:
    """Draws `loss.png` and `loss.svg`: training loss, validation loss and learning rate over the steps.

    The vertical axis covers the values alone, and is logarithmic if the largest is a multiple of the
    smallest. A second axis counts examples if the lines have a running total `examples`.

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
        _draw_loss(upper, steps, loss, columns["validation/loss"])
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


def _draw_loss(axes: Axes, steps: np.ndarray, loss: np.ndarray, validation: np.ndarray) -> None:
    window = max(1, round(len(loss) / 50))
    held_back = np.isfinite(validation)
    if window == 1:
        form = "o-" if len(loss) < 3 else "-"
        axes.plot(steps, loss, form, color=fig.BLUE, ms=4, linewidth=1.6, label="training")
    else:
        axes.plot(steps, loss, color=fig.BLUE, alpha=0.25, linewidth=0.7, label="each logged step")
        label = f"mean of {window} logged steps"
        axes.plot(steps, _smooth(loss, window), color=fig.BLUE, linewidth=1.6, label=label)
    if held_back.any():
        x, y = steps[held_back], validation[held_back]
        style = {"color": fig.VERMILION, "clip_on": False}  # the first and the last lie on the edge
        axes.plot(x, y, "o-", ms=4, linewidth=1.6, label="validation", **style)
        best = int(np.argmin(y))
        label = f"best: {y[best]:.4g} after step {int(x[best]) + 1}"
        axes.plot(x[best], y[best], "o", **style, mfc="none", ms=9, label=label)
    if window > 1 or held_back.any():
        # Below the panels: within them it would hide a part of a curve.
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(0, max(1, steps[-1]))
    values = np.concatenate([loss[np.isfinite(loss)], validation[held_back]])
    if len(values) and values.min() > 0 and values.max() > LOG_FROM * values.min():
        _make_logarithmic(axes, values.max() / values.min())


def _make_logarithmic(axes: Axes, ratio: float) -> None:
    """Few enough labels that they do not overlap, and at least two; `ratio` is the largest value over the smallest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if ratio < 12 else (1, 2, 5) if ratio < 100 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


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
    names = ("step", "loss", "learning_rate", "examples", "validation/loss")
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
