"""Makes screenshots of web pages with a red box around one element, whose text is the answer.

This is the data of the paper's Appendix J (Figure 27): pages in ten languages, on several devices. A
*view* is one page on one device. It becomes one record, or is dropped for a reason:

    page -> draw devices -> load -> language -> elements that qualify -> scroll to one and inspect it
    -> screenshot -> check pixels -> red box -> record

The marked text must be completely visible: it is neither covered nor cut off, there is a glyph for every letter,
the box contains nothing else, and every line has enough contrast.
"""

import asyncio
import dataclasses
import functools
import hashlib
import io
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import regex
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from pangea_jax.curation import language_check, workflow
from pangea_jax.curation.accounting import Added, Dropped, Kept, Outcome, Passed, provenance
from pangea_jax.curation.browser import Browser, BrowserConfig, Device, OpenPage, PageError
from pangea_jax.curation.ocr_pages import Page, nearest_language, page_files, read_pages
from pangea_jax.data.record import IMAGE_MARKER, Conversation, Turn, identify_language
from pangea_jax.work import runners
from pangea_jax.work.restart import WorkError

RED = (255, 0, 0)
SOURCE, CATEGORY = "ocr/webui", "ocr"
STAGES = ("pages", "page", "language", "element")
_SCRIPT = Path(__file__).with_name("ocr.js")
# Invisible: soft hyphen, zero-width space, word joiner, byte order mark. Joiners shape letters and stay.
_UNSEEN = str.maketrans("", "", "\u00ad\u200b\u2060\ufeff")
_UNREADABLE = regex.compile(r"[\p{Co}\p{Cn}\p{Cs}\ufffd\ufffc]")  # icon fonts, broken encodings
# A page about language models may contain text that a tokenizer reads as a special token.
_MARKERS = regex.compile(rf"{IMAGE_MARKER}|<\|\w+\|>")


@dataclass(frozen=True)
class Choice:
    """Which elements qualify. Lengths are CSS pixels.

    Attributes:
      min_characters, max_characters: length of the answer.
      min_font: size of the font; smaller letters are not legible.
      min_width, min_height: size of the element.
      max_height_share: height of the element as a share of the screen's height; its width is not limited.
      min_script_share: share of the letters that are in the script of the page's language.
      min_contrast: difference between the darkest and the lightest pixel (0 to 255) of each line.
      max_red_share: maximum share of the page's pixels that are as red as the box.
      max_screens: maximum distance from the top of the page to the end of the element, in heights of the screen.
      attempts: number of elements to try before the view is dropped.
    """

    min_characters: int = 2
    max_characters: int = 1000
    min_font: float = 9.0
    min_width: float = 16.0
    min_height: float = 9.0
    max_height_share: float = 0.7
    min_script_share: float = 0.5
    min_contrast: int = 60
    max_red_share: float = 0.002
    max_screens: float = 8.0
    attempts: int = 24


@dataclass(frozen=True)
class Box:
    """The red frame, in CSS pixels; `padding` is the space between element and frame."""

    padding: float = 3.0
    thickness: float = 3.0


@dataclass(frozen=True)
class OcrConfig:
    """The pages, and how their screenshots are taken.

    Attributes:
      pages: a folder of HTML files, or a list (.jsonl, .txt) of files and addresses.
      languages: tags of the languages of the pages that are used.
      devices: name -> device to draw from.
      instructions: language -> questions; the English ones are used for every language.
      views_per_page: number of devices on which each page is shown.
      shard_size: number of views for which one browser runs.
    """

    pages: str
    languages: tuple[str, ...]
    devices: Mapping[str, Device]
    instructions: Mapping[str, Sequence[str]]
    views_per_page: int = 1
    seed: int = 0
    shard_size: int = 64
    browser: BrowserConfig = field(default_factory=BrowserConfig)
    choice: Choice = field(default_factory=Choice)
    box: Box = field(default_factory=Box)

    def __post_init__(self):
        if not self.codes:
            raise ValueError("config.languages is empty; name at least one language")
        if not 1 <= self.views_per_page <= len(self.devices):
            raise ValueError(
                f"config.views_per_page is {self.views_per_page}, but there are {len(self.devices)} devices"
            )
        if not self.instructions.get("en"):
            raise ValueError("config.instructions needs at least one question in English (en)")

    @functools.cached_property
    def codes(self) -> tuple[str, ...]:
        """The codes of `languages`."""
        return workflow.language_codes(self.languages)


@dataclass(frozen=True)
class View:
    """One page on one device, which has the name `screen` in the config; `id` is unique."""

    page: Page
    screen: str
    device: Device

    @property
    def id(self) -> str:
        return f"{self.page.id}@{self.screen}"


