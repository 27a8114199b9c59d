"""PangeaBench results as Markdown, HTML and figures, beside the rows that the paper printed."""

import base64
import itertools
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.table import Table

from eval.bench import marks, scoring
from eval.bench.documents import DataError
from eval.bench.published import PUBLISHED
from eval.bench.scoring import COLUMNS
from eval.bench.task import OWN, PROFILES
from eval.bench.tasks import ALL_TASKS, DATASETS, GROUPS
from pangea_jax import languages
from pangea_jax.figures import inert
from pangea_jax.figures import markdown as md
from pangea_jax.figures import style as fig

Results = Mapping[str, Any]
_GROUP_TITLES = {
    "multimodal": "Multimodal (Table 2)",
    "text": "Text (Table 3)",
    OWN: "Own tasks (not in PangeaBench)",
}
_RADAR_MODEL = "PANGEA-7B"
_LEAST_AXES = 4  # of a radar: three make a triangle, whatever the scores are
_HEAT = LinearSegmentedColormap.from_list("heat", ("#F3F7FB", fig.SKY, fig.BLUE, "#003A5D"))


def read_results(folder: Path) -> Results:
    """`results.json` of a run.

    Raises:
      DataError: the file is missing or was not written by eval/run.py.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not {"model", "tasks", "datasets", "config"} <= results.keys():
            raise ValueError("fields are missing")
        for field, known in {
            "tasks": ALL_TASKS,
            "documents": ALL_TASKS,
            "datasets": DATASETS,
        }.items():
            if unknown := set(results.get(field, ())) - set(known):
                raise ValueError(
                    f"{field} has {min(unknown)!r:.80}, which is none of PangeaBench's; a task of your own needs "
                    f"{_includes(results['config']):.200}"
                )
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; {folder} is no output folder of eval/run.py"
        ) from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: no results of eval/run.py ({error})") from error
    return results


def _includes(config: Any) -> str:
    """The flags with the files that declare the tasks of a run."""
    given = config.get("include") if isinstance(config, dict) else None
    files = given if given and isinstance(given, list) else ["FILE"]
    return " ".join(f"--include={file}" for file in files)


def distinct_names(runs: Sequence[Results], folders: Sequence[Path]) -> list[str]:
    """The models' names; where two runs have the same one, each with its folder."""
    names = [marks.name_of(run) for run in runs]
    pairs = list(zip(names, folders, strict=True))
    shown = [f"{n} ({folder})" if names.count(n) > 1 else n for n, folder in pairs]
    seen = [shown[: i + 1].count(name) for i, name in enumerate(shown)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(shown, seen)]


def write(folder: Path, runs: Sequence[Results]) -> None:
    """report.md, report.html and the figures of one run or several."""
    figures = {}
    with fig.style():
        for name, plot in {"languages": plot_languages, "datasets": plot_datasets}.items():
            if drawn := plot(runs):
                figures[name] = fig.save(drawn, folder / name)[1]
    text = _markdown(runs, list(figures))
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(_html(text, figures), encoding="utf-8")


def _markdown(runs: Sequence[Results], figures: Sequence[str]) -> str:
    sections = ["# PangeaBench", *_about(runs), *(f"![{name}]({name}.png)" for name in figures)]
    for group in _GROUP_TITLES:
        names = [n for n in _members(group) if any(n in run["datasets"] for run in runs)]
        if names:
            sections += _dataset_section(runs, group, names)
    for run in runs:
        for name in run["datasets"]:
            sections += _language_section(run, name)
    sections += _notes(runs)
    for run in runs:
        if run["failures"]:
            sections += _failure_section(run)
    return "\n\n".join(sections) + "\n"


def _members(group: str) -> Sequence[str]:
    return GROUPS.get(scoring.AVERAGES.get(group, group), ())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(md.table(header, rows, words=2))


def _about(runs: Sequence[Results]) -> list[str]:
    rows = []
    for run in runs:
        counts = [str(sum(run["documents"].values())), str(len(run["failures"]))]
        git = run["environment"]["git_hash"] or "unknown"
        about = [marks.name_of(run), run["judge"] or "none", run["profile"], *counts, git[:12]]
        rows.append(about)
    header = ["model", "judge", "headline", "documents", "without a score", "code"]
    text = (
        "Both profiles score the same responses: fixed has correct rules; paper repeats the scoring behind the printed "
        "tables, with its known faults. In fixed, a document without a response or a readable judgement has no score "
        "and is left out of the mean. Brackets are 95 % bootstrap intervals, clustered by picture or by translated "
        "text. n is the number of documents with a score."
    )
    left_out = [
        f"{md.cell(marks.name_of(run))}: {name} was left out: {md.cell(reason)}."
        for run in runs
        for name, reason in run["config"].get("left_out", {}).items()
    ]
    return [_table(header, rows), text, *map(md.cell, marks.legend(runs)), *left_out]


