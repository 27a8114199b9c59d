"""The page at `/`: its texts and headers, and a person's ways through it in headless Chromium."""

import asyncio
import base64
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="fastapi is in requirements-serve.txt")
pytest.importorskip("uvicorn", reason="uvicorn is in requirements-serve.txt")

import fastapi
import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

from pangea_jax import languages
from pangea_jax.serving import page
from tests.figures.test_inert import ACTIVE, HOSTILE

TEXTS = {
    code: json.loads((page.FOLDER / "texts" / f"{code}.json").read_text(encoding="utf-8"))
    for code in sorted(path.stem for path in (page.FOLDER / "texts").glob("*.json"))
}
BLANKS = re.compile(r"\{\w+\}")
# One red pixel; what a camera, a clipboard or another window hands over.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
PNG_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
FILE = {"name": "red.png", "mimeType": "image/png", "buffer": PNG}


# Texts and files, without a browser ---------------------------------------------------------------


def test_every_language_has_every_text():
    assert set(TEXTS) == set(languages.PANGEAINS)
    english = TEXTS["en"]
    for code, texts in TEXTS.items():
        assert list(texts) == list(english), f"texts/{code}.json has other keys than en.json"
        for key, text in texts.items():
            parts = text if key == "questions" else [text]
            assert parts and all(part.strip() == part != "" for part in parts), (code, key)
            if key != "questions":
                assert BLANKS.findall(text) == BLANKS.findall(english[key]), (code, key)
            assert not ACTIVE.search("".join(parts)), (code, key)
        # A text that was left in English would be found here; some short words are the same.
        same = [key for key in texts if texts[key] == english[key]]
        assert code == "en" or len(same) <= 2, (code, same)


@pytest.mark.parametrize("code", [code for code in languages.PANGEAINS if code != "en"])
def test_texts_are_in_the_script_of_their_language(code):
    scripts = {
        "Arab": "\u0600-\u06ff", "Beng": "\u0980-\u09ff", "Cyrl": "\u0400-\u04ff", "Deva": "\u0900-\u097f",
        "Ethi": "\u1200-\u137f", "Grek": "\u0370-\u03ff", "Hans": "\u4e00-\u9fff", "Hebr": "\u0590-\u05ff",
        "Jpan": "\u3040-\u30ff\u4e00-\u9fff", "Kore": "\uac00-\ud7af", "Latn": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
        "Sinh": "\u0d80-\u0dff", "Taml": "\u0b80-\u0bff", "Telu": "\u0c00-\u0c7f", "Thai": "\u0e00-\u0e7f",
    }  # fmt: skip
    own = re.compile(f"[{scripts[languages.LANGUAGES[code].script]}]")
    for key, text in TEXTS[code].items():
        joined = BLANKS.sub("", "".join(text))
        letters = [c for c in joined if c.isalpha()]
        assert sum(map(bool, map(own.match, letters))) > 0.6 * len(letters), (code, key)


def test_the_page_uses_every_text_and_no_other():
    sources = {path.suffix: path.read_text("utf-8") for path in page.FOLDER.glob("page.*")}
    html = (page.FOLDER / "index.html").read_text("utf-8")
    script = sources[".js"] + (page.FOLDER / "stream.js").read_text("utf-8")
    asked = set(re.findall(r'data-(?:text|label|title|placeholder)="(\w+)"', html))
    assert asked <= set(TEXTS["en"])
    named = asked | set(re.findall(r'"(\w+)"', script)) | {"questions", "about_pictures"}
    # Those that the script names in a template or as a key.
    named |= {"about_drawings"} | set(re.findall(r"\b(busy|key_needed)\b", script))
    assert set(TEXTS["en"]) <= named


def test_a_page_of_a_wrong_model_is_refused():
    with pytest.raises(ValueError, match=r"no languages of the page: \['xx'\]"):
        page.PageInfo("m", learnt=["en", "xx"])
    with pytest.raises(ValueError, match=r"\['a.webp'\] have no English name"):
        page.PageInfo("m", examples=[page.Example("a.webp", b"", "image/webp", {"sw": "paka"})])


