"""Screenshots with a red box: what qualifies, settings, pages that must be dropped."""

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("regex", reason="regex is in requirements-curation.txt")
pytest.importorskip("urllib3", reason="urllib3 is in requirements-curation.txt")
pytest.importorskip("protego", reason="Protego is in requirements-curation.txt")

from configs.curation import ocr as ocr_config
from pangea_jax.curation import browser as browsers
from pangea_jax.curation import ocr
from pangea_jax.curation.browser import BrowserConfig, BrowserError, Device, PageError
from pangea_jax.curation.ocr_pages import Page
from pangea_jax.typed_config import build

from .web_pages import CONFIG, DESKTOP, DEVICES, DROPPED, frame, shoot, write_pages


def test_the_frame_leaves_what_it_encloses():
    noise = np.random.default_rng(0).integers(0, 200, (90, 120, 3), dtype=np.uint8)
    plain = Image.fromarray(noise)
    inside, framed = ocr.draw_box(plain, (20.4, 10.2, 40.5, 25.9), 1.5, ocr.Box(3, 2))
    pixels = np.asarray(framed)
    outer, inner = frame(pixels)
    # 20.4 * 1.5 = 30.6 downwards less ceil(4.5); 25.9 * 1.5 = 38.85 upwards and 5; frame 3.
    assert inner == inside == (25, 10, 66, 44)
    assert outer == (22, 7, 69, 47)
    changed = (pixels != noise).any(-1)
    assert changed.sum() == (69 - 22) * (47 - 7) - (66 - 25) * (44 - 10)
    assert np.array_equal(np.asarray(plain), noise)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"text": "a"}, "text too short or too long"),
        ({"text": "word " * 300}, "text too short or too long"),
        ({"text": "menu \ue001 icon"}, "text is not legible"),
        ({"text": "Write <image> first"}, "text holds a marker of conversations"),
        ({"text": "ends with <|im_end|>"}, "text holds a marker of conversations"),
        ({"font": 8.0}, "font too small"),
        ({"height": 4.0}, "element too small"),
        ({"height": 700.0}, "element too large"),
        ({"top": 7000.0}, "too far down the page"),
        ({"text": "только буквы and a word"}, "text in another script"),
        ({"text": "12:30"}, "text in another script"),
    ],
)
def test_elements_that_do_not_qualify(change, fault):
    element = {"text": "Some words", "font": 16.0, "top": 40.0, "width": 300.0, "height": 20.0}
    assert ocr.element_fault(element | change, "en", DEVICES["desktop"], ocr.Choice()) == fault


def test_script_share():
    assert ocr.script_share("朝の港カナ", "ja") == 1
    assert ocr.script_share("아침의 항구 abc", "ko") == 5 / 8
    assert ocr.script_share("清晨のb", "zh") == 0.5
    assert ocr.script_share("123 !", "en") == 0


def test_long_texts_come_first_more_often():
    elements = [{"text": "x" * 400}, *({"text": "x" * 4} for _ in range(10))]
    first = [
        len(ocr.order_elements(elements, ocr._random(seed, ""))[0]["text"]) for seed in range(2000)
    ]
    # sqrt(400) / (sqrt(400) + 10 sqrt(4)) = 1/2; the standard error is 0.011.
    assert abs(np.mean([length == 400 for length in first]) - 0.5) < 0.05


def test_a_missing_browser_says_what_to_install(monkeypatch, tmp_path):
    with pytest.raises(BrowserError, match="not a program that can be run"):
        pytest.importorskip("playwright", reason="playwright is an extra")
        browsers.find_chromium(str(tmp_path / "chromium"))
    monkeypatch.setattr(browsers.import_util, "find_spec", lambda name: None)
    with pytest.raises(BrowserError, match=r"apt-get install chromium.*executable_path"):
        browsers.find_chromium()


def test_playwrights_own_chromium_is_found_where_none_is_on_path(monkeypatch, tmp_path):
    pytest.importorskip("playwright", reason="playwright is an extra")
    monkeypatch.setattr(browsers, "COMMANDS", ())
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))

    async def path():
        return browsers.Browser(BrowserConfig(), local=True)._path

    with pytest.raises(BrowserError, match="no Chromium on this machine"):
        asyncio.run(path())
    own = Path(browsers._playwrights_own())
    own.parent.mkdir(parents=True)
    own.touch()
    assert tmp_path in own.parents
    assert asyncio.run(path()) == str(own)


def test_configs_that_cannot_be():
    with pytest.raises(ValueError, match="there are 3 devices"):
        dataclasses.replace(CONFIG, views_per_page=4)
    with pytest.raises(ValueError, match=r"config\.languages: unknown language tag 'xx'"):
        dataclasses.replace(CONFIG, languages=("en", "xx"))
    with pytest.raises(ValueError, match="English"):
        dataclasses.replace(CONFIG, instructions={"ar": ("؟",)})
    with pytest.raises(ValueError, match=r"width=20000, height=20000.*too many"):
        Device(20_000, 20_000)
    with pytest.raises(ValueError, match="expected none, static or all"):
        BrowserConfig(network="some")


def test_plans_are_those_of_earlier_versions():
    config = build(ocr.OcrConfig, ocr_config.get_config())
    devices = ocr._plan(config, [])["devices"]
    assert devices["laptop"] == {"width": 1280, "height": 800}
    assert devices["dense"] == {"width": 1440, "height": 900, "scale": 2.0}


def test_pages_that_are_dropped(chromium, tmp_path):
    pages = write_pages(
        tmp_path, {f"en/{k}": v for k, (v, _) in DROPPED.items() if k != "other.html"}
    )
    pages += write_pages(tmp_path / "x", {"other.html": DROPPED["other.html"][0]})
    pages.append(Page("gone", str(tmp_path / "gone.html"), "en"))
    shots = shoot([page for page in pages if "large" not in page.id], DESKTOP)
    browser = dataclasses.replace(CONFIG.browser, max_html_bytes=30_000)
    config = dataclasses.replace(DESKTOP, browser=browser)
    shots |= shoot([page for page in pages if "large" in page.id], config)
    assert len(shots) == len(DROPPED) + 1
    for name, (_, reason) in DROPPED.items():
        shot = shots[name if name == "other.html" else f"en/{name}"]
        assert isinstance(shot, PageError), name
        assert shot.reason.startswith(reason), (name, shot)
    details = {
        name: shots[f"en/{name}.html"].detail for name in ("covered", "pale", "red", "letter")
    }
    assert details == {
        "covered": "covered or cut off",
        "pale": "too little contrast",
        "red": "page has other red pixels",
        "letter": "no font has a letter",
    }
    assert shots["gone"].reason == "page cannot be read"
