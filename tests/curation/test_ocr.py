"""Screenshots with a red box: 50 pages in ten scripts, pages that must be dropped, and hostile ones."""

import asyncio
import contextlib
import dataclasses
import http.server
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("regex", reason="regex is in requirements-curation.txt")

from configs.curation import ocr as ocr_config
from pangea_jax.curation import browser as browsers
from pangea_jax.curation import ocr
from pangea_jax.curation.browser import Browser, BrowserConfig, BrowserError, Device, PageError
from pangea_jax.data.store import RecordStore

# Per language: heading, sentence, its emphasised middle, button, cell. One language of each script.
WORDS = {
    "en": ("The harbour in the morning", "Boats come back", "before the sun", "Read more", "Price"),
    "ru": ("Утро в порту", "Лодки возвращаются", "до восхода солнца", "Читать дальше", "Цена"),
    "ar": ("الميناء في الصباح", "تعود القوارب", "قبل شروق الشمس", "اقرأ المزيد", "السعر"),
    "he": ("הנמל בבוקר", "הסירות חוזרות", "לפני הזריחה", "קראו עוד", "מחיר"),
    "hi": ("सुबह का बंदरगाह", "नावें लौटती हैं", "सूरज से पहले", "और पढ़ें", "कीमत"),
    "th": ("ท่าเรือยามเช้า", "เรือกลับมา", "ก่อนพระอาทิตย์ขึ้น", "อ่านต่อ", "ราคา"),
    "am": ("ወደቡ በጠዋት", "ጀልባዎች ይመለሳሉ", "ፀሐይ ሳይወጣ", "ተጨማሪ ያንብቡ", "ዋጋ"),
    "ko": ("아침의 항구", "배들이 돌아온다", "해가 뜨기 전에", "더 읽기", "가격"),
    "ja": ("朝の港", "船が帰ってくる", "日の出の前に", "続きを読む", "値段"),
    "zh": ("清晨的港口", "船只归来", "在日出之前", "阅读更多", "价格"),
}
RIGHT_TO_LEFT = ("ar", "he")
SCREENS = {
    "desktop": dict(width=800, height=500),
    "dense": dict(width=560, height=400, scale=1.25),
    "phone": dict(width=360, height=480, scale=1.5, mobile=True),
}
DEVICES = tuple(Device(name, **screen) for name, screen in SCREENS.items())
SANDBOX = not (hasattr(os, "geteuid") and os.geteuid() == 0)
CONFIG = ocr.OcrConfig(
    languages=tuple(WORDS),
    devices=DEVICES,
    views_per_page=1,
    instructions={"en": ("Read the text in the red box.",), "ar": ("اقرأ النص في الإطار الأحمر.",)},
    browser=BrowserConfig(sandbox=SANDBOX),
)
DESKTOP = dataclasses.replace(CONFIG, devices=DEVICES[:1])


@pytest.fixture(scope="session")
def chromium():
    try:
        return browsers.find_chromium()
    except BrowserError as error:
        pytest.skip(str(error))


