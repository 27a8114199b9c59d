"""Draws the figures of a sweep, each as PNG and SVG."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval.ablation import intervals
from eval.ablation import paper as published
from eval.ablation.intervals import ENGLISH, OTHERS, Sweep
from pangea_jax import languages
from pangea_jax.figures import style as fig
from pangea_jax.figures.text_render import fit_text
from pangea_jax.sample.figures import CHANCE_LINE
from pangea_jax.sample.scores import BLIND, BY_METRIC

COLOURS = {ENGLISH: fig.BLUE, OTHERS: fig.ORANGE}
LINES = {ENGLISH: ("o", "English"), OTHERS: ("s", "mean of the others")}
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
COLUMNS = 3


def draw(sweep: Sweep, out_dir: Path) -> dict[str, Path]:
    """Draws all figures of the sweep. Returns name -> path of the PNG; the SVG is beside it."""
    figures = {"languages": plot_languages}
    if sweep.design != "rotate":
        figures = {"curve": plot_curve} | figures
    if intervals.natural_point(sweep):
        figures["popularity"] = plot_popularity
    if intervals.can_rank(sweep):
        figures["examples"] = plot_examples
    paths = {}
    with fig.style():
        for name, plot in figures.items():
            figure = plot(sweep)
            if sweep.note:
                room = 72 * figure.get_figwidth() - 20
                lines, size = fit_text(sweep.note, room, 7, min_size=7, max_lines=5)
                figure.supxlabel("\n".join(lines), size=size, color=fig.VERMILION)
            fig.fit_titles(figure)
            if name == "popularity":  # last, because the labels must know where the axes are
                for panel, drawn in zip(figure.axes, _popularity(sweep), strict=True):
                    _label_pairs(panel, drawn)
            paths[name] = fig.save(figure, out_dir / name)[0]
    return paths


def plot_curve(sweep: Sweep) -> Figure:
    """English and the mean of the others at every point; the paper's curve has its own axis.

    Bands are 95 % intervals (`eval.ablation.intervals`), dots are seeds, dotted lines are image-blind floors.
    """
    theirs = published.curves(sweep.ablation)
    panels = [("ours", split) for split in sweep.splits] + [("paper", name) for name in theirs]
    rows, columns = -(-len(panels) // COLUMNS), min(COLUMNS, len(panels))
    figure = Figure(figsize=(10.2, 0.5 + 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    for panel, (kind, name) in zip(axes, panels, strict=False):
        if kind == "ours":
            _draw_points(panel, sweep, name)
            if not sweep.is_ordered:
                names = [point.replace("_", " ") for point in sweep.finished]
                below = fig.name_ticks(panel, names, (720 / columns - 50) / len(names))
                figure.set_figheight(0.4 + (3.0 + below) * rows)
        else:
            _draw_published(panel, theirs[name], sweep.ablation, name)
    handles = _curve_handles(sweep, with_paper=bool(theirs))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _curve_handles(sweep: Sweep, *, with_paper: bool) -> list[Line2D | Patch]:
    """The entries of the legend, only for what is drawn: without scores in English there is none for English."""
    handles, joined = [], _is_line(sweep)
    for who, (mark, label) in LINES.items():
        scored = any(run.row(split, who) for run in sweep.runs for split in sweep.splits)
        if scored or with_paper:
            line = {"ls": "-" if joined or with_paper else "", "marker": mark, "ms": 4}
            handles.append(Line2D([], [], color=COLOURS[who], label=label, **line))
    count = len(sweep.seeds)
    seeds = "one seed (Wilson)" if count == 1 else f"{count} seeds (Student's t)"
    interval = {"label": f"95 % interval, {seeds}"}
    if joined:
        handles.append(Patch(color=fig.FAINT, **interval))
    else:
        handles.append(Line2D([], [], color=fig.MUTED, marker="|", ls="", ms=9, **interval))
    if any(sweep.has(split, BLIND + sweep.metric(split)) for split in sweep.splits):
        line = {"ls": ":"} if joined else {"ls": "", "marker": "_"}
        handles.append(Line2D([], [], color=fig.MUTED, label="image-blind floor", **line))
    return handles


def _is_line(sweep: Sweep) -> bool:
    """Whether a line joins the points: it does if they lie on a scale and there are two or more."""
    return sweep.is_ordered and len(sweep.finished) > 1


def _draw_points(axes: Axes, sweep: Sweep, split: str) -> None:
    metric, points = sweep.metric(split), sweep.finished
    ordered, joined = sweep.is_ordered, _is_line(sweep)
    places = [sweep.points[p] for p in points] if ordered else list(range(len(points)))
    for who, (mark, _) in LINES.items():
        rows = [
            (x, intervals.headline(sweep, point, split, who), point)
            for x, point in zip(places, points, strict=True)
            if intervals.scores(sweep, point, split, who, metric)
        ]
        if rows:
            # On an axis of names, the two intervals stand side by side, so that neither hides the other.
            aside = 0 if ordered else 0.06 if who == OTHERS else -0.06
            x = np.array([place + aside for place, *_ in rows])
            _draw_estimates(axes, x, [one for _, one, _ in rows], COLOURS[who], mark, joined)
        if rows and sweep.has(split, BLIND + metric):
            blind = [intervals.scores(sweep, p, split, who, BLIND + metric) for *_, p in rows]
            floor = 100 * np.array([np.mean(values) for values in blind])
            style = {"ls": ":"} if joined else {"ls": "", "marker": "_", "ms": 9}
            axes.plot(x, floor, color=COLOURS[who], linewidth=1.2, **style)
    axes.set_ylim(0, 101)
    axes.set_xlabel(sweep.axis)
    axes.set_ylabel("percent")
    axes.set_title(_split_title(split, metric))
    if not ordered:
        axes.set_xlim(-0.5, len(points) - 0.5)


def _draw_estimates(axes, x, estimates, colour, mark, joined) -> None:
    bounds = 100 * np.array([(one.low, one.high) for one in estimates])
    low, high = np.clip(bounds, 0, 100).T
    if joined:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=1.4)
    mean = 100 * np.array([one.mean for one in estimates])
    axes.plot(x, mean, color=colour, marker=mark, ms=4.5, linewidth=1.6 if joined else 0)
    for place, one in zip(x, estimates, strict=True):
        if len(one.values) > 1:
            dots = 100 * np.array(one.values)
            axes.plot([place] * len(dots), dots, ".", color=colour, ms=4, alpha=0.55)


def _draw_published(axes: Axes, rows: Mapping[float, tuple[float, float]], stem, name) -> None:
    x = list(rows)
    for place, (who, (mark, _)) in enumerate(LINES.items()):
        y = [pair[place] for pair in rows.values()]
        axes.plot(x, y, color=COLOURS[who], marker=mark, ms=4.5, linewidth=1.6, mfc="white")
    values = [score for pair in rows.values() for score in pair]
    axes.set_ylim(min(values) - 2, max(values) + 2)
    axes.set_xlabel(published.AXES[stem])
    axes.set_ylabel("percent (own axis)")
    axes.set_title(f"{published.SOURCES[stem]}: {name}", size=8.5)
    axes.set_facecolor("#F7F7F7")


def plot_languages(sweep: Sweep) -> Figure:
    """The score of each language at each point, and below it its number of examples."""
    points, codes = sweep.finished, sweep.languages
    roomy = len(codes) <= 12
    height = 1.3 + (0.42 if roomy else 0.24) * len(codes)
    width = min(16, 1.9 + 0.78 * max(4, len(points)) * len(sweep.splits))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, len(sweep.splits), sharey=True, squeeze=False)[0]
    for panel, split in zip(panels, sweep.splits, strict=True):
        image = _draw_heat(panel, sweep, split, roomy)
        if not sweep.is_ordered:
            names = [point.replace("_", " ") for point in points]
            room = 72 * (width - 1.9) / len(sweep.splits) / len(names)
            figure.set_figheight(height + fig.name_ticks(panel, names, room))
    panels[0].set_yticks(range(len(codes)), [languages.get(c).english_name for c in codes])
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    bar.set_label("percent")
    bar.outline.set_visible(False)
    return figure


def _draw_heat(axes: Axes, sweep: Sweep, split: str, roomy: bool):
    points, codes, metric = sweep.finished, sweep.languages, sweep.metric(split)
    table = np.full((len(codes), len(points)), np.nan)
    for j, point in enumerate(points):
        for i, code in enumerate(codes):
            values = intervals.scores(sweep, point, split, code, metric)
            table[i, j] = 100 * np.mean(values) if values else np.nan
    image = axes.imshow(table, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    scores = [[f"{value:.0f}" if np.isfinite(value) else "" for value in row] for row in table]
    fig.write_cells(axes, scores, table < 55, size=8.5, below=-0.16 if roomy else 0)
    if roomy:
        examples = [sweep.at(point)[0].examples for point in points]
        counts = [
            [f"{one.get(code, 0):,}" if text else "" for one, text in zip(examples, row)]
            for code, row in zip(codes, scores)
        ]
        fig.write_cells(axes, counts, table < 55, size=6, below=0.24)
    axes.set_xticks(range(len(points)), [f"{sweep.points[p]:g}" for p in points])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(sweep.axis)
    small = "; small: examples" if roomy else ""
    axes.set_title(f"{_split_title(split, metric)}{small}")
    return image


def plot_popularity(sweep: Sweep) -> Figure:
    """Share against score, both relative to English, beside the paper's Figure 7; `draw` labels the points."""
    figure = Figure(figsize=(10.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(sweep.splits) + 1)
    for panel, split, drawn in zip(panels, sweep.splits, _popularity(sweep), strict=False):
        pairs = drawn[""]
        _draw_pairs(panel, drawn)
        title = _split_title(split, sweep.metric(split))
        if intervals.can_fit(pairs):
            title += "\n" + _draw_fit(panel, pairs)
        panel.set_title(title)
    panels[-1].set_facecolor("#F7F7F7")
    _draw_pairs(panels[-1], published.POPULARITY)
    panels[-1].set_title(published.SOURCES[sweep.ablation])
    panels[-1].legend(loc="lower right", handletextpad=0.2)
    panels[0].set_ylabel("score (% of English)")
    return figure


def _popularity(sweep: Sweep) -> list[Mapping[str, Mapping[str, tuple[float, float]]]]:
    """What each panel of `plot_popularity` shows: group -> language -> (examples, score)."""
    point = intervals.natural_point(sweep)
    ours = [{"": intervals.relative(sweep, point, split)} for split in sweep.splits]
    return [*ours, published.POPULARITY]


def _draw_pairs(axes: Axes, groups: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    for (name, pairs), colour, mark in zip(groups.items(), fig.PALETTE, MARKS, strict=False):
        if not pairs:
            axes.text(0.5, 0.5, "no score in English", ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            continue
        x, y = zip(*pairs.values(), strict=True)
        axes.plot(x, y, mark, color=colour, ms=5, label=name)
    axes.set_xlim(left=0)
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("examples (% of English)")


def _label_pairs(axes: Axes, groups: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Writes the codes beside the points of `_draw_pairs`; the rest of the figure must be complete."""
    coloured = zip(groups.values(), fig.PALETTE, strict=False)
    points = [(*place, code, colour) for pairs, colour in coloured for code, place in pairs.items()]
    fig.label_points(axes, points)


def _draw_fit(axes: Axes, pairs: Mapping[str, tuple[float, float]]) -> str:
    """Draws the fitted line. Returns rho as text for the title, because in the panel it could hide points."""
    x, y = zip(*pairs.values(), strict=True)
    found = intervals.fit(x, y)
    ends = np.array([0, max(x)])
    axes.plot(ends, found.intercept + found.slope.mean * ends, color=fig.MUTED, linewidth=1.2)
    return f"Spearman's ρ {found.rho.mean:.2f} [{found.rho.low:.2f}, {found.rho.high:.2f}]"


def plot_examples(sweep: Sweep) -> Figure:
    """One line for each language, its score against its number of examples."""
    figure = Figure(figsize=(10.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(sweep.splits), sharey=True, squeeze=False)[0]
    for panel, split in zip(panels, sweep.splits, strict=True):
        table = intervals.by_examples(sweep, split)
        styles = zip(itertools.cycle(MARKS), itertools.cycle(fig.PALETTE))
        for (code, rows), (mark, colour) in zip(table.items(), styles, strict=False):
            x, y = zip(*rows, strict=True)
            style = {"marker": mark, "ms": 4, "linewidth": 1.1, "color": colour}
            name = languages.get(code).english_name
            panel.plot(x, 100 * np.array(y), label=name, **style)
        rho = intervals.within_rho(table)
        text = f"ρ within a language {rho.mean:.2f} [{rho.low:.2f}, {rho.high:.2f}]"
        _draw_chance(panel, sweep.metric(split))
        panel.set_xscale("log")
        panel.set_ylim(0, 101)
        panel.set_xlabel("examples in the language")
        panel.set_title(f"{_split_title(split, sweep.metric(split))}\n{text}")
    panels[0].set_ylabel("percent")
    lines, names = panels[0].get_legend_handles_labels()
    columns = -(-len(names) // 20)  # as many as fit the height
    figure.set_figwidth(10.2 + 1.1 * (columns - 1))
    figure.legend(lines, names, loc="outside right center", ncols=columns)
    return figure


def draw_together(sweeps: Sequence[Sweep], folder: Path) -> Path:
    """Draws `plot_together` into the folder. Returns the path of the PNG; the SVG is beside it."""
    with fig.style():
        figure = plot_together(sweeps)
        fig.fit_titles(figure)
        return fig.save(figure, folder / "together")[0]


def plot_together(sweeps: Sequence[Sweep]) -> Figure:
    """One line for each sweep: the score of the languages but English against the examples per language.

    Lines with marks and intervals are the mean over the languages that all sweeps have, so that only what else is
    trained differs. Thin lines are the mean over all languages but English of a sweep.
    """
    codes = intervals.shared_languages(sweeps)
    splits = [s for s in sweeps[0].splits if all(s in sweep.splits for sweep in sweeps)]
    figure = Figure(figsize=(10.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for panel, split in zip(panels, splits, strict=True):
        places = set()
        for sweep, colour, mark in zip(sweeps, fig.PALETTE, MARKS, strict=False):
            x, shared = zip(*intervals.by_mean_examples(sweep, split, codes), strict=True)
            _draw_estimates(panel, np.array(x), shared, colour, mark, joined=len(x) > 1)
            others = [code for code in sweep.languages if code != "en"]
            x, all_of_them = zip(*intervals.by_mean_examples(sweep, split, others), strict=True)
            panel.plot(
                x, [100 * one.mean for one in all_of_them], color=colour, linewidth=0.9, ls=":"
            )
            places |= set(x)
        _draw_chance(panel, sweeps[0].metric(split))
        panel.set_xscale("log")
        ticks = _apart(places)
        panel.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        panel.minorticks_off()
        panel.set_ylim(0, 101)
        panel.set_xlabel("examples per language")
        panel.set_title(_split_title(split, sweeps[0].metric(split)))
    panels[0].set_ylabel("percent")
    handles = _together_handles(sweeps, len(codes))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)))
    return figure


def _apart(places: Collection[float], share: float = 0.16) -> list[float]:
    """Those places of a logarithmic axis whose labels do not overlap, from the smallest on."""
    places = sorted(place for place in places if place > 0)
    kept = places[:1]
    for place in places[1:]:
        if np.log(place / kept[-1]) >= share * np.log(places[-1] / places[0]):
            kept.append(place)
    return kept


def _together_handles(sweeps: Sequence[Sweep], shared: int) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker=mark, ms=4.5, label=f"{len(sweep.languages)} languages")
        for sweep, colour, mark in zip(sweeps, fig.PALETTE, MARKS, strict=False)
    ]
    handles.append(Line2D([], [], color=fig.MUTED, ls="-", label=f"mean of the {shared} shared"))
    handles.append(Line2D([], [], color=fig.MUTED, ls=":", label="mean of all but English"))
    handles.append(Patch(color=fig.FAINT, label="95 % interval"))
    handles.append(Line2D([], [], label="chance", **CHANCE_LINE))
    return handles


def _draw_chance(axes: Axes, metric: str) -> None:
    if metric in BY_METRIC:
        axes.axhline(100 * BY_METRIC[metric].chance, **CHANCE_LINE)


def _split_title(split: str, metric: str) -> str:
    name = split.replace("_", " ")
    return f"{name}: rank accuracy" if metric in BY_METRIC else name