def test_the_sample_offers_drawings_with_their_licences():
    info = page.sample_info()
    assert len(info.examples) == 8 and all(e.data[8:12] == b"WEBP" for e in info.examples)
    assert {credit.licence for credit in info.credits} == {"Apache-2.0", "CC-BY-4.0"}
    assert info.learnt == ["ar", "en", "es", "hi", "ko", "ru", "sw", "zh"]


# A server and a browser ---------------------------------------------------------------------------


class Server:
    """The page, and an endpoint that streams what a test wants.

    Attributes:
      requests: bodies of the questions so far.
      reply: body of a question -> pieces of the answer, or a response.
    """

    def __init__(self, info: page.PageInfo):
        self.requests, self.headers = [], []
        self.reply = lambda body: ["A small ", "answer."]
        app = fastapi.FastAPI()
        app.include_router(page.router(info))
        app.post("/v1/chat/completions")(self._complete)
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    async def _complete(self, request: fastapi.Request):
        body = json.loads(await request.body())
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        reply = self.reply(body)
        if isinstance(reply, fastapi.Response):
            return reply
        return StreamingResponse(_events(reply), media_type="text/event-stream")

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(10)


async def _events(pieces):
    """What OpenAI's protocol makes of pieces; None waits until the client has gone, `ConnectionError` breaks off."""
    for piece in pieces:
        if piece is None:
            await asyncio.sleep(60)
        if piece is ConnectionError:
            return
        delta = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        yield f"data: {json.dumps(delta)}\n\n"
    yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
    yield "data: [DONE]\n\n"


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "test"}}, status)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    finder = pytest.importorskip(
        "pangea_jax.curation.browser", reason="needs requirements-curation.txt"
    )
    try:
        path = finder.find_chromium()
    except finder.BrowserError as error:
        pytest.skip(str(error))
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, chromium_sandbox=False)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server():
    with Server(page.PageInfo("pangea-test")) as server:
        yield server


@pytest.fixture(scope="module")
def sample_server():
    with Server(page.sample_info()) as server:
        yield server


@pytest.fixture
def visit(browser):
    """Opens the page; afterwards nothing was asked of another host and no rule of the page was broken."""
    opened, faults = [], []

    def visit(server, **settings):
        server.requests.clear()
        server.headers.clear()
        server.reply = lambda body: ["A small ", "answer."]
        context = browser.new_context(**{"locale": "en-US"} | settings)
        opened.append(context)
        tab = context.new_page()
        tab.set_default_timeout(15_000)

        def note(message):
            # The console also tells of refused questions, which are part of some tests.
            if message.type == "error" and "status of" not in message.text:
                faults.append(message.text)

        def gate(route):
            if route.request.url.startswith(server.url):
                return route.continue_()
            faults.append(route.request.url)
            return route.abort()

        context.route(lambda url: not url.startswith(("data:", "blob:")), gate)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("dialog", lambda dialog: (faults.append("dialog"), dialog.dismiss()))
        tab.on("console", note)
        tab.goto(server.url)
        tab.get_by_role("button", name=re.compile(".")).first.wait_for()
        tab.locator("#questions button").first.wait_for()
        return tab

    visit.faults = faults
    yield visit
    for context in opened:
        context.close()
    assert not faults


def question_box(tab):
    return tab.locator("#ask")


def ask(tab, text):
    question_box(tab).fill(text)
    question_box(tab).press("Enter")


def last_answer(tab):
    """The text of the last answer, when it is complete."""
    tab.locator('.answer:not([aria-busy="true"])').last.wait_for()
    tab.locator('.answer[aria-busy="true"]').wait_for(state="detached")
    return tab.locator(".answer").last


