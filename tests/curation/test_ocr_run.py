"""The OCR pipeline: 50 pages in ten scripts to records that can be built from, and killed on the way."""

import asyncio
import json
import logging
import multiprocessing
import random
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("regex", reason="regex is in requirements-curation.txt")
pytest.importorskip("urllib3", reason="urllib3 is in requirements-curation.txt")
pytest.importorskip("protego", reason="Protego is in requirements-curation.txt")
pytest.importorskip("apache_beam", reason="apache-beam is in requirements-curation.txt")

from configs.curation import ocr as ocr_config
from pangea_jax.curation import ocr
from pangea_jax.curation.browser import Browser
from pangea_jax.data.store import RecordStore
from pangea_jax.typed_config import build

from .web_pages import CONFIG, DEVICES, DROPPED, SANDBOX, SCREENS, WORDS, frame, page, write_pages

RUNNER = ["--runner=DirectRunner"]


@pytest.fixture(scope="module")
def curated(chromium, tmp_path_factory):
    """50 pages in ten scripts and 6 that must be dropped, through `run`; (folder, report, texts of pages)."""
    folder = tmp_path_factory.mktemp("ocr")
    texts, pages = {}, {}
    for language in WORDS:
        for number in range(5):
            name = f"{language}/{number}.html"
            pages[name], texts[name] = page(language, number)
    pages |= {f"en/{name}": DROPPED[name][0] for name in list(DROPPED)[:6]}
    write_pages(folder / "pages", pages)
    report = ocr.run(make_config(folder / "pages", 60), folder / "out", RUNNER)
    return folder, report, texts


def make_config(pages, shard_size, views_per_page=1):
    config = ocr_config.get_config()
    config.pages, config.languages = str(pages), tuple(WORDS)
    with config.unlocked():
        config.devices = SCREENS
    config.browser.sandbox = SANDBOX
    config.shard_size, config.views_per_page = shard_size, views_per_page
    return build(ocr.OcrConfig, config)


def rows(folder):
    return [json.loads(line) for p in sorted(folder.glob("*.jsonl")) for line in p.open()]


@pytest.mark.slow
def test_every_page_is_accounted_for(curated):
    folder, report, texts = curated
    assert (report["entered"], report["kept"], report["dropped"]) == (56, 50, 6)
    dropped = rows(folder / "out" / "dropped")
    assert sorted(row["id"].partition("@")[0] for row in dropped) == sorted(
        f"en/{name}" for name in list(DROPPED)[:6]
    )
    provenance = rows(folder / "out" / "provenance")
    assert sorted(row["page"] for row in provenance) == sorted(texts)
    assert len({row["device"] for row in provenance}) == 3
    assert report["sections"]["Records by language"] == dict.fromkeys(WORDS, 5)


@pytest.mark.slow
def test_the_box_encloses_the_element_and_the_text_is_the_dom_s(curated):
    folder, _, texts = curated
    records = rows(folder / "out" / "records")
    elements = set()

    async def compare():
        async with Browser(CONFIG.browser, local=True) as browser:
            for record, row in zip(records, rows(folder / "out" / "provenance"), strict=True):
                device = DEVICES[row["device"]]
                source = (folder / "pages" / row["page"]).read_bytes()
                async with browser.open(source, device) as page:
                    await page.run("top => scrollTo(0, top)", row["scroll"])
                    plain = np.asarray(await page.screenshot())
                    answer = record["conversations"][1]["value"]
                    names = [n for n, text in texts[row["page"]].items() if text == answer]
                    assert len(names) == 1, (row["page"], answer)
                    rectangle = await page.run(
                        "id => document.getElementById(id).getBoundingClientRect().toJSON()",
                        names[0],
                    )
                elements.add(names[0])
                edges = [
                    rectangle[edge] * device.scale for edge in ("left", "top", "right", "bottom")
                ]
                check(
                    np.asarray(Image.open(folder / "out" / "records" / record["image"])),
                    plain,
                    edges,
                )

    def check(boxed, plain, edges):
        outer, inner = frame(boxed)
        assert inner[0] <= edges[0] and inner[1] <= edges[1]
        assert inner[2] >= edges[2] and inner[3] >= edges[3]
        assert all(
            abs(a - b) <= 9 for a, b in zip(inner, edges, strict=True)
        )  # and no more than that
        differs = (boxed != plain).any(-1)
        assert not differs[inner[1] : inner[3], inner[0] : inner[2]].any()
        differs[outer[1] : outer[3], outer[0] : outer[2]] = False
        assert not differs.any()

    asyncio.run(compare())
    assert len(elements) >= 4
    assert {row["language"] for row in rows(folder / "out" / "provenance")} == set(WORDS)


