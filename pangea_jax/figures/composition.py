"""The composition of a data set: records by source and language, as a table, a CSV file and a figure.

For PangeaIns, the paper has this in Figure 2 (categories and sources) and in Table 5 (languages).
"""

import csv
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pangea_jax import languages
from pangea_jax.figures import inert
from pangea_jax.figures import markdown as md
from pangea_jax.figures import style as fig

NAMES = {
    "general": "General",
    "cultural": "Cultural",
    "doc+chart": "Doc/Chart",
    "text-only": "Text only",
    "caption": "Caption",
    "domain-spec": "Domain-specific",
    "ocr": "OCR",
}
"""Folder of the release -> category of Figure 2. OCR is in the release but not in the figure."""


class Composition:
    """Numbers of records by source and language.

    Attributes:
      sources: grouped by category; the largest come first.
      languages: English first, then the largest.
      counts: int64 [sources, languages].
      categories: the category of each source.
    """

    def __init__(self, index: pa.Table):
        columns = ["category", "source", "language"]
        # The parts of a large index have different dictionaries, by which Arrow cannot group.
        table = index.select(columns).unify_dictionaries()
        table = table.group_by(columns).aggregate([([], "count_all")])
        cells = {
            tuple(row[c] or "" for c in columns): row["count_all"] for row in table.to_pylist()
        }
        of_source, of_category, of_language = Counter(), Counter(), Counter()
        for (category, source, language), count in cells.items():
            of_source[category, source] += count
            of_category[category] += count
            of_language[language] += count
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

    def rows(self) -> Iterator[tuple[str, str, list[int]]]:
        """(category, source, records in each language) of each source."""
        return zip(self.categories, self.sources, self.counts.tolist(), strict=True)

    def by_category(self) -> dict[str, np.ndarray]:
        """Category -> int64 [languages]."""
        of = np.array(self.categories)
        return {c: self.counts[of == c].sum(0) for c in dict.fromkeys(self.categories)}


def write(index: pa.Table, folder: Path, summary: Mapping) -> Path:
    """Writes `report.md`, `composition.csv`, `.png` and `.svg`. Returns the path of the report.

    Args:
      index: columns `category`, `source`, `language`.
      summary: `total`, `kept`, `rejected` (reason -> (records, what is wrong with the first)),
        `pictures`, `picture_bytes`, `languages_identified`, `languages_undetermined` and `notes`
        (what -> records) of a build.
    """
    composition = Composition(index)
    write_figure(composition, folder)
    path = folder / "report.md"
    path.write_text(markdown(composition, summary), encoding="utf-8")
    return path


def write_figure(composition: Composition, folder: Path) -> None:
    """Writes `composition.csv` and, if there are records, `composition.png` and `.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "composition.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["category", "source", *composition.languages, "all"])
        for category, source, counts in composition.rows():
            writer.writerow([category, source, *counts, sum(counts)])
    if composition.total:
        with fig.style():
            fig.save(plot(composition), folder / "composition")


def markdown(composition: Composition, summary: Mapping) -> str:
    """The text of the report; `summary` as in `write`."""
    total, kept = summary["total"], summary["kept"]
    rejected = sorted(summary["rejected"].items(), key=lambda item: (-item[1][0], item[0]))
    dropped = [
        (reason, f"{count:,}", f"{count / total:.2%}", f"`{first}`")
        for reason, (count, first) in rejected
    ]
    notes = [(what, f"{count:,}") for what, count in summary.get("notes", {}).items()]
    lines = [
        "# What is in this data set",
        "",
        f"{kept:,} of {total:,} records kept, {total - kept:,} dropped; {summary['pictures']:,} "
        f"pictures, {summary['picture_bytes'] / 1e6:,.1f} MB. The language of "
        f"{summary['languages_identified']:,} records was identified from their words; that of "
        f"{summary.get('languages_undetermined', 0):,} could not be (`und`).",
        "",
        "## Dropped, and why",
        "",
        *(md.table(("reason", "records", "share", "first"), dropped) if dropped else ["Nothing."]),
        "",
        "## Changed or not used",
        "",
        *(md.table(("what", "records"), notes) if notes else ["Nothing."]),
        "",
        *tables(composition),
    ]
    return "\n".join(lines) + "\n"


def tables(composition: Composition) -> list[str]:
    """Lines of Markdown: the figure, records by source and language, and the paper's numbers."""
    return [
        "## Sources and languages",
        "",
        "![Records by source and language](composition.svg)",
        "",
        *_sources(composition),
        "",
        "## Languages",
        "",
        "The last two columns are the paper's Table 5, in thousands of samples and as shares.",
        "",
        *_languages(composition),
    ]