def _dataset_section(runs: Sequence[Results], group: str, names: Sequence[str]) -> list[str]:
    """One row per model and profile with en and mul of every data set; then the paper's rows."""
    averaged = group in scoring.AVERAGES
    header = ["model", "scores", *(("AVG en", "AVG mul") if averaged else ())]
    header += [f"{DATASETS[name].title} {column}" for name in names for column in COLUMNS]
    rows, incomplete = [], []
    for run in runs:
        for profile in _ordered(run["profile"]):
            average = run["averages"].get(profile, {}).get(group, {})
            cells = []
            for column in COLUMNS if averaged else ():
                whole = all(_entry(run, name, profile, column) for name in _members(group))
                signs = marks.join(marks.of_dataset(run, n, profile, column) for n in names)
                text = _number(average.get(column)) + ("" if whole else marks.PART)
                cells.append(text + (signs if column in average else ""))
            cells += [_dataset_cell(run, n, profile, c) for n in names for c in COLUMNS]
            rows.append([marks.name_of(run), profile, *cells])
        for name, column in itertools.product(names, COLUMNS):
            entry = _entry(run, name, run["profile"], column)
            if entry and entry["subsets"] < entry["of"]:
                part = f"{entry['subsets']} of {entry['of']} subsets"
                incomplete.append(
                    f"{md.cell(marks.name_of(run))}, {DATASETS[name].title} {column}: {part}."
                )
    text = []
    if averaged and any("*" in "".join(row[2:4]) for row in rows):
        text.append(
            r"\* AVG over the data sets of the run only; not comparable with the published AVG."
        )
    for model, scores in PUBLISHED.get(group, {_RADAR_MODEL: {}}).items():
        shown = ("average", *names) if averaged else names
        cells = [_number(scores.get(name, {}).get(c)) for name in shown for c in COLUMNS]
        rows.append([model, "published", *cells])
    return [f"## {_GROUP_TITLES[group]}", _table(header, rows), *text, *incomplete]


def _entry(run: Results, dataset: str, profile: str, column: str) -> dict[str, Any] | None:
    """A number of a table with its interval; None if the run does not have it."""
    return run["datasets"].get(dataset, {}).get(profile, {}).get(column)


def _dataset_cell(run: Results, dataset: str, profile: str, column: str) -> str:
    """A score of a data set with its signs, its interval and the number of documents."""
    entry = _entry(run, dataset, profile, column)
    text = _with_interval(entry, marks.of_dataset(run, dataset, profile, column))
    return f"{text} n={entry['n']}" if entry and entry.get("n") else text


def _language_section(run: Results, dataset: str) -> list[str]:
    """Every task of a data set in both profiles, with its other metrics."""
    headline, profiles = run["profile"], _ordered(run["profile"])
    tasks = {n: t for n, t in run["tasks"].items() if t["dataset"] == dataset}
    extra = sorted({m for t in tasks.values() for m in t.get(headline, {}).get("metrics", {})})
    header = ["task", "language", "n", *profiles, *(f"{headline}: {name}" for name in extra)]
    rows = []
    for name, task in tasks.items():
        main = task.get(headline, {})
        signs = [marks.of_task(run, name, profile) for profile in profiles]
        cells = [
            _with_interval(task.get(profile), sign)
            for profile, sign in zip(profiles, signs, strict=True)
        ]
        values = [main.get("metrics", {}).get(metric) for metric in extra]
        metrics = ["–" if v is None else f"{v:.3f}{signs[0]}" for v in values]
        language = languages.get(task["language"]).english_name
        rows.append([name, language, str(main.get("n", 0)), *cells, *metrics])
    micro = run["datasets"][dataset].get(headline, {}).get("micro")
    title = f"## {md.cell(marks.name_of(run))}: {md.cell(DATASETS[dataset].title)}"
    signs = "" if micro is None else marks.of_dataset(run, dataset, headline)
    return [title, _table(header, rows), f"All documents together: {_number(micro)}{signs}."]


def _notes(runs: Sequence[Results]) -> list[str]:
    """Tasks whose paper score is at or near zero for every model."""
    zeros = {
        name: reason
        for run in runs
        for name, task in run["tasks"].items()
        if (reason := DATASETS[task["dataset"]].structural_zeros.get(task["subset"]))
    }
    text = [f"{name}, paper profile: {reason}." for name, reason in zeros.items()]
    title = "## Zeros that are not the fault of the model"
    return [title, *(text or ["None among these tasks."])]