@pytest.mark.slow
def test_records_can_be_built_from(curated, tmp_path):
    folder, _, _ = curated
    from launch import build_data

    out = tmp_path / "store"
    arguments = build_data.parse_arguments(
        ["pangeains", f"--source={folder / 'out' / 'records'}", f"--out={out}", "--workers=1"]
    )
    arguments.run(arguments)
    store = RecordStore(out)
    assert len(store.index) == 50


def results(out):
    """Every file that a run leaves for others, by its path."""
    folders = ("records", "provenance", "dropped")
    paths = [p for name in folders for p in (out / name).rglob("*") if p.is_file()]
    paths += [out / "report.json", out / "report.md"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def run_to_the_end(pages, out, views_per_page):
    """In a process of its own, to be killed."""
    logging.disable(logging.CRITICAL)
    ocr.run(make_config(pages, 4, views_per_page), out, RUNNER)


def finished_shards(out):
    """Name -> time of writing."""
    return {p.name: p.stat().st_mtime_ns for p in (out / "work" / "records").glob("*.json")}


def wait_for_a_moment(process, out, chance, *, is_last):
    """Until so many more pictures lie there, and a moment more; or before there is a browser.

    The last time until a shard is done, so that there is something to go on with.
    """
    pictures = out / "records" / "images"
    wanted = len(list(pictures.rglob("*.png"))) + chance.randint(0, 5)
    patience = 60.0 if is_last or chance.random() < 0.8 else chance.uniform(0.05, 1.5)
    end = time.monotonic() + patience
    while process.is_alive() and time.monotonic() < end:
        if finished_shards(out) if is_last else len(list(pictures.rglob("*.png"))) >= wanted:
            break
        time.sleep(0.005)
    process.join(chance.uniform(0.0, 0.4))


@pytest.mark.parametrize(
    ("kills", "count", "views"), [(2, 4, 1), pytest.param(10, 15, 2, marks=pytest.mark.slow)]
)
def test_killed_it_writes_the_same_and_no_finished_shard_again(
    chromium, tmp_path, kills, count, views
):
    pages = {f"{code}/{n}.html": page(code, n)[0] for code in ("en", "ar") for n in range(count)}
    pages |= {f"en/{name}": DROPPED[name][0] for name in ("empty.html", "pale.html")}
    write_pages(tmp_path / "pages", pages)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    ocr.run(make_config(tmp_path / "pages", 4, views), whole, RUNNER)

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apache_beam", "pangea_jax.curation.ocr", __name__])
    chance, finished = random.Random(kills), {}
    for kill in range(kills):
        process = context.Process(target=run_to_the_end, args=(tmp_path / "pages", out, views))
        process.start()
        wait_for_a_moment(process, out, chance, is_last=kill == kills - 1)
        process.kill()
        process.join()
        assert process.exitcode == -9, "it ended before it was killed"
        done = finished_shards(out)
        assert done | finished == done, "a finished shard was made again"
        finished = done
    assert finished, "it was killed before any shard was done"
    ocr.run(make_config(tmp_path / "pages", 4, views), out, RUNNER)
    done = finished_shards(out)
    assert done | finished == done, "a finished shard was made again"
    assert results(out) == results(whole)
    assert not list(out.rglob("*.partial"))
