"""PangeaBench results as Markdown, HTML and figures, beside the rows that the paper printed."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.table import Table

from eval.bench import scoring
from eval.bench.documents import DataError
from eval.bench.metrics import bootstrap
from eval.bench.published import PUBLISHED
from eval.bench.task import PROFILES, Profile
from eval.bench.tasks import ALL_TASKS, DATASETS, GROUPS
from pangea_jax import languages
from pangea_jax.figures import style as fig

Results = Mapping[str, Any]
_GROUP_TITLES = {"multimodal": "Multimodal (Table 2)", "text": "Text (Table 3)"}
_RADAR_MODEL = "PANGEA-7B"
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
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; {folder} is no output folder of eval/run.py"
        ) from None
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: no results of eval/run.py ({error})") from error
    return results


def write(folder: Path, runs: Sequence[Results]) -> None:
    """report.md, report.html and the figures of one run or several."""
    plots = {"languages": plot_languages(runs), "datasets": plot_datasets(runs)}
    figures = {}
    with fig.style():
        for name, drawn in plots.items():
            if drawn is not None:
                figures[name] = fig.save(drawn, folder / name)[1]
    sections = _sections(runs)
    (folder / "report.md").write_text(_markdown(sections, list(figures)), encoding="utf-8")
    (folder / "report.html").write_text(_html(sections, figures), encoding="utf-8")


# One part of a report, the same in Markdown and HTML.
_Section = tuple[str, list[str], list[list[str]], list[str]]  # title, header, rows, paragraphs


def _sections(runs: Sequence[Results]) -> list[_Section]:
    sections = [_about(runs)]
    for group in _GROUP_TITLES:
        names = [
            n for n in GROUPS[scoring.AVERAGES[group]] if any(n in r["datasets"] for r in runs)
        ]
        if names:
            sections.append(_dataset_section(runs, group, names))
    sections += [_language_section(run, name) for run in runs for name in run["datasets"]]
    sections.append(_notes(runs))
    sections += [_failure_section(run) for run in runs if run["failures"]]
    return sections


def _about(runs: Sequence[Results]) -> _Section:
    rows = []
    for run in runs:
        counts = [str(sum(run["documents"].values())), str(len(run["failures"]))]
        git = run["environment"]["git_hash"] or "unknown"
        rows.append([run["model"], run["judge"] or "none", run["profile"], *counts, git[:12]])
    header = ["model", "judge", "headline", "documents", "without a score", "code"]
    text = [
        "Both profiles score the same responses: fixed has correct rules; paper repeats the scoring behind the printed "
        "tables, with its known faults. In fixed, a document without a response or a readable judgement has no score "
        "and is left out of the mean. Brackets are 95 % bootstrap intervals, clustered by picture or by translated "
        "text."
    ]
    return "PangeaBench", header, rows, text


def _dataset_section(runs: Sequence[Results], group: str, names: Sequence[str]) -> _Section:
    """One row per model and profile with en and mul of every data set; then the paper's rows."""
    header = ["model", "scores", "AVG en", "AVG mul"]
    header += [f"{DATASETS[name].title} {column}" for name in names for column in scoring.COLUMNS]
    rows, partial = [], []
    for run in runs:
        for profile in _ordered(run["profile"]):
            average = run["averages"].get(profile, {}).get(group, {})
            cells = []
            for column in scoring.COLUMNS:
                members = GROUPS[scoring.AVERAGES[group]]
                whole = all(column in _columns(run, name, profile) for name in members)
                cells.append(_number(average.get(column)) + ("" if whole else "*"))
                if not whole:
                    partial.append(run["model"])
            for name in names:
                entry = run["datasets"].get(name, {}).get(profile, {})
                cells += [_with_interval(entry.get(column)) for column in scoring.COLUMNS]
            rows.append([run["model"], profile, *cells])
    for model, scores in PUBLISHED[group].items():
        cells = [f"{scores[name][c]:.1f}" for name in ("average", *names) for c in scoring.COLUMNS]
        rows.append([model, "published", *cells])
    text = []
    if partial:
        text.append(
            "* AVG over the data sets of the run only; not comparable with the published AVG."
        )
    text += _incomplete(runs, names)
    return _GROUP_TITLES[group], header, rows, text


