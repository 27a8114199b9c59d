"""Web pages in ten scripts, pages that must be dropped, and what looks at them."""

import asyncio
import dataclasses
import os

import numpy as np

from pangea_jax.curation import ocr
from pangea_jax.curation.browser import BrowserConfig, Device
from pangea_jax.curation.ocr_pages import read_pages

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
DEVICES = {name: Device(**screen) for name, screen in SCREENS.items()}
SANDBOX = not (hasattr(os, "geteuid") and os.geteuid() == 0)
CONFIG = ocr.OcrConfig(
    pages="",
    languages=tuple(WORDS),
    devices=DEVICES,
    views_per_page=1,
    instructions={"en": ("Read the text in the red box.",), "ar": ("اقرأ النص في الإطار الأحمر.",)},
    browser=BrowserConfig(sandbox=SANDBOX),
)
DESKTOP = dataclasses.replace(CONFIG, devices={"desktop": DEVICES["desktop"]})
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
    return list(read_pages(folder))


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