def test_an_answer_streams_and_the_chat_goes_on(server, visit):
    tab = visit(server)
    go_on = threading.Event()

    async def slowly():
        yield "First "
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        yield "second.\n\nA new paragraph."

    server.reply = lambda body: []
    pieces = slowly()

    async def events():
        async for piece in pieces:
            async for event in _events([piece]):
                if "[DONE]" not in event and '"stop"' not in event:
                    yield event
        async for event in _events([]):
            yield event

    server.reply = lambda body: StreamingResponse(events(), media_type="text/event-stream")
    ask(tab, "Hello?")
    tab.get_by_text("First", exact=True).wait_for()
    assert tab.locator(".answer").get_attribute("aria-busy") == "true"
    assert tab.locator("#status").inner_text() == TEXTS["en"]["answering"]
    assert tab.locator("#stop").is_visible() and not tab.locator("#send").is_visible()
    go_on.set()
    assert last_answer(tab).locator("p").all_inner_texts() == ["First second.", "A new paragraph."]
    assert tab.locator("#log").get_attribute("role") == "log"
    server.reply = lambda body: ["Yes."]
    ask(tab, "Again?")
    assert last_answer(tab).locator("p").inner_text() == "Yes."
    assert server.requests[1] == {
        "model": "pangea-test",
        "messages": [
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "First second.\n\nA new paragraph."},
            {"role": "user", "content": "Again?"},
        ],
        "temperature": 0,
        "stream": True,
    }


def test_stop_keeps_what_is_there(server, visit):
    tab = visit(server)
    server.reply = lambda body: ["Half an ", None, "answer"]
    ask(tab, "Hello?")
    tab.get_by_text("Half an").wait_for()
    tab.locator("#stop").click()
    assert TEXTS["en"]["stopped"] in last_answer(tab).inner_text()
    assert tab.locator("#send").is_visible()
    server.reply = lambda body: ["Yes."]
    ask(tab, "And?")
    last_answer(tab)
    assert [m["role"] for m in server.requests[1]["messages"]] == ["user", "assistant", "user"]
    tab.locator("#new-chat").click()
    assert tab.locator(".message").count() == 0
    ask(tab, "New?")
    last_answer(tab)
    assert len(server.requests[2]["messages"]) == 1


def test_hostile_texts_do_nothing(server, visit):
    tab = visit(server)
    hostile = [text[:2_000].encode("utf-8", "replace").decode() for text in HOSTILE.values()]
    server.reply = lambda body: ["\n\n".join(hostile)]
    before = tab.locator("script, iframe, a").count()
    ask(tab, hostile[0] + hostile[1] + hostile[5])
    shown = last_answer(tab).locator(".text").inner_text()
    assert "<script>alert(1)</script>" in shown and "onerror=alert(1)" in shown
    assert "user<202E>gnp.exe<202C>" in shown
    assert tab.locator("#log img, #log script, #log a").count() == 0
    assert tab.locator("script, iframe, a").count() == before
    assert "<202E>" in tab.locator(".user .text").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


_HAND_OVER = """([kind, url]) => {
  const bytes = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "red.png", { type: "image/png" }));
  const settings = { bubbles: true, cancelable: true };
  document.querySelector("#ask").dispatchEvent(kind === "paste"
    ? new ClipboardEvent("paste", { ...settings, clipboardData: data })
    : new DragEvent(kind, { ...settings, dataTransfer: data }));
}"""


def test_pictures_by_file_paste_and_drop(server, visit):
    tab = visit(server)
    tab.locator("#files").set_input_files([FILE])
    tab.locator("#pending li").first.wait_for()
    tab.evaluate(_HAND_OVER, ["paste", PNG_URL])
    tab.locator("#pending li").nth(1).wait_for()
    tab.evaluate(_HAND_OVER, ["dragover", PNG_URL])
    assert tab.locator("#drop").is_visible()
    tab.evaluate(_HAND_OVER, ["drop", PNG_URL])
    tab.locator("#pending li").nth(2).wait_for()
    assert not tab.locator("#drop").is_visible()
    tab.get_by_role("button", name="Remove picture").nth(1).click()
    assert tab.locator("#pending li").count() == 2
    question_box(tab).press("Enter")  # pictures alone: a question is proposed
    assert question_box(tab).input_value() == TEXTS["en"]["questions"][0] and not server.requests
    question_box(tab).press("Enter")
    last_answer(tab)
    *pictures, text = server.requests[0]["messages"][0]["content"]
    assert pictures == [{"type": "image_url", "image_url": {"url": PNG_URL}}] * 2
    assert text == {"type": "text", "text": TEXTS["en"]["questions"][0]}
    assert tab.locator(".user img").count() == 2 and tab.locator("#pending li").count() == 0