def _incomplete(runs: Sequence[Results], names: Sequence[str]) -> list[str]:
    """Notes on the columns that lack some of their subsets."""
    text = []
    for run in runs:
        for name in names:
            for column, entry in _columns(run, name, run["profile"]).items():
                if entry["subsets"] < entry["of"]:
                    text.append(
                        f"{run['model']}, {DATASETS[name].title} {column}: {entry['subsets']} of {entry['of']} subsets."
                    )
    return text


def _columns(run: Results, name: str, profile: str) -> dict[str, Any]:
    entry = run["datasets"].get(name, {}).get(profile, {})
    return {column: entry[column] for column in scoring.COLUMNS if column in entry}


def _language_section(run: Results, dataset: str) -> _Section:
    """Every task of a data set in both profiles, with its other metrics."""
    tasks = {n: t for n, t in run["tasks"].items() if t["dataset"] == dataset}
    extra = sorted(
        {m for t in tasks.values() for m in t.get(run["profile"], {}).get("metrics", {})}
    )
    profiles = _ordered(run["profile"])
    header = ["task", "language", "n", *profiles, *(f"{run['profile']}: {name}" for name in extra)]
    rows = []
    for name, task in tasks.items():
        main = task.get(run["profile"], {})
        cells = [_with_interval(task.get(profile)) for profile in profiles]
        metrics = [_number(main.get("metrics", {}).get(metric), 3) for metric in extra]
        language = languages.get(task["language"]).english_name
        rows.append([name, language, str(main.get("n", 0)), *cells, *metrics])
    micro = run["datasets"][dataset].get(run["profile"], {}).get("micro")
    text = [f"All documents together: {_number(micro)}."]
    return f"{run['model']}: {DATASETS[dataset].title}", header, rows, text


def _notes(runs: Sequence[Results]) -> _Section:
    """Tasks whose paper score is at or near zero for every model."""
    zeros = {}
    for run in runs:
        for name, task in run["tasks"].items():
            reason = DATASETS[task["dataset"]].structural_zeros.get(task["subset"])
            if reason:
                zeros[name] = reason
    text = [f"{name}, paper profile: {reason}." for name, reason in zeros.items()]
    return "Zeros that are not the fault of the model", [], [], text or ["None among these tasks."]


def _failure_section(run: Results) -> _Section:
    rows = [[f["task"], f["doc_id"], f["stage"], f["reason"]] for f in run["failures"][:200]]
    total = len(run["failures"])
    text = [f"{total} documents; the first {len(rows)} are shown, all are in results.json."]
    return (
        f"{run['model']}: documents without a score",
        ["task", "document", "stage", "reason"],
        rows,
        text,
    )


def _ordered(headline: str) -> list[str]:
    return [headline, *(profile for profile in PROFILES if profile != headline)]


def _number(value: float | None, decimals: int = 1) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _with_interval(entry: Mapping[str, Any] | None) -> str:
    if not entry or entry["score"] is None:
        return "–"
    low, high = entry["interval"]
    return f"{entry['score']:.1f} [{_number(low)}, {_number(high)}]"


def _markdown(sections: Sequence[_Section], figures: Sequence[str]) -> str:
    lines = []
    for index, (title, header, rows, paragraphs) in enumerate(sections):
        lines += [f"{'#' if index == 0 else '##'} {title}", ""]
        if rows:
            table = [header, ["---"] * len(header), *rows]
            lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in table] + [""]
        lines += [line for text in paragraphs for line in (text, "")]
        if index == 0:
            lines += [line for name in figures for line in (f"![{name}]({name}.png)", "")]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#1a1a1a}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto;margin:1em 0}"
    "th,td{padding:3px 9px;text-align:right;white-space:nowrap;border-bottom:1px solid #e8e8e8}"
    "th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}"
    "tr.published td{color:#6b6b6b}img{max-width:100%}h2{margin-top:2em;font-size:1.2em}"
)