def _sources(composition: Composition) -> list[str]:
    def row(category: str, source: str, counts: list[int]) -> list[str]:
        return [category, source, *(f"{n:,}" if n else "" for n in (sum(counts), *counts))]

    rows = [row(NAMES.get(c, c), source or "-", n) for c, source, n in composition.rows()]
    for category, counts in composition.by_category().items():
        rows.append(row(f"**{NAMES.get(category, category)}**", "**all**", counts.tolist()))
    rows.append(row("**all**", "", composition.counts.sum(0).tolist()))
    return md.table(["category", "source", "all", *composition.languages], rows, words=2)


def _languages(composition: Composition) -> list[str]:
    paper = {code: languages.LANGUAGES[code].pangeains_thousands for code in languages.PANGEAINS}
    rows = []
    for code, count in zip(composition.languages, composition.counts.sum(0).tolist(), strict=True):
        theirs = paper.get(code)
        printed = ("", "")
        if theirs is not None:
            printed = (f"{theirs:,}", f"{theirs / sum(paper.values()):.2%}")
        name = f"{languages.name(code)} ({code})"
        rows.append((name, f"{count:,}", f"{count / max(1, composition.total):.2%}", *printed))
    return md.table(("language", "records", "share", "paper, thousands", "share"), rows)


def plot(composition: Composition) -> Figure:
    """A heat map of the numbers of records, a row for each source and a column for each language, with totals."""
    rows, columns = composition.counts.shape
    across, down = 0.27 * max(columns, 12), 0.22 * max(rows, 8)
    figure = Figure(figsize=(4.6 + across, 2.6 + down), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(across, 2.2), height_ratios=(1.2, down))
    cells = figure.add_subplot(grid[1, 0])
    _draw_cells(cells, composition)
    _draw_language_totals(figure.add_subplot(grid[0, 0], sharex=cells), composition)
    palette = dict(zip(composition.by_category(), itertools.cycle(fig.PALETTE), strict=False))
    _draw_source_totals(figure.add_subplot(grid[1, 1], sharey=cells), composition, palette)
    legend = figure.add_subplot(grid[0, 1])
    legend.axis("off")
    patches = [
        Patch(
            color=palette[category],
            label=inert.label(NAMES.get(category, category) or "-")
            + f" {counts.sum() / composition.total:.0%}",
        )
        for category, counts in composition.by_category().items()
    ]
    legend.legend(handles=patches, loc="upper left", fontsize=6.5, borderaxespad=0)
    return figure


def _draw_cells(axes: Axes, composition: Composition) -> None:
    norm = LogNorm(1, max(2, composition.counts.max()))
    shown = np.ma.masked_equal(composition.counts, 0)
    axes.imshow(shown, aspect="auto", cmap="Blues", norm=norm)
    texts = [[short(count) if count else "" for count in row] for row in composition.counts]
    fig.write_cells(axes, texts, norm(shown) > 0.6, size=5.5)
    axes.set_xticks(range(len(composition.languages)), composition.languages)
    axes.set_yticks(
        range(len(composition.sources)),
        [inert.label(source or "-") for source in composition.sources],
    )
    axes.grid(False)
    axes.tick_params(length=0)


def _draw_language_totals(axes: Axes, composition: Composition) -> None:
    codes, totals = composition.languages, composition.counts.sum(0)
    colours = [fig.BLUE if code == "en" else fig.ORANGE for code in codes]
    axes.bar(range(len(codes)), totals, color=colours, width=0.8)
    axes.set(yscale="log", ylim=(0.5, float(totals.max()) * 3))
    axes.tick_params(labelbottom=False, length=0)
    english = totals[codes.index("en")] / composition.total if "en" in codes else 0
    axes.set_title(
        f"{composition.total:,} records: English {english:.0%}, "
        f"{len(codes) - ('en' in codes)} other languages {1 - english:.0%}"
    )


def _draw_source_totals(axes: Axes, composition: Composition, palette: Mapping[str, str]) -> None:
    totals = composition.counts.sum(1)
    axes.barh(range(len(totals)), totals, color=[palette[c] for c in composition.categories])
    for row, count in enumerate(totals):
        axes.text(count, row, f" {short(count)}", va="center", size=6.5)
    axes.tick_params(labelleft=False, length=0)
    axes.set(xscale="log", xlim=(0.5, float(totals.max()) * 3))
    axes.set_xlabel("records of the source, log scale")


def short(count: int) -> str:
    """A number in at most four characters.

    >>> [short(n) for n in (7, 940, 1_500, 28_299, 2_554_600)]
    ['7', '940', '1.5k', '28k', '2.6M']
    """
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}" if count < 10 * size else f"{count / size:.0f}{unit}"
    return str(count)