def page(language, number):
    """A page of five kinds of layout; returns it and {element id: text} of what may be marked."""
    heading, sentence, middle, button, cell = WORDS[language]
    texts = {
        "heading": f"{heading} {number + 1}",
        "sentence": f"{sentence} {middle} {number + 11}",
        "middle": middle,
        "button": f"{button} {number + 21}",
        "cell": f"{cell} {number + 31}",
        "lines": f"{sentence}\n{heading}",
    }
    parts = [
        f'<h1 id="heading">{texts["heading"]}</h1>',
        f'<p id="sentence">{sentence} <b id="middle">{middle}</b> {number + 11}</p>',
        f'<button id="button">{texts["button"]}</button>',
        f'<table><tr><td id="cell" style="padding: 6px">{texts["cell"]}</td></tr></table>',
        f'<div id="lines">{sentence}<br>{heading}</div>',
        # What must never be the answer.
        f'<p style="display: none">{heading} X1</p>',
        f'<p style="opacity: 0">{heading} X2</p>',
        f'<p style="color: #fff; background: #fff">{heading} X3</p>',
        f'<div style="position: relative"><p>{heading} X4</p><div style="position: absolute; inset: 0;'
        ' margin: 0; background: #ccc; pointer-events: none"></div></div>',
        f'<p style="width: 60px; overflow: hidden; white-space: nowrap">{heading} {heading} X5</p>',
        f'<p style="font-size: 5px">{heading} X6</p>',
        f'<p class="generated">{heading} X7</p>',
        f'<p style="text-indent: -9999px; overflow: hidden">{heading} X8</p>',
        f'<p>{heading} X9 <img width="40" height="12" src="http://127.0.0.1:9/a.png"></p>',
        f'<p>{heading} Y1 <span style="position: absolute; width: 1px; height: 1px;'
        f' overflow: hidden">{sentence}</span></p>',
    ]
    shift = number % len(parts)
    direction = "rtl" if language in RIGHT_TO_LEFT else "ltr"
    columns = "columns: 2;" if number % 2 else ""
    source = (
        f'<!doctype html><html lang="{language}" dir="{direction}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>.generated::after { content: ' more' } p, div { margin: 1em 0.7em }</style></head>"
        f'<body style="margin: {20 + 7 * number}px; {columns} line-height: {1.2 + 0.2 * number}">'
        + "\n".join(parts[shift:] + parts[:shift])
        + f'<div style="height: {600 * number}px"></div></body></html>'
    )
    return source, texts


def shoot(pages, config=CONFIG):
    """Takes one view of each page; {page id: Shot or PageError}."""

    async def collect():
        views = [view for page in pages for view in ocr.views_of(page, config)]
        return {view.page.id: shot async for view, shot in ocr.take_all(views, config)}

    return asyncio.run(collect())


def write_pages(folder, pages):
    for name, source in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return list(ocr.read_pages(folder))


def frame(pixels):
    """Finds the red frame in a picture: (outer, inner) as left, top, right, bottom, ends excluded."""
    red = (pixels == np.array(ocr.RED)).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    outer = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inner_rows = np.flatnonzero(~red[:, columns[0] : columns[-1] + 1].all(1) & red.any(1))
    inner_columns = np.flatnonzero(~red[rows[0] : rows[-1] + 1].all(0) & red.any(0))
    inner = inner_columns[0], inner_rows[0], inner_columns[-1] + 1, inner_rows[-1] + 1
    assert red[outer[1] : inner[1], outer[0] : outer[2]].all()
    assert red[inner[3] : outer[3], outer[0] : outer[2]].all()
    assert red[outer[1] : outer[3], outer[0] : inner[0]].all()
    assert red[outer[1] : outer[3], inner[2] : outer[2]].all()
    assert not red[inner[1] : inner[3], inner[0] : inner[2]].any()
    return outer, inner


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
    assert ocr.element_fault(element | change, "en", DEVICES[0], ocr.Choice()) == fault


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


def test_lists_of_pages(tmp_path):
    (tmp_path / "hi").mkdir()
    (tmp_path / "hi" / "b.HTML").write_text("x")
    (tmp_path / "a.htm").write_text("x")
    (tmp_path / "skip.txt").write_text("x")
    found = list(ocr.read_pages(tmp_path))
    assert [(page.id, page.language, page.is_local) for page in found] == [
        ("a.htm", "", True),
        ("hi/b.HTML", "hi", True),
    ]
    listed = tmp_path / "list.jsonl"
    rows = [{"url": "https://a.example/1", "language": "pt-BR"}, {"file": "a.htm"}]
    listed.write_text("\n".join(map(json.dumps, rows)))
    found = list(ocr.read_pages(listed))
    assert [(page.id, page.language) for page in found] == [
        ("https://a.example/1", "pt"),
        ("a.htm", ""),
    ]
    assert found[1].source == str(tmp_path / "a.htm")
    plain = tmp_path / "list.txt"
    plain.write_text("# remark\nhttps://a.example/2\n\na.htm\n")
    assert [page.id for page in ocr.read_pages(plain)] == ["https://a.example/2", "a.htm"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[]", '"url" or "file"'),
        ('{"url": "https://a", "file": "b"}', '"url" or "file"'),
        ('{"url": "file:///etc/passwd"}', "http:// or https://"),
        ('{"url": "https://a", "language": "klingon"}', "unknown language 'klingon'"),
    ],
)
def test_a_line_that_is_no_page_is_named(line, message, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"file": "a.htm"}\n' + line)
    with pytest.raises(ValueError, match=r"list\.jsonl, line 2: .*" + message):
        list(ocr.read_pages(listed))