def _html(sections: Sequence[_Section], figures: Mapping[str, Path]) -> str:
    """One page that contains its figures, so that it can be sent as one file."""
    body = []
    for index, (title, header, rows, paragraphs) in enumerate(sections):
        level = "h1" if index == 0 else "h2"
        body.append(f"<{level}>{html.escape(title)}</{level}>")
        if rows:
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = [_html_row(row) for row in rows]
            body.append(
                f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
            )
        body += [f"<p>{html.escape(text)}</p>" for text in paragraphs]
        if index == 0:
            for name, path in figures.items():
                encoded = base64.b64encode(path.read_bytes()).decode()
                body.append(f'<p><img alt="{name}" src="data:image/svg+xml;base64,{encoded}"></p>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PangeaBench</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _html_row(row: Sequence[str]) -> str:
    mark = ' class="published"' if len(row) > 1 and row[1] == "published" else ""
    return f"<tr{mark}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"


def console_table(run: Results) -> Table:
    """The scores of a run: a row per data set, with en and mul in both profiles."""
    table = Table(title=f"{run['model']} (headline: {run['profile']})")
    table.add_column("data set")
    for profile in _ordered(run["profile"]):
        for column in scoring.COLUMNS:
            table.add_column(f"{profile} {column}", justify="right")
    for name, entry in run["datasets"].items():
        cells = [
            _with_interval(entry.get(profile, {}).get(column))
            for profile in _ordered(run["profile"])
            for column in scoring.COLUMNS
        ]
        table.add_row(DATASETS[name].title, *cells)
    return table


def plot_languages(runs: Sequence[Results]) -> Figure | None:
    """Heat map of the headline scores, data sets by languages, with one panel per run."""
    grids = [_language_grid(run) for run in runs]
    codes = sorted({code for grid in grids for code, _ in grid}, key=lambda c: (c != "en", c))
    names = [n for n in DATASETS if any((c, n) in grid for grid in grids for c in codes)]
    if not codes or not names:
        return None
    with fig.style():
        size = (max(4.0, 1.4 + 0.34 * len(codes)), 0.9 + (0.28 * len(names) + 0.7) * len(runs))
        drawn = Figure(figsize=size, layout="constrained")
        panels = drawn.subplots(len(runs), squeeze=False)[:, 0]
        for axes, run, grid in zip(panels, runs, grids, strict=True):
            values = np.array(
                [[grid.get((code, name), np.nan) for code in codes] for name in names]
            )
            axes.imshow(values, vmin=0, vmax=100, cmap=_HEAT, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    ink = "white" if value > 50 else fig.INK
                    axes.text(
                        column, row, f"{value:.0f}", ha="center", va="center", size=6, color=ink
                    )
            axes.set_xticks(range(len(codes)), codes)
            axes.set_yticks(range(len(names)), [DATASETS[name].title for name in names])
            axes.grid(False)
            axes.set_title(f"{run['model']}, {run['profile']} scores by language")
    return drawn


def _language_grid(run: Results) -> dict[tuple[str, str], float]:
    """(language, data set) -> mean headline score of its tasks.

    FLORES-Sub counts both directions of a pair; CVQA's English texts are left out.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    for task in run["tasks"].values():
        score = task.get(run["profile"], {}).get("score")
        if score is not None and not task["subset"].startswith("translated-"):
            language = (
                task["subset"].replace("en-", "").replace("-en", "")
                if task["dataset"] == "flores"
                else task["language"]
            )
            cells.setdefault((language, task["dataset"]), []).append(score)
    return {key: float(np.mean(values)) for key, values in cells.items()}


def plot_datasets(runs: Sequence[Results]) -> Figure | None:
    """Radar of the `mul` column of each data set, beside the paper's PANGEA-7B; None below three data sets.

    The published row has the scores of the paper profile, so the other profile of each run is drawn too (dashed).
    """
    names = [n for n in DATASETS if any("mul" in _columns(run, n, run["profile"]) for run in runs)]
    if len(names) < 3:
        return None
    published = {n: row["mul"] for g in PUBLISHED.values() for n, row in g[_RADAR_MODEL].items()}
    lines = [(f"{_RADAR_MODEL}, published", [published[name] for name in names], fig.MUTED, "-")]
    for index, run in enumerate(runs):
        colour = fig.SERIES[index % len(fig.SERIES)]
        for profile in _ordered(run["profile"]):
            style = "-" if profile == run["profile"] else (0, (4, 2))
            values = [_column_score(run, name, profile) for name in names]
            lines.append((f"{run['model']}, {profile}", values, colour, style))
    with fig.style():
        drawn = Figure(figsize=(6.4, 5.6), layout="constrained")
        axes = drawn.add_subplot(projection="polar")
        angles = np.linspace(0, 2 * np.pi, len(names) + 1)
        for label, values, colour, style in lines:
            closed = [*values, values[0]]
            axes.plot(angles, closed, marker="o", ms=3, lw=1.4, ls=style, color=colour, label=label)
        axes.set_xticks(angles[:-1], [DATASETS[name].title for name in names])
        axes.tick_params(axis="x", pad=14)
        highest = max((v for _, values, *_ in lines for v in values if np.isfinite(v)), default=0)
        axes.set_ylim(0, max(100, highest))  # M-LlavaBench is a ratio to another model
        axes.set_rlabel_position(180 / len(names))
        axes.spines["polar"].set_visible(False)
        drawn.suptitle("multilingual score of each data set", size=9.5)
        drawn.legend(loc="outside lower center", ncols=2)
    return drawn


def _column_score(run: Results, dataset: str, profile: str) -> float:
    value = _columns(run, dataset, profile).get("mul", {}).get("score")
    return math.nan if value is None else value


def comparison_table(first: Path, second: Path, profile: Profile) -> Table:
    """Paired differences of two runs, per data set and column, on the documents both have scored."""
    scores = [_load_scores(folder, profile) for folder in (first, second)]
    table = Table(title=f"{first} minus {second}, {profile} scores")
    for name in ("data set", "column", "documents", "difference", "95 % interval", "p"):
        table.add_column(name, justify="left" if name in ("data set", "column") else "right")
    for dataset in DATASETS:
        pairs = [_common(a, b) for a, b in _paired(*scores, dataset)]
        pairs = [pair for pair in pairs if pair[0].n]
        if not pairs:
            continue
        sampled = [scoring.draws(side) for side in zip(*pairs, strict=True)]
        values = [
            scoring.dataset_columns({s.task.subset.name: s.value for s in side}, dataset)
            for side in zip(*pairs, strict=True)
        ]
        for column in values[0]:
            result = bootstrap.compare(
                sampled[0][column.upper()],
                sampled[1][column.upper()],
                values[0][column] - values[1][column],
            )
            low, high = result.interval
            size = sum(a.n for a, _ in pairs if a.task.subset.column == column)
            p_value = f"{result.p_value:.4f}"
            cells = [f"{result.difference:+.1f}", f"[{low:+.1f}, {high:+.1f}]", p_value]
            table.add_row(DATASETS[dataset].title, column, str(size), *cells)
    return table


def _paired(first, second, dataset):
    return [
        (first[name], second[name])
        for name in first
        if name in second and ALL_TASKS[name].dataset.name == dataset
    ]


def _common(first, second):
    """Both sides, with only the documents that both have scored."""
    ids = set(first.scored) & set(second.scored)
    return tuple(
        scoring.combine_scores(
            side.task, side.profile, [d for d in side.documents if d.id in ids], side.scored
        )
        for side in (first, second)
    )


def _load_scores(folder: Path, profile: Profile) -> dict[str, scoring.TaskScores]:
    """The scores of a run from its sample logs."""
    return {
        name: scoring.read_samples(folder / "samples" / f"{name}.jsonl", ALL_TASKS[name], profile)
        for name in read_results(folder)["documents"]
    }