def _failure_section(run: Results) -> list[str]:
    header = ["task", "document", "stage", "reason"]
    rows = [[f["task"], f["doc_id"], f["stage"], f["reason"]] for f in run["failures"][:200]]
    total = len(run["failures"])
    text = f"{total} documents; the first {len(rows)} are shown, all are in results.json."
    return [
        f"## {md.cell(marks.name_of(run))}: documents without a score",
        _table(header, rows),
        text,
    ]


def _ordered(headline: str) -> list[str]:
    return [headline, *(profile for profile in PROFILES if profile != headline)]


def _number(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _with_interval(entry: Mapping[str, Any] | None, signs: str = "") -> str:
    if not entry or entry["score"] is None:
        return "–"
    low, high = entry["interval"]
    return f"{entry['score']:.1f}{signs} [{_number(low)}, {_number(high)}]"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#1a1a1a}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;margin:1em 0}"
    "th,td{padding:3px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid #e8e8e8}"
    "th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}"
    "tr.published td{color:#6b6b6b}img{max-width:100%}h2{margin-top:2em;font-size:1.2em}"
)


def _html(text: str, figures: Mapping[str, Path]) -> str:
    """The Markdown as one page that contains its figures, so that it can be sent as one file."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    published = r"<tr>(?=\n<td>.*</td>\n<td>published</td>)"
    body = re.sub(published, '<tr class="published">', body)
    for name, path in figures.items():
        encoded = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'"{name}.png"', f'"data:image/svg+xml;base64,{encoded}"')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PangeaBench</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def console_table(run: Results) -> Table:
    """The scores of a run: a row per data set, with en and mul in both profiles."""
    title = inert.line(f"{marks.name_of(run)} (headline: {run['profile']})")
    legend = "\n".join(marks.legend([run])) or None
    table = Table(title=title, caption=legend, caption_justify="left")
    table.add_column("data set")
    shown = list(itertools.product(_ordered(run["profile"]), COLUMNS))
    for profile, column in shown:
        table.add_column(f"{profile} {column}", justify="right")
    for name in run["datasets"]:
        cells = [_dataset_cell(run, name, profile, column) for profile, column in shown]
        table.add_row(inert.line(DATASETS[name].title), *cells)
    return table


def plot_languages(runs: Sequence[Results]) -> Figure | None:
    """Heat map of the headline scores, data sets by languages, with one panel per run."""
    grids = [_language_grid(run) for run in runs]
    codes = sorted({code for grid in grids for code, _ in grid}, key=lambda c: (c != "en", c))
    names = [n for n in DATASETS if any((c, n) in grid for grid in grids for c in codes)]
    if not codes or not names:
        return None
    size = (max(4.0, 1.4 + 0.34 * len(codes)), 0.9 + (0.28 * len(names) + 0.8) * len(runs))
    drawn = Figure(figsize=size, layout="constrained")
    panels = drawn.subplots(len(runs), squeeze=False)[:, 0]
    for axes, run, grid in zip(panels, runs, grids, strict=True):
        values = np.array([[grid.get((code, name), np.nan) for code in codes] for name in names])
        axes.imshow(values, vmin=0, vmax=100, cmap=_HEAT, aspect="auto")
        texts = [[f"{value:.0f}" if np.isfinite(value) else "" for value in row] for row in values]
        fig.write_cells(axes, texts, values > 50, size=6)
        axes.set_xticks(range(len(codes)), codes)
        axes.set_yticks(range(len(names)), [inert.label(DATASETS[n].title, 24) for n in names])
        axes.grid(False)
        said = f"{inert.line(marks.name_of(run), 40)}, {run['profile']} scores by language"
        axes.set_title(inert.label(f"{said} {marks.of_run(run, run['profile'])}".strip()))
    _footnote(drawn, runs)
    fig.fit_titles(drawn)
    return drawn


def _footnote(drawn: Figure, runs: Sequence[Results]) -> None:
    """What the signs in the titles mean, below a figure."""
    if lines := marks.legend(runs):
        width = int(22 * drawn.get_figwidth())  # characters of 6 points
        text = "\n".join(textwrap.fill(inert.label(line, 400), width) for line in lines)
        drawn.supxlabel(text, fontsize=6, x=0.01, ha="left")


def _language_grid(run: Results) -> dict[tuple[str, str], float]:
    """(language, data set) -> mean headline score of its tasks.

    FLORES-Sub counts both directions of a pair; CVQA's English texts are left out.
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for task in run["tasks"].values():
        score, subset = task.get(run["profile"], {}).get("score"), task["subset"]
        if score is not None and not subset.startswith("translated-"):
            language = task["language"]
            if task["dataset"] == "flores":
                language = subset.replace("en-", "").replace("-en", "")
            cells[language, task["dataset"]].append(score)
    return {key: float(np.mean(values)) for key, values in cells.items()}