def test_a_large_picture_is_scaled_and_a_text_is_no_picture(server, visit):
    tab = visit(server)
    large = io.BytesIO()
    Image.new("RGB", (2000, 1000), "teal").save(large, "JPEG")
    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    photo = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": large.getvalue()}
    tab.locator("#files").set_input_files([text, photo])
    tab.locator("#pending li").wait_for()
    assert "notes.txt" in tab.get_by_role("alert").inner_text()
    ask(tab, "What is it?")
    last_answer(tab)
    head, _, data = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"].partition(
        ","
    )
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1344, 672)
    tab.locator("#files").set_input_files([FILE] * 9)
    tab.locator("#pending li").nth(7).wait_for()
    assert "8" in tab.get_by_role("alert").inner_text()


def test_the_language_sets_direction_labels_and_questions(server, visit):
    tab = visit(server, locale="he-IL")
    root = tab.locator("html")
    assert (root.get_attribute("lang"), root.get_attribute("dir")) == ("he", "rtl")
    options = tab.locator("#language option").all_inner_texts()
    names = [languages.LANGUAGES[code].native_name for code in languages.PANGEAINS]
    assert sorted(options) == sorted(names) and len(options) == 39
    for code, direction in (("ur", "rtl"), ("sw", "ltr"), ("zh", "ltr")):
        tab.locator("#language").select_option(code)
        tab.locator(f'html[lang="{code}"][dir="{direction}"]').wait_for()
        texts = TEXTS[code]
        assert question_box(tab).get_attribute("placeholder") == texts["ask"]
        assert question_box(tab).get_attribute("aria-label") == texts["ask"]
        assert tab.get_by_role("button", name=texts["send"], exact=True).is_visible()
        assert tab.locator("#questions button").all_inner_texts() == texts["questions"]
    tab.locator("#questions button").nth(2).click()
    assert question_box(tab).input_value() == TEXTS["zh"]["questions"][2]
    ask(tab, "مرحبا")  # each paragraph has its own direction, whatever the page's
    last_answer(tab)
    direction = "e => getComputedStyle(e).direction"
    assert tab.locator(".user p").evaluate(direction) == "rtl"
    assert tab.locator(".answer p").evaluate(direction) == "ltr"
    tab.reload()
    tab.locator('html[lang="zh"]').wait_for()


def test_a_keyboard_is_enough(server, visit):
    tab = visit(server)

    def focused():
        return tab.evaluate("document.activeElement.id || document.activeElement.parentElement.id")

    assert focused() == "ask"
    tab.keyboard.type("One")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two")
    assert not server.requests
    tab.keyboard.press("Enter")
    last_answer(tab)
    assert server.requests[0]["messages"][0]["content"] == "One\ntwo"
    assert focused() == "ask"
    tab.keyboard.type("Three")
    order = []
    for _ in range(2):
        tab.keyboard.press("Tab")
        order.append(focused())
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert tab.evaluate(outline) == "solid", "the focus is not seen"
    assert order == ["add", "send"]
    server.reply = lambda body: ["Half", None]
    tab.keyboard.press("Space")
    tab.get_by_text("Half").wait_for()
    assert focused() == "ask"
    tab.keyboard.press("Escape")
    last_answer(tab)
    order = []
    for _ in range(3):
        tab.keyboard.press("Shift+Tab")
        order.append(focused())
    assert order == ["scroll", "new-chat", "language"]
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert focused() == "ask" and tab.locator(".message").count() == 0
    for _ in range(3):
        tab.keyboard.press("Shift+Tab")
    assert focused() == "questions"
    tab.keyboard.press("Enter")
    assert focused() == "ask" and question_box(tab).input_value() == TEXTS["en"]["questions"][0]


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "busy"), (400, "refused"), (500, "failed"), (None, "lost")]
)
def test_errors_are_a_sentence_and_can_be_tried_again(server, visit, status, kind):
    tab = visit(server)
    bad = refusal(status, "why <b>not</b>") if status else ["Half", ConnectionError]
    server.reply = lambda body: bad
    ask(tab, "Hello?")
    shown = last_answer(tab).inner_text()
    assert TEXTS["en"][kind] in shown and (status is None or "why <b>not</b>" in shown)
    server.reply = lambda body: ["Now it works."]
    tab.get_by_role("button", name=TEXTS["en"]["retry"]).click()
    tab.get_by_text("Now it works.").wait_for()
    assert tab.locator(".answer").count() == 1 and tab.locator(".user").count() == 1
    assert server.requests[0] == server.requests[1]