@dataclass(frozen=True)
class Shot:
    """A view with its box, from which record, picture and provenance are made.

    Attributes:
      picture: RGB, in device pixels, with the box.
      inside: (left, top, right, bottom) of the pixels within the frame, right and bottom excluded.
      element: (left, top, right, bottom) of the element, in fractions of device pixels.
    """

    view: View
    language: str
    text: str
    picture: Image.Image
    inside: tuple[int, int, int, int]
    element: tuple[float, float, float, float]
    facts: Mapping[str, Any]


def views_of(page: Page, config: OcrConfig) -> list[View]:
    """The page on `views_per_page` devices; seed and page decide which."""
    drawn = _random(config.seed, page.id).sample([*config.devices], config.views_per_page)
    return [View(page, name, config.devices[name]) for name in drawn]


def _random(seed: int, name: str) -> random.Random:
    return random.Random(hashlib.sha256(f"{seed}\0{name}".encode()).digest())


def answer_text(shown: str) -> str:
    """`innerText` as an answer: keeps lines, folds blanks, removes invisible characters.

    >>> answer_text("  Two\\u00adfold \\n\\n  text")
    'Twofold\\ntext'
    """
    lines = (" ".join(line.translate(_UNSEEN).split()) for line in shown.splitlines())
    return "\n".join(filter(None, lines))


def script_share(text: str, language: str) -> float:
    """Share of a text's letters that are in the script of a language; 0 without letters."""
    script = language_check.script_pattern(language)
    letters = regex.findall(r"\p{L}", text)
    return sum(bool(script.match(letter)) for letter in letters) / max(1, len(letters))


def element_fault(element: Mapping[str, Any], language: str, device: Device, choice: Choice) -> str:
    """The reason why an element of `candidates()` (ocr.js) does not qualify; empty if there is none."""
    text = answer_text(element["text"])
    if not choice.min_characters <= len(text) <= choice.max_characters:
        return "text too short or too long"
    if _UNREADABLE.search(text):
        return "text is not legible"
    if _MARKERS.search(text):
        return "text holds a marker of conversations"
    if element["font"] < choice.min_font:
        return "font too small"
    if element["width"] < choice.min_width or element["height"] < choice.min_height:
        return "element too small"
    if element["height"] > choice.max_height_share * device.height:
        return "element too large"
    if element["top"] + element["height"] > choice.max_screens * device.height:
        return "too far down the page"
    if script_share(text, language) < choice.min_script_share:
        return "text in another script"
    return ""


def order_elements(elements: Sequence[Mapping[str, Any]], draw: random.Random) -> list:
    """A random order in which longer texts tend to come first, since pages have many short links.

    The weight of each draw is the square root of the characters (Efraimidis and Spirakis 2006).
    """
    keys = [draw.random() ** (1 / math.sqrt(max(1, len(element["text"])))) for element in elements]
    ranked = sorted(zip(keys, range(len(elements)), strict=True), reverse=True)
    return [elements[number] for _, number in ranked]


async def take(browser: Browser, view: View, config: OcrConfig) -> Shot:
    """Takes the screenshot of a view and draws the box.

    Raises:
      PageError: the page or all of its elements cannot be used.
    """
    if view.page.language and view.page.language not in config.codes:
        raise PageError("language is not wanted", view.page.language, "language")
    source = _read(view.page, config.browser)
    async with browser.open(source, view.device) as page:
        await page.run(_SCRIPT.read_text(encoding="utf-8"))
        found = await page.run("() => document.fonts.ready.then(() => candidates())")
        if found["tooLarge"]:
            raise PageError("page is too large", "over 20,000 pieces of text")
        language = page_language(view.page, found, config.codes)
        draw = _random(config.seed, view.id)
        plain, seen, tag = await _look(page, view, found, language, draw, config)
        facts = {
            "browser": browser.version,
            "element": tag,
            "scroll": seen["scroll"],
            "blocked": len(page.blocked),
            "page_sha256": hashlib.sha256(source).hexdigest() if view.page.is_local else "",
        }
    inside, picture = draw_box(plain, seen["box"], view.device.scale, config.box)
    text = answer_text(seen["text"])
    element = tuple(edge * view.device.scale for edge in seen["box"])
    return Shot(view, language, text, picture, inside, element, facts)


def _read(page: Page, config: BrowserConfig) -> str | bytes:
    if not page.is_local:
        return page.source
    try:
        size = Path(page.source).stat().st_size
        if size > config.max_html_bytes:
            raise PageError("page is too large", f"{size:,} bytes")
        return Path(page.source).read_bytes()
    except OSError as error:
        raise PageError("page cannot be read", error.strerror or str(error)) from None