def test_a_missing_browser_says_what_to_install(monkeypatch, tmp_path):
    with pytest.raises(BrowserError, match="no program that can be run"):
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
    with pytest.raises(ValueError, match="'xx' is none of"):
        dataclasses.replace(CONFIG, languages=("en", "xx"))
    with pytest.raises(ValueError, match="English"):
        dataclasses.replace(CONFIG, instructions={"ar": ("؟",)})
    with pytest.raises(ValueError, match="device wall"):
        Device("wall", 20_000, 20_000)
    with pytest.raises(ValueError, match="not none, static or all"):
        BrowserConfig(network="some")


BODY = "<p>A first sentence of some words.</p>"
DROPPED = {
    "empty.html": ("", "no element qualifies"),
    "blank.html": ("<p> &nbsp; </p>", "no element qualifies"),
    "covered.html": (
        BODY + '<div style="position:fixed;inset:0;background:#fffe"></div>',
        "no element can be seen whole",
    ),
    "pale.html": (BODY.replace("<p", '<p style="color:#eee"'), "no element can be seen whole"),
    "red.html": (BODY + '<p style="background:#f00;height:90px"></p>', "no element can be seen"),
    "letter.html": ("<p>Words and one 𒀀 of Uruk</p>", "no element can be seen whole"),
    "dots.html": (
        '<p style="-webkit-text-security: disc">A first sentence</p>',
        "no element qualifies",
    ),
    "override.html": (
        '<p><bdo dir="rtl">A first sentence</bdo></p>',
        "no element can be seen whole",
    ),
    "large.html": (BODY + "<!--" + "x" * 40_000 + "-->", "page is too large"),
    "many.html": (BODY + "<i>a</i>" * 20_001, "page is too large"),
    "other.html": ('<html lang="de">' + BODY, "language is not wanted"),
}


def test_pages_that_are_dropped(chromium, tmp_path):
    pages = write_pages(
        tmp_path, {f"en/{k}": v for k, (v, _) in DROPPED.items() if k != "other.html"}
    )
    pages += write_pages(tmp_path / "x", {"other.html": DROPPED["other.html"][0]})
    pages.append(ocr.Page("gone", str(tmp_path / "gone.html"), "en"))
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
        "red": "page has red of its own",
        "letter": "no font has a letter",
    }
    assert shots["gone"].reason == "page cannot be read"


