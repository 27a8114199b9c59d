"""Scripts, escape sequences, overrides of the writing direction and endless lines do nothing where they are shown."""

import io
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pangea_jax.batch import Batch, Example
from pangea_jax.data import batch_view
from pangea_jax.figures import inert, markdown, style
from tests.figures.pages import active_parts

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": "\"><img src=x onerror=alert(1)>'",
    "link": "[x](javascript:alert(1)) ![y](http://127.0.0.1:9/z.png) [a][b] <http://127.0.0.1:9/>",
    "definition": "\n\n[b]: http://127.0.0.1:9/\n\n# heading\n\n<div>\n",
    "escape": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b]8;;http://127.0.0.1:9\x1b\\click\x9b1m",
    "override": "user\u202egnp.exe\u202c \u2066isolate\u2069 \u2028line",
    "return": "good\rbad\x08\x08\x00\x7f",
    "entity": "&lt;script&gt; &amp; &#60;b&#62;",
    "formula": r"$\frac{1}$ $$ \$ $x^",
    "code": "```\n<b>` ~~~ | a | b \\| c",
    "surrogate": "half \ud83d of one",
    "endless": "x" * 1_000_000,
}
ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
ALL = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


def test_what_is_active_becomes_its_number():
    assert inert.visible("a\x1b[31mb\u202ec\td\ne") == "a<1B>[31mb<202E>c\td\ne"
    assert inert.visible("שלום \u200e\u200f नमस्ते क\u200dष") == "שלום \u200e\u200f नमस्ते क\u200dष"


@ALL
def test_a_line_is_short_and_one(text):
    shown = inert.line(text, 100)
    assert len(shown) <= 100 and "\n" not in shown and not ACTIVE.search(shown)


@ALL
def test_a_table_of_markdown(text):
    lines = markdown.table([text, "number"], [[text, 1], ["plain", 2]])
    assert len(lines) == 4 and all(len(line) < 8_000 for line in lines)
    source = (
        f"# {markdown.cell(text)}\n\n" + "\n".join(lines) + f"\n\n{markdown.cell(text)}, said\n"
    )
    assert not ACTIVE.search(source) and "<" not in source
    for html in (False, True):  # a viewer may allow HTML
        page = MarkdownIt("commonmark", {"html": html}).enable("table").render(source)
        tags, links = active_parts(page)
        assert set(tags) <= {
            "h1",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "p",
            "code",
            "em",
            "strong",
        }
        assert tags["td"] == 4 and not links


def test_a_table_keeps_what_is_written():
    assert markdown.cell("62.5 [50.0, 75.0]") == "62.5 [50.0, 75.0]"
    (row,) = markdown.table(["a & <b>", "1"], [])[:1]
    page = MarkdownIt("commonmark").render(row)
    assert "a &amp; &lt;b&gt;" in page


@pytest.mark.parametrize("terminal", [False, True])
@ALL
def test_a_console(text, terminal):
    console = inert.console(file=io.StringIO(), width=200, markup=False, force_terminal=terminal)
    console.print(text[:5_000], style="bold")
    table = Table(title=inert.line(text))
    table.add_column(inert.line(text, 50))
    table.add_row(text[:5_000])
    console.print(table)
    written = (
        re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
        if terminal
        else console.file.getvalue()
    )
    assert not ACTIVE.search(written)
    if terminal:  # rich's own colours are still there, and only they
        codes = set(re.findall(r"\x1b\[([\d;]*)m", console.file.getvalue()))
        assert "1" in codes and "31" not in codes


class Saying:
    """A tokenizer whose every token is the hostile text."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids, skip_special=True):
        return self.text


@ALL
def test_the_page_of_the_first_batch(text, tmp_path):
    tokens = np.arange(6, dtype=np.int32)
    weights = np.array([0, 0, 0, 1, 1, 0], np.float32)
    tiles = np.zeros((0, 6, 6, 3), np.uint8)
    nothing = np.full(6, -1, np.int32)
    row = Example(tokens, nothing, tiles, targets=tokens, weights=weights)
    batch = Batch.fill([[row]], 8, 1, 4)
    batch_view.save_batch(batch, Saying(text[:20_000]), 4, tmp_path)
    page = (tmp_path / "first_batch.html").read_text("utf-8")
    tags, links = active_parts(page)
    assert not ACTIVE.search(page) and not links
    assert set(tags) <= {"html", "head", "meta", "style", "body", "pre", "code", "span"}
    console = Console(file=io.StringIO(), width=100)  # of a caller who did not think of it
    batch_view.print_batch(batch, Saying(text[:5_000]), 4, console, rows=1)
    assert not ACTIVE.search(console.file.getvalue())


@ALL
def test_a_figure(text, tmp_path):
    with style.style():
        figure = Figure()
        axes = figure.add_subplot()
        axes.set_title(inert.label(text))
        axes.plot([0, 1], label=inert.label(text))
        axes.set_xticks([0], [inert.label(text)])
        figure.legend()
        _, svg = style.save(figure, tmp_path / "a")
    tags, links = active_parts(svg.read_text("utf-8"))
    assert not {"script", "img", "foreignobject", "text"} & set(tags)
    assert not [link for link in links if not link.startswith("#")]