def test_a_key_is_asked_for(server, visit):
    tab = visit(server)

    def reply(body):
        has_key = server.headers[-1].get("authorization") == "Bearer secret"
        return ["Welcome."] if has_key else refusal(401, "no key")

    server.reply = reply
    assert not tab.locator("#key").is_visible()
    ask(tab, "Hello?")
    tab.locator("#key").fill("secret")
    tab.locator("#key").press("Enter")
    tab.get_by_text("Welcome.").wait_for()
    assert not tab.locator("#key").is_visible() and tab.locator(".answer").count() == 1


def test_headers(server, visit):
    for path in ("", "page/page.js", "page/texts/ar.json"):
        with urllib.request.urlopen(server.url + path) as response:
            policy = response.headers["Content-Security-Policy"]
            assert policy == page.SECURITY_POLICY and "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            tag = response.headers["ETag"]
        again = urllib.request.Request(server.url + path, headers={"If-None-Match": tag})
        with pytest.raises(urllib.error.HTTPError, match="304"):
            urllib.request.urlopen(again)
    for path in ("page/../page.py", "page/%2e%2e/page.py", "page/none.js", "page/"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(server.url + path)
    tab = visit(server)  # the browser obeys: no script of a text, no other host
    broken = """async () => {
      const broken = [];
      document.addEventListener("securitypolicyviolation", (e) => broken.push(e.effectiveDirective));
      try { document.body.innerHTML += "<b>x</b>"; } catch { broken.push("innerHTML"); }
      return broken;
    }"""
    assert tab.evaluate(broken) == ["innerHTML"]
    assert "TrustedHTML" in visit.faults.pop()


@pytest.mark.parametrize("code", ["en", "ar"])
def test_a_telephone_has_no_sideways_scroll(sample_server, visit, code):
    tab = visit(
        sample_server, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True
    )
    tab.locator("#language").select_option(code)
    tab.locator(f'html[lang="{code}"]').wait_for()
    ask(tab, "word " * 30 + "x" * 300)
    last_answer(tab)
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    for name in ("add", "photo", "send", "language", "new-chat"):
        box = tab.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 44, name
    assert tab.locator("#camera").get_attribute("capture") == "environment"


def test_the_sample_offers_its_drawings(sample_server, visit):
    tab = visit(sample_server, locale="sw-KE")
    texts = TEXTS["sw"]
    assert tab.locator("#about").inner_text() == texts["about_drawings"]
    assert "Kiswahili" in tab.locator("#learnt").inner_text()
    assert tab.locator("#model").inner_text() == "sample"
    assert "Twemoji" in tab.locator("#credits").inner_text()
    sample_server.reply = lambda body: ["ndovu"]
    for n in range(2):
        tab.get_by_role("button", name="ndovu").first.click()
        tab.locator(".answer").nth(n).wait_for()
        last_answer(tab)
    (message,) = sample_server.requests[1]["messages"]  # each drawing starts a new chat
    image, text = message["content"]
    assert image["image_url"]["url"].startswith("data:image/webp;base64,")
    assert text["text"] == "Hii ni nini?"
    assert tab.locator(".separator").inner_text() == texts["new_chat"]