class Counting(http.server.BaseHTTPRequestHandler):
    """Counts what arrives; /hang and /late answer with pages whose scripts never end."""

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/refused":
            self.send_error(403)
            return
        kind = "text/css" if self.path.endswith(".css") else "text/html; charset=utf-8"
        body = {
            "/hang": BODY + "<script>while (true);</script>",
            "/late": BODY
            + "<script>onload = () => setTimeout(() => { while (true); }, 5)</script>",
            "/page": '<html lang="en"><link rel="stylesheet" href="/a.css">'
            "<script src='/s.js'></script><script>fetch('/fetched')</script>" + BODY,
        }.get(self.path, "p { font-size: 30px }").encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Counts connections too: looking ahead opens some and asks for nothing."""

    connections = 0

    def get_request(self):
        self.connections += 1
        return super().get_request()


@contextlib.contextmanager
def serve():
    server = Server(("127.0.0.1", 0), Counting)
    server.paths, server.address = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def curated(chromium, tmp_path_factory):
    """50 pages in ten scripts and 6 that must be dropped, through `run`; (folder, report, texts of pages)."""
    pytest.importorskip("apache_beam", reason="apache-beam is in requirements-curation.txt")
    folder = tmp_path_factory.mktemp("ocr")
    texts, pages = {}, {}
    for language in WORDS:
        for number in range(5):
            name = f"{language}/{number}.html"
            pages[name], texts[name] = page(language, number)
    pages |= {f"en/{name}": DROPPED[name][0] for name in list(DROPPED)[:6]}
    write_pages(folder / "pages", pages)
    config = ocr_config.get_config()
    config.pages = str(folder / "pages")
    config.languages = tuple(WORDS)
    with config.unlocked():
        config.devices = SCREENS
    config.browser.sandbox = SANDBOX
    config.shard_size = 60
    report = ocr.run(config, folder / "out", ["--runner=DirectRunner"])
    return folder, report, texts


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
    devices = {device.name: device for device in DEVICES}
    records = rows(folder / "out" / "records")
    elements = set()

    async def compare():
        async with Browser(CONFIG.browser, local=True) as browser:
            for record, row in zip(records, rows(folder / "out" / "provenance"), strict=True):
                device = devices[row["device"]]
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


def test_local_pages_reach_nothing(chromium, tmp_path):
    with serve() as server:
        at = server.address
        source = f"""<html lang="en"><head><meta http-equiv="refresh" content="0; url={at}/refresh">
            <link rel="preconnect" href="{at}"><link rel="prefetch" href="{at}/prefetch">
            <link rel="stylesheet" href="{at}/a.css"><script src="{at}/s.js"></script></head>
            <body onload="fetch('{at}/load')">{BODY}<img src="{at}/img"><iframe src="{at}/frame"></iframe>
            <iframe src="file:///etc/hostname"></iframe><video src="{at}/video"></video>
            <script>fetch("{at}/fetch"); new WebSocket("{at}/socket".replace("http", "ws"));
            navigator.sendBeacon("{at}/beacon"); document.querySelector("p").textContent = "Changed";
            </script></body></html>"""
        pages = write_pages(tmp_path, {"en/spy.html": source})
        (shot,) = shoot(pages, DESKTOP).values()
        assert shot.text == "A first sentence of some words."
        assert shot.facts["blocked"] >= 5
        time.sleep(0.3)
        assert (server.paths, server.connections) == ([], 0)


def test_pages_by_address(chromium):
    with serve() as server:
        address = ocr.Page(f"{server.address}/page", f"{server.address}/page", "en")
        refused = ocr.Page("refused", f"{server.address}/refused", "en")

        def config(**changes):
            browser = dataclasses.replace(CONFIG.browser, load_seconds=2, **changes)
            return dataclasses.replace(DESKTOP, browser=browser)

        shots = shoot([address], config())
        assert shots[address.id].reason == "page needs the network"
        port = server.server_port
        hosts = ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]")
        private = [ocr.Page(host, f"http://{host}:{port}/page", "en") for host in hosts]
        shots = shoot(private, config(network="static"))
        assert {shot.reason for shot in shots.values()} == {"browser failed on the page"}
        assert (server.paths, server.connections) == ([], 0)

        shots = shoot([address, refused], config(network="static", private_addresses=True))
        assert shots[address.id].text == "A first sentence of some words."
        assert shots[address.id].inside[3] - shots[address.id].inside[1] > 30  # the style sheet
        assert shots["refused"].reason == "server refuses the page"
        assert sorted(set(server.paths) - {"/favicon.ico"}) == ["/a.css", "/page", "/refused"]

        hang, late = (ocr.Page(name, f"{server.address}/{name}", "en") for name in ("hang", "late"))
        began = time.monotonic()
        everything = config(network="all", private_addresses=True, page_seconds=3)
        shots = shoot([hang, late, address], everything)
        assert shots["hang"].reason == "page does not load in time"
        assert shots["late"].reason == "page takes too long"
        assert time.monotonic() - began < 60
        assert shots[address.id].text == "A first sentence of some words."
        assert {"/s.js", "/fetched"} <= set(server.paths)
