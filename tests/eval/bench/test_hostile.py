"""Hostile text in documents, responses and a judge's replies: reports, figures and the console show it as text."""

import json
import re
import sys

import pytest

from eval import run
from tests.figures.pages import active_parts
from tests.figures.test_inert import ACTIVE, HOSTILE

_TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "img",
        "table",
        "thead",
        "tbody",
    ),
    *("tr", "th", "td", "em", "strong", "code"),
}


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE.keys())
def hostile(request):
    return request.param.encode("utf-8", "replace").decode()


@pytest.fixture
def reported(hostile, data_dir, tmp_path, write_jsonl, capsys):
    """The output folder and the prints of a run whose ids, responses, judge's replies and model's name are hostile."""
    path = data_dir / "xchat" / "en.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for i, row in enumerate(rows):
        row["id"] = f"{i}{hostile[:300]}"
    write_jsonl(path, rows)
    answers = [{"task": "xchat_en", "doc_id": row["id"], "response": hostile} for row in rows]
    replies = [{"task": "xchat_en", "doc_id": row["id"], "reply": hostile} for row in rows]
    replies[0]["reply"] = f"{hostile[-2_000:]} [RESULT] 3"
    file = re.sub(r"[/\x00]", "", hostile)[:40] or "m"
    flags = [f"--responses={write_jsonl(tmp_path / f'{file}.jsonl', answers)}", "--tasks=xchat_en"]
    flags += [f"--judge=replay:{write_jsonl(tmp_path / 'judge.jsonl', replies)}"]
    assert run.main([*flags, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]) == 1
    return tmp_path / "out", "".join(capsys.readouterr())


def test_a_report_shows_it_as_text(reported):
    folder, printed = reported
    markdown = (folder / "report.md").read_text("utf-8")
    assert "<" not in markdown and not ACTIVE.search(markdown)
    page = (folder / "report.html").read_text("utf-8")
    tags, links = active_parts(page)
    assert set(tags) <= _TAGS and not ACTIVE.search(page)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert max(map(len, markdown.splitlines())) < 8_000
    assert "no score: xchat_en" in printed and not ACTIVE.search(printed)
    assert max(map(len, printed.splitlines())) < 4_000


@pytest.mark.parametrize("field", ["tasks", "datasets", "documents"])
def test_results_of_others_are_refused_in_a_sentence(tmp_path, capsys, field):
    results = dict.fromkeys(("model", "config"), "m") | {
        n: {} for n in ("tasks", "datasets", "documents")
    }
    results[field] = {"<script>\x1b[2J": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run.main(["report", str(tmp_path), f"--output_path={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert f"no results of eval/run.py ({field} has" in said and not ACTIVE.search(said[:-1])


@pytest.mark.skipif(sys.platform != "linux", reason="uses the Chromium of curation")
def test_a_real_browser_finds_nothing_to_run(tmp_path):
    """In headless Chromium, where one is installed: no script runs and nothing is asked for."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    browser = pytest.importorskip("pangea_jax.curation.browser")
    from markdown_it import MarkdownIt

    from pangea_jax.figures import markdown

    try:
        path = browser.find_chromium()
    except browser.BrowserError as error:
        pytest.skip(str(error))
    lines = markdown.table(["a", "b"], [[text[:2_000], 1] for text in HOSTILE.values()])
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render("\n".join(lines))
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        page, asked = chromium.new_page(), []
        page.route("**/*", lambda route: (asked.append(route.request.url), route.abort()))
        page.on("dialog", lambda dialog: (asked.append("dialog"), dialog.dismiss()))
        page.set_content(body)
        assert page.evaluate("document.querySelectorAll('script, img, a, iframe').length") == 0
        chromium.close()
    assert not asked
