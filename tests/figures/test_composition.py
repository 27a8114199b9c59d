import csv

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pangea_jax.figures import composition
from pangea_jax.figures.composition import Composition
from pangea_jax.figures.style import style

ROWS = (
    [("general", "general/cambrian", "en")] * 30
    + [("general", "general/gqa-ru", "ru")] * 40
    + [("general", "general/gqa-ru", "en")] * 2
    + [("text-only", "text-only/NuminaMath", "en")] * 10
    + [("cultural", "cultural", "sw")] * 18
)
SUMMARY = {
    "total": 104,
    "kept": 100,
    "rejected": {"empty answer": [1, "r7"], "picture is missing": [3, "r9"]},
    "pictures": 90,
    "picture_bytes": 12_000_000,
    "languages_identified": 5,
}


@pytest.fixture
def index():
    rng = np.random.default_rng(0)
    rows = [ROWS[i] for i in rng.permutation(len(ROWS))]
    names = ("category", "source", "language")
    columns = [pa.array(column).dictionary_encode() for column in zip(*rows)]
    table = pa.table(dict(zip(names, columns, strict=True)) | {"id": pa.array(range(100))})
    # An index written in parts has a different dictionary in each part.
    decoded = table.cast(pa.schema([(name, pa.string()) for name in names] + [("id", pa.int64())]))
    return pa.concat_tables(
        pa.table(
            {name: part[name].combine_chunks().dictionary_encode() for name in names}
            | {"id": part["id"]}
        )
        for part in (decoded.slice(0, 5), decoded.slice(5))
    )


def test_counts_by_source_and_language(index):
    found = Composition(index)
    assert found.languages == ["en", "ru", "sw"]
    assert found.sources == [
        "general/gqa-ru",
        "general/cambrian",
        "cultural",
        "text-only/NuminaMath",
    ]
    assert found.counts.tolist() == [[2, 40, 0], [30, 0, 0], [0, 0, 18], [10, 0, 0]]
    by_category = {name: counts.tolist() for name, counts in found.by_category().items()}
    assert by_category == {"general": [32, 40, 0], "cultural": [0, 0, 18], "text-only": [10, 0, 0]}


def test_report_has_every_number(index, tmp_path):
    path = composition.write(index, tmp_path / "report", SUMMARY)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "| General | general/gqa-ru | 42 | 2 | 40 |  |" in lines
    assert "| **General** | **all** | 72 | 32 | 40 |  |" in lines
    assert "| **all** |  | 100 | 42 | 40 | 18 |" in lines
    # Swahili is 132.7 thousand of 6944.1 in the paper's Table 5.
    assert "| Swahili (sw) | 18 | 18.00% | 132.7 | 1.91% |" in lines
    dropped = lines.index("| picture is missing | 3 | 2.88% | `r9` |")
    assert lines[dropped + 1] == "| empty answer | 1 | 0.96% | `r7` |"
    with (tmp_path / "report" / "composition.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["all"]) for row in rows) == 100
    assert rows[0] == {
        "category": "general",
        "source": "general/gqa-ru",
        "en": "2",
        "ru": "40",
        "sw": "0",
        "all": "42",
    }


def test_figure_shows_cells_and_totals(index, tmp_path):
    with style():
        figure = composition.plot(Composition(index))
    cells, by_language, by_source, legend = figure.axes
    assert sorted(int(text.get_text()) for text in cells.texts) == [2, 10, 18, 30, 40]
    assert [bar.get_height() for bar in by_language.patches] == [42, 40, 18]
    assert [bar.get_width() for bar in by_source.patches] == [42, 30, 18, 10]
    assert "English 42%, 2 other languages 58%" in by_language.get_title(loc="left")
    labels = [text.get_text() for text in legend.get_legend().get_texts()]
    assert labels == ["General 72%", "Cultural 18%", "Text only 10%"]
    composition.write(index, tmp_path, SUMMARY)
    with Image.open(tmp_path / "composition.png") as picture:
        assert min(picture.size) > 400
    assert (tmp_path / "composition.svg").read_text().startswith("<?xml")


def test_nothing_kept_is_reported_without_a_figure(index, tmp_path):
    path = composition.write(index.slice(0, 0), tmp_path, SUMMARY | {"kept": 0})
    assert "0 of 104 records kept" in path.read_text()
    assert not (tmp_path / "composition.png").exists()


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (999, "999"), (1_500, "1.5k"), (28_299, "28k"), (2_554_600, "2.6M")],
)
def test_short_numbers(count, text):
    assert composition.short(count) == text
