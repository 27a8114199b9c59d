"""What a data set is made of: records by source and language, as a table, a CSV file and a figure.

The paper draws the same of PangeaIns as Figure 2 (categories and sources) and Table 5 (languages).
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pangea_jax import languages
from pangea_jax.curation.accounting import cell
from pangea_jax.figures import style as fig

COLOURS = (fig.BLUE, fig.ORANGE, fig.GREEN, fig.VERMILION, fig.SKY, fig.PURPLE, fig.MUTED)
NAMES = {
    "general": "General",
    "cultural": "Cultural",
    "doc+chart": "Doc/Chart",
    "text-only": "Text only",
    "caption": "Caption",
    "domain-spec": "Domain-specific",
    "ocr": "OCR",
}
"""The categories of Figure 2 by the folders of the release, and OCR, which is in the release alone."""


class Composition:
    """Numbers of records by source and language.

    Attributes:
      sources: by category, within it the largest first.
      languages: English first, then the largest first.
      counts: int64 [sources, languages].
      categories: category of every source.
    """

    def __init__(self, index: pa.Table):
        columns = ["category", "source", "language"]
        # Parts of a large index have dictionaries of their own, which Arrow does not group by.
        table = index.select(columns).unify_dictionaries()
        table = table.group_by(columns).aggregate([([], "count_all")])
        cells = {
            tuple(row[c] or "" for c in columns): row["count_all"] for row in table.to_pylist()
        }
        of_source, of_category, of_language = ({} for _ in range(3))
        for (category, source, language), count in cells.items():
            for totals, name in (
                (of_source, (category, source)),
                (of_category, category),
                (of_language, language),
            ):
                totals[name] = totals.get(name, 0) + count
        rows = sorted(
            of_source, key=lambda row: (-of_category[row[0]], row[0], -of_source[row], row)
        )
        columns = sorted(of_language, key=lambda code: (code != "en", -of_language[code], code))
        self.categories = [category for category, _ in rows]
        self.sources = [source for _, source in rows]
        self.languages = columns
        self.counts = np.array(
            [[cells.get((*row, code), 0) for code in columns] for row in rows], np.int64
        ).reshape(len(rows), len(columns))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def by_category(self) -> dict[str, np.ndarray]:
        """Category -> int64 [languages]."""
        of = np.array(self.categories)
        return {c: self.counts[of == c].sum(0) for c in dict.fromkeys(self.categories)}


def write(index: pa.Table, folder: Path, summary: Mapping) -> Path:
    """Writes `report.md`, `composition.csv`, `.png` and `.svg`; returns the path of the first.

    Args:
      index: columns `category`, `source`, `language`.
      summary: `total`, `kept`, `rejected` (reason -> (records, id of the first)), `pictures`,
        `picture_bytes` and `languages_identified` of a build.
    """
    composition = Composition(index)
    write_figure(composition, folder)
    path = folder / "report.md"
    path.write_text(markdown(composition, summary), encoding="utf-8")
    return path


def write_figure(composition: Composition, folder: Path) -> None:
    """Writes `composition.csv` and, if there are records, `composition.png` and `.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "composition.csv").write_text(_csv(composition), encoding="utf-8")
    if composition.total:
        with fig.style():
            fig.save(plot(composition), folder / "composition")


def _csv(composition: Composition) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["category", "source", *composition.languages, "all"])
    rows = zip(
        composition.categories, composition.sources, composition.counts.tolist(), strict=True
    )
    for category, source, counts in rows:
        writer.writerow([category, source, *counts, sum(counts)])
    return stream.getvalue()


def markdown(composition: Composition, summary: Mapping) -> str:
    """The report as text."""
    total, kept = summary["total"], summary["kept"]
    lines = [
        "# What is in this data set",
        "",
        f"{kept:,} of {total:,} records kept, {total - kept:,} dropped; {summary['pictures']:,} "
        f"pictures, {summary['picture_bytes'] / 1e9:,.3f} GB. The language of "
        f"{summary['languages_identified']:,} records was identified from their words.",
        "",
        "## Dropped, and why",
        "",
        *_dropped(summary["rejected"], total),
        "",
        *tables(composition),
    ]
    return "\n".join(lines) + "\n"


def tables(composition: Composition) -> list[str]:
    """The figure, records by source and language, and the paper's beside them: lines of Markdown."""
    return [
        "## Sources and languages",
        "",
        "![Records by source and language](composition.svg)",
        "",
        *_sources(composition),
        "",
        "## Languages",
        "",
        "Beside them the paper's Table 5, in thousands of samples and as shares.",
        "",
        *_languages(composition),
    ]


def _dropped(rejected: Mapping, total: int) -> list[str]:
    if not rejected:
        return ["Nothing."]
    rows = sorted(rejected.items(), key=lambda item: (-item[1][0], item[0]))
    table = [
        f"| {cell(reason)} | {count:,} | {count / total:.2%} | `{cell(first)}` |"
        for reason, (count, first) in rows
    ]
    return ["| reason | records | share | first |", "|---|---:|---:|---|", *table]


def _sources(composition: Composition) -> list[str]:
    head = ["category", "source", "all", *composition.languages]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    rows = zip(
        composition.categories, composition.sources, composition.counts.tolist(), strict=True
    )
    for category, source, counts in rows:
        lines.append(_row(NAMES.get(category, category), source or "-", sum(counts), *counts))
    for category, counts in composition.by_category().items():
        name = f"**{NAMES.get(category, category)}**"
        lines.append(_row(name, "**all**", int(counts.sum()), *counts.tolist()))
    totals = composition.counts.sum(0).tolist()
    return [*lines, _row("**all**", "", composition.total, *totals)]


def _row(*cells: str | int) -> str:
    shown = (cell(c) if isinstance(c, str) else f"{c:,}" if c else "" for c in cells)
    return f"| {' | '.join(shown)} |"


def _languages(composition: Composition) -> list[str]:
    paper = {code: languages.LANGUAGES[code].pangeains_thousands for code in languages.PANGEAINS}
    paper_total = sum(paper.values())
    lines = [
        "| language | records | share | paper, thousands | share |",
        "|---|---:|---:|---:|---:|",
    ]
    for code, count in zip(composition.languages, composition.counts.sum(0).tolist(), strict=True):
        share = f"{count / max(1, composition.total):.2%}"
        theirs = paper.get(code)
        printed = ("", "") if theirs is None else (f"{theirs:,}", f"{theirs / paper_total:.2%}")
        name = languages.LANGUAGES[code].english_name
        lines.append(f"| {name} ({code}) | {count:,} | {share} | {printed[0]} | {printed[1]} |")
    return lines


def plot(composition: Composition) -> Figure:
    """Sources down, languages across, colour for the number of records; totals at the edges."""
    rows, columns = composition.counts.shape
    width, height = 4.6 + 0.27 * max(columns, 12), 2.6 + 0.22 * max(rows, 8)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.add_gridspec(
        2, 2, width_ratios=(0.27 * max(columns, 12), 2.2), height_ratios=(1.2, 0.22 * max(rows, 8))
    )
    cells = figure.add_subplot(grid[1, 0])
    by_language = figure.add_subplot(grid[0, 0], sharex=cells)
    by_source = figure.add_subplot(grid[1, 1], sharey=cells)
    shown = np.ma.masked_equal(composition.counts, 0)
    norm = LogNorm(1, max(2, composition.counts.max()))
    cells.imshow(shown, aspect="auto", cmap="Blues", norm=norm)
    for (row, column), count in np.ndenumerate(composition.counts):
        if count:
            dark = norm(count) > 0.6
            colour = "white" if dark else fig.INK
            cells.text(column, row, short(count), ha="center", va="center", size=5.5, color=colour)
    cells.set_xticks(range(columns), composition.languages)
    cells.set_yticks(range(rows), [source or "-" for source in composition.sources])
    cells.grid(False)
    cells.tick_params(length=0)
    totals = composition.counts.sum(0)
    colours = [fig.BLUE if code == "en" else fig.ORANGE for code in composition.languages]
    by_language.bar(range(columns), totals, color=colours, width=0.8)
    _logarithmic(by_language.yaxis, totals)
    by_language.tick_params(labelbottom=False, length=0)
    english = totals[composition.languages.index("en")] if "en" in composition.languages else 0
    by_language.set_title(
        f"{composition.total:,} records: English {english / composition.total:.0%}, "
        f"{columns - bool(english)} other languages {1 - english / composition.total:.0%}"
    )
    palette = {c: COLOURS[i % len(COLOURS)] for i, c in enumerate(composition.by_category())}
    sums = composition.counts.sum(1)
    by_source.barh(range(rows), sums, color=[palette[c] for c in composition.categories])
    for row, count in enumerate(sums):
        by_source.text(count, row, f" {short(count)}", va="center", size=6.5)
    by_source.tick_params(labelleft=False, length=0)
    _logarithmic(by_source.xaxis, sums)
    by_source.set_xlabel("records of the source, log scale")
    legend = figure.add_subplot(grid[0, 1])
    legend.axis("off")
    patches = [
        Patch(
            color=palette[category],
            label=f"{NAMES.get(category, category) or '-'} {counts.sum() / composition.total:.0%}",
        )
        for category, counts in composition.by_category().items()
    ]
    legend.legend(handles=patches, loc="upper left", fontsize=6.5, borderaxespad=0)
    return figure


def _logarithmic(axis, totals) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.axes.set(**{f"{axis.axis_name}lim": (0.5, float(totals.max()) * 3)})


def short(count: int) -> str:
    """At most four characters.

    >>> [short(n) for n in (7, 940, 1_500, 28_299, 2_554_600)]
    ['7', '940', '1.5k', '28k', '2.6M']
    """
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)