def plot_datasets(runs: Sequence[Results]) -> Figure | None:
    """The `mul` column of each data set: a radar beside the paper's PANGEA-7B, below four data sets points.

    The published row has the scores of the paper profile, so the other profile of each run is drawn too (dashed).
    None without such scores, and for one data set of one run, where the table says as much.
    """
    names = [n for n in DATASETS if any(_entry(run, n, run["profile"], "mul") for run in runs)]
    if not names or len(names) == len(runs) == 1:
        return None
    drawn = _points(runs, names) if len(names) < _LEAST_AXES else _radar(runs, names)
    _footnote(drawn, runs)
    return drawn


def _points(runs: Sequence[Results], names: Sequence[str]) -> Figure:
    """Headline scores with their intervals: a line for each data set and run."""
    lines = [(name, run) for name in names for run in runs]
    drawn = Figure(figsize=(6.4, 1.0 + 0.3 * len(lines)), layout="constrained")
    axes = drawn.add_subplot()
    highest = 100.0
    for place, (name, run) in enumerate(lines):
        if not (entry := _entry(run, name, run["profile"], "mul")):
            continue
        score, colour = entry["score"], fig.PALETTE[runs.index(run) % len(fig.PALETTE)]
        low, high = (score if end is None else end for end in entry["interval"])
        axes.plot([low, high], [place, place], color=colour, lw=1.6)
        axes.plot(score, place, marker="o", ms=5, color=colour)
        highest = max(highest, high)
    said = [
        inert.label(
            f"{DATASETS[name].title}, " * (len(names) > 1) + _line_name(run, run["profile"])
        )
        for name, run in lines
    ]
    axes.set_yticks(range(len(lines)), ["\n".join(textwrap.wrap(text, 44)) for text in said])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(-0.02 * highest, 1.02 * highest)
    axes.grid(False, axis="y")
    one = f"{inert.label(DATASETS[names[0]].title, 24)}: " if len(names) == 1 else ""
    drawn.suptitle(f"{one}multilingual scores with 95 % intervals", size=9.5)
    return drawn


def _line_name(run: Results, profile: str) -> str:
    """What a run is called in a figure, with the signs of its scores."""
    return f"{inert.line(marks.name_of(run), 40)}, {profile} {marks.of_run(run, profile)}".strip()


def _radar(runs: Sequence[Results], names: Sequence[str]) -> Figure:
    published = {n: row["mul"] for g in PUBLISHED.values() for n, row in g[_RADAR_MODEL].items()}
    values = [published.get(name, math.nan) for name in names]
    lines = [(f"{_RADAR_MODEL}, published", values, fig.MUTED, "-")]
    for run, colour in zip(runs, itertools.cycle(fig.SERIES)):
        for profile in _ordered(run["profile"]):
            style = "-" if profile == run["profile"] else (0, (4, 2))
            entries = [_entry(run, name, profile, "mul") for name in names]
            values = [entry["score"] if entry else math.nan for entry in entries]
            lines.append((inert.label(_line_name(run, profile)), values, colour, style))
    # A legend of what is drawn, so without a line that has no score.
    lines = [line for line in lines if np.isfinite(line[1]).any()]
    drawn = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = drawn.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(names) + 1)
    for label, values, colour, style in lines:
        closed = [*values, values[0]]
        axes.plot(angles, closed, marker="o", ms=3, lw=1.4, ls=style, color=colour, label=label)
    axes.set_xticks(angles[:-1], [inert.label(DATASETS[name].title, 24) for name in names])
    axes.tick_params(axis="x", pad=14)
    highest = max((v for _, values, *_ in lines for v in values if np.isfinite(v)), default=0)
    axes.set_ylim(0, max(100, highest))  # M-LlavaBench is a ratio to another model
    axes.set_rlabel_position(180 / len(names))
    axes.spines["polar"].set_visible(False)
    drawn.suptitle("multilingual score of each data set", size=9.5)
    longest = max(len(label) for label, *_ in lines)
    # Of the axes, not of the figure: the layout would put that over the footnote.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2 if longest <= 44 else 1)
    return drawn