def page_language(page: Page, found: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """The language of a page: from the list of pages, else its `lang`, else identified from its words.

    Raises:
      PageError: the language is unknown or not wanted.
    """
    language = (
        page.language
        or nearest_language(found["language"] or "")
        or identify_language(found["text"])
    )
    if not language:
        raise PageError("language of the page is unknown", stage="language")
    if language not in wanted:
        raise PageError("language is not wanted", language, "language")
    return language


async def _look(page: OpenPage, view: View, found, language, draw, config: OcrConfig):
    """Chooses an element. Returns the screenshot without box, the answer of `inspect` (ocr.js) and the tag.

    Raises:
      PageError: no element qualifies; the detail names the faults.
    """
    device, choice = view.device, config.choice
    faults = [(element_fault(e, language, device, choice), e) for e in found["elements"]]
    able = order_elements([element for fault, element in faults if not fault], draw)
    if not able:
        reasons = sorted({fault for fault, _ in faults}) or ["no text"]
        raise PageError("no element qualifies", "; ".join(reasons), "element")
    reasons = []
    for element in able[: choice.attempts]:
        room = device.height - element["height"]
        top = max(0.0, element["top"] - draw.uniform(0.1, 0.9) * room)
        margin = config.box.padding + config.box.thickness + 1
        # Fractions of a pixel would blur each place differently.
        call = ("(...a) => inspect(...a)", element["index"], round(top), margin)
        seen = await page.run(*call)
        if not seen["fault"]:
            picture = await page.screenshot()
            fault = await _fault_of_picture(page, call, seen, picture, device, choice)
            if not fault:
                return picture, seen, element["tag"]
            seen = {"fault": fault}
        reasons.append(seen["fault"])
    raise PageError("no element can be seen whole", "; ".join(sorted(set(reasons))), "element")


async def _fault_of_picture(page, call, seen, picture, device, choice) -> str:
    if picture.size != (round(device.width * device.scale), round(device.height * device.scale)):
        return "screenshot of another size"
    if await page.run(*call) != seen:
        return "page moves"
    pixels = np.asarray(picture)
    if red_pixels(pixels).mean() > choice.max_red_share:
        return "page has other red pixels"
    grey = np.asarray(picture.convert("L"))
    for line in seen["lines"]:
        left, top, right, bottom = _outwards(line, device.scale, 0)
        ink = grey[max(0, top) : bottom, max(0, left) : right]
        if ink.size == 0 or int(ink.max()) - int(ink.min()) < choice.min_contrast:
            return "too little contrast"
    return ""


def red_pixels(pixels: UInt8[np.ndarray, "H W 3"]) -> np.ndarray:
    """(H, W) booleans: the pixels that are as red as the box."""
    red, green, blue = (pixels[..., channel].astype(np.int16) for channel in range(3))
    return (red > 200) & (green < 60) & (blue < 60)


def _outwards(box: Sequence[float], scale: float, grow: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = (scale * edge for edge in box)
    return (
        math.floor(left) - grow,
        math.floor(top) - grow,
        math.ceil(right) + grow,
        math.ceil(bottom) + grow,
    )


def draw_box(
    picture: Image.Image, element: Sequence[float], scale: float, box: Box
) -> tuple[tuple[int, int, int, int], Image.Image]:
    """Draws the frame around an element, outside of its pixels, in a copy of a screenshot.

    Args:
      element: left, top, right, bottom in CSS pixels of the screen.
      scale: device pixels per CSS pixel.

    Returns:
      `Shot.inside`, and the picture.
    """
    inside = left, top, right, bottom = _outwards(element, scale, math.ceil(scale * box.padding))
    thick = max(1, round(scale * box.thickness))
    framed = picture.copy()
    corners = (left - thick, top - thick, right + thick - 1, bottom + thick - 1)
    ImageDraw.Draw(framed).rectangle(corners, outline=RED, width=thick)
    return inside, framed


def to_record(shot: Shot, config: OcrConfig) -> tuple[Conversation, bytes, dict[str, Any]]:
    """The record, its picture as PNG, and its provenance."""
    draw = _random(config.seed, f"question of {shot.view.id}")
    questions = [*config.instructions["en"]]
    questions += config.instructions.get(shot.language, ()) if shot.language != "en" else ()
    question = draw.choice(questions)
    parts = [IMAGE_MARKER, question] if draw.random() < 0.5 else [question, IMAGE_MARKER]
    number = hashlib.sha256(shot.view.id.encode()).hexdigest()[:16]
    name = f"webui_ocr_{shot.language}_{number}"
    record = Conversation(
        id=name,
        source=SOURCE,
        language=shot.language,
        category=CATEGORY,
        images=(f"images/{SOURCE}/{shot.language}/{name}.png",),
        turns=(Turn("user", "\n".join(parts)), Turn("assistant", shot.text)),
    ).validate()
    png = io.BytesIO()
    shot.picture.save(png, "PNG")
    device = shot.view.device
    origin = {
        "id": name,
        "language": shot.language,
        "page": shot.view.page.id,
        "device": shot.view.screen,
        "screen": [device.width, device.height, device.scale],
        "box": list(shot.inside),
        "element_box": [round(edge, 2) for edge in shot.element],
        "picture_sha256": hashlib.sha256(png.getvalue()).hexdigest(),
        **shot.facts,
    }
    return record, png.getvalue(), origin


async def take_all(
    views: Sequence[View], config: OcrConfig
) -> AsyncIterator[tuple[View, Shot | PageError]]:
    """Yields every view with its shot, or with the reason why there is none. Local pages have a separate browser.

    Raises:
      BrowserError: there is no browser, or it does not start.
    """
    for local in (True, False):
        async with Browser(config.browser, local=local) as browser:
            for view in views:
                if view.page.is_local != local:
                    continue
                try:
                    yield view, await take(browser, view, config)
                except PageError as error:
                    yield view, error


@dataclass(frozen=True)
class _TakeShard:
    """The part that makes the records; each shard of views has a fresh browser."""

    config: OcrConfig

    def __call__(self, rows: Iterator[dict[str, Any]]) -> Iterator[Outcome]:
        devices = self.config.devices
        views = [View(Page(**row["page"]), row["device"], devices[row["device"]]) for row in rows]
        with asyncio.Runner() as runner:
            shots = take_all(views, self.config)
            try:
                while (taken := runner.run(anext(shots, None))) is not None:
                    yield self._outcome(*taken)
            finally:
                runner.run(shots.aclose())

    def _outcome(self, view: View, shot: Shot | PageError) -> Outcome:
        if isinstance(shot, PageError):
            return shot.dropped(view.id, shot.stage)
        record, png, origin = to_record(shot, self.config)
        return Kept(record, origin, {record.images[0]: png})


def _view_outcomes(pages: Iterator[Page], config: OcrConfig) -> Iterator[Outcome]:
    seen = set()
    for page in pages:
        if page.id in seen:
            yield Dropped(page.id, "pages", "page is listed twice")
            continue
        seen.add(page.id)
        views = views_of(page, config)
        if len(views) > 1:
            yield Added("pages", len(views) - 1)
        for view in views:
            row = {"page": dataclasses.asdict(page), "device": view.screen}
            yield Passed(row)


def run(config: OcrConfig, out: Path, runner_options: Sequence[str]) -> dict[str, Any]:
    """Makes the records of all pages. After a kill the same call continues.

    Args:
      out: folder of the results, see `pangea_jax.curation.workflow`.
      runner_options: options of Beam.

    Returns:
      the contents of report.json.

    Raises:
      WorkError: there is no browser or no page, or `out` holds other results.
      ValueError: a line of the list of pages is wrong.
    """
    source = Path(config.pages)
    if not source.exists() or next(read_pages(source), None) is None:
        raise WorkError(f"config.pages: no pages in {source}; name a folder of *.html or a list")
    # Pictures depend on the browser's version, so a run keeps to one.
    plan = _plan(config, page_files(source)) | {"chromium": asyncio.run(_version(config))}
    job = workflow.Job(out, STAGES, config.shard_size)
    with job.started(plan):
        job.split("views", _view_outcomes(read_pages(source), config))
        job.map(runners.Beam(runner_options), workflow.RECORDS, "views", _TakeShard(config))
        title = "Text in screenshots of web pages"
        return job.report(("views", workflow.RECORDS), title=title, sections=_sections(out))


def _plan(config: OcrConfig, files: Sequence[Path]) -> dict[str, Any]:
    plan = workflow.plan(config, files)
    defaults = {item.name: item.default for item in dataclasses.fields(Device)}
    for device in plan["devices"].values():  # plans of earlier versions have no defaults
        for name in [name for name, value in device.items() if value == defaults[name]]:
            del device[name]
    return plan


async def _version(config: OcrConfig) -> str:
    """The browser's version. This starts it, so a missing browser is found before the work begins."""
    async with (
        Browser(config.browser, local=True) as browser,
        browser.open(b"<p>", next(iter(config.devices.values()))),
    ):
        return browser.version


def _sections(out: Path) -> dict[str, dict[str, int]]:
    """Numbers of records by language, device and element."""
    counts = {name: Counter() for name in ("language", "device", "element")}
    for row in provenance(out):
        for name, counter in counts.items():
            counter[row[name]] += 1
    return {f"Records by {name}": dict(counter.most_common()) for name, counter in counts.items()}
