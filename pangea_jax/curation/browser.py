"""Loads, measures and photographs web pages in a headless Chromium, with no or restricted network access.

Pages are data of unknown origin. A local page loads nothing, not even its own pictures, and its scripts
do not run. `BrowserConfig.network` says what a page from the web may load. Unless it is "all", Chromium
has no network and gets what `web.Fetch` fetched. Our measuring script runs in an isolated world, which
the page's scripts cannot see or change.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent import futures
from importlib import util as import_util
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image

from pangea_jax.curation import web
from pangea_jax.curation.accounting import Unfit
from pangea_jax.data import image
from pangea_jax.work.atomic import write_bytes
from pangea_jax.work.restart import WorkError

INSTALL = (
    'install it with `pip install "playwright>=1.50,<2"` and either `apt-get install chromium` or '
    "`playwright install chromium`, or name a Chromium in config.browser.executable_path"
)
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FONT_PACKAGES = ("manimgx_fonts", "noto_cjk_sans_jp_regular")  # in requirements.txt

# No name resolves to an address, neither for pages nor for the browser itself.
_CLOSED = "MAP * ~NOTFOUND"
# The last pattern is every IPv6 address; there are no narrower patterns for them.
_PRIVATE = (
    *("localhost", "*.localhost", "*.local", "*.internal", "0.*", "10.*", "127.*", "169.254.*"),
    *(f"172.{n}.*" for n in range(16, 32)),
    *("192.168.*", "*:*"),
    # The rest of what `web.Fetch` refuses.
    *(f"100.{n}.*" for n in range(64, 128)),
    *(
        "192.0.0.*",
        "192.0.2.*",
        "192.88.99.*",
        "198.18.*",
        "198.19.*",
        "198.51.100.*",
        "203.0.113.*",
    ),
    *(f"{n}.*" for n in range(224, 256)),
)
_STATIC = ("stylesheet", "image", "font")
# What opens connections that no gate sees: peer connections, which also tell the addresses of this machine, and
# WebTransport, which workers have too. They are taken away in every frame before the page's own scripts run.
_WAYS_OUT = (
    "RTCPeerConnection",
    "webkitRTCPeerConnection",
    "WebTransport",
    "Worker",
    "SharedWorker",
)
_CLOSE_WAYS_OUT = f"""for (const name of {json.dumps(_WAYS_OUT)})
  if (name in globalThis) Object.defineProperty(globalThis, name, {{ value: undefined }});"""
_LOCAL_ADDRESS = "http://page.invalid/"
_STOP_SECONDS = 10


class BrowserError(WorkError):
    """There is no browser, or it does not start; the message says what to install or set."""


class PageError(Unfit):
    """A page that cannot be used; `stage` is the stage at which it is dropped."""

    def __init__(self, reason: str, detail: str = "", stage: str = "page"):
        super().__init__(reason, detail)
        self.stage = stage


@dataclasses.dataclass(frozen=True)
class Device:
    """A screen: width and height in CSS pixels; `scale` is the number of device pixels for each of them."""

    width: int
    height: int
    scale: float = 1.0
    mobile: bool = False

    def __post_init__(self):
        pixels = self.width * self.height * self.scale**2
        if min(self.width, self.height) < 200 or not 0.5 <= self.scale <= 4:
            raise ValueError(
                f"{self}: expected at least 200 x 200 CSS pixels and a scale of 0.5 to 4"
            )
        if pixels > image.MAX_PIXELS:
            raise ValueError(f"{self}: {pixels:,.0f} pixels are too many")


@dataclasses.dataclass(frozen=True)
class BrowserConfig:
    """How pages are shown.

    Attributes:
      executable_path: path of a Chromium; None looks on PATH, then for Playwright's own.
      sandbox: whether Chromium uses its sandbox; root and most containers cannot.
      network: what pages given by URL may load. "none": such pages are refused. "static": the document,
        style sheets, pictures and fonts; no script runs, and `web.Fetch` fetches everything for Chromium.
        "all": everything; Chromium fetches it.
      private_addresses: whether pages may load from this machine and private networks. With "all",
        Chromium looks up a checked name again, and may get another address.
      robots: whether robots.txt is obeyed, for pages and for what they load. With "all", redirections of a
        page are checked after it has loaded; a forbidden page is then not used.
      user_agent: added to Chromium's own; robots.txt can name it.
      load_seconds, page_seconds: time limits for loading a page, and for all work on it.
      max_html_bytes: larger local pages are refused.
      fonts: folders with fonts, besides the system's and the Noto fonts of requirements.txt.
    """

    executable_path: str | None = None
    sandbox: bool = True
    network: str = "none"
    private_addresses: bool = False
    robots: bool = True
    user_agent: str = web.USER_AGENT
    load_seconds: float = 20.0
    page_seconds: float = 60.0
    max_html_bytes: int = 8 << 20
    fonts: Sequence[str] = ()

    def __post_init__(self):
        if self.network not in ("none", "static", "all"):
            raise ValueError(
                f"config.browser.network is {self.network!r}; expected none, static or all"
            )


def find_chromium(executable_path: str | None = None) -> str:
    """The path of Chromium: `executable_path`, or one on PATH, or Playwright's own.

    Raises:
      BrowserError: Playwright or Chromium is missing.
    """
    if import_util.find_spec("playwright") is None:
        raise BrowserError(f"Playwright is not installed; {INSTALL}")
    if executable_path is not None:
        if not os.access(executable_path, os.X_OK):
            raise BrowserError(
                f"config.browser.executable_path {executable_path!r} is not a program that can be run"
            )
        return executable_path
    found = next(filter(None, map(shutil.which, COMMANDS)), None)
    if found is None:
        # In a thread, since Playwright's synchronous interface refuses to run beside an event loop.
        with futures.ThreadPoolExecutor(1) as pool:
            found = pool.submit(_playwrights_own).result()
    if not os.path.exists(found):
        raise BrowserError(f"no Chromium on this machine; {INSTALL}")
    return found


def _playwrights_own() -> str:
    """The path that `playwright install chromium` uses, whether the file exists or not."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


class OpenPage:
    """A page on one device. `blocked` lists the addresses that were not loaded."""

    def __init__(self, page, session, world: int, blocked: list[str]):
        self._page, self._session, self._world = page, session, world
        self.blocked = blocked

    async def run(self, function: str, *arguments: Any) -> Any:
        """Calls a JavaScript function (its source) with JSON values, in the isolated world."""
        words = ", ".join(json.dumps(argument) for argument in arguments)
        answer = await self._session.send(
            "Runtime.evaluate",
            {
                "expression": f"({function})({words})",
                "contextId": self._world,
                "returnByValue": True,
                "awaitPromise": True,
            },
        )
        if "exceptionDetails" in answer:
            said = answer["exceptionDetails"].get("exception", {}).get("description", "")
            raise PageError("page cannot be measured", said.partition("\n")[0][:200])
        return answer["result"].get("value")

    async def screenshot(self) -> Image.Image:
        """The viewport in device pixels, RGB."""
        png = await self._page.screenshot(type="png", scale="device", caret="hide")
        return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")


class Browser:
    """A Chromium, used with `async with`. It starts when it is needed, and again after a crash.

    Args:
      local: whether it shows local pages, which load nothing. `config.network` then does not count.
    """

    def __init__(self, config: BrowserConfig, *, local: bool):
        self.config, self.network = config, "none" if local else config.network
        self._fetch = web.Fetch(
            timeout=config.load_seconds,
            private=config.private_addresses,
            robots=config.robots,
            user_agent=config.user_agent,
        )
        self._path = find_chromium(config.executable_path)
        self._playwright = self._browser = None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self._stop()

    @property
    def version(self) -> str:
        return self._browser.version if self._browser else ""

    @contextlib.asynccontextmanager
    async def open(self, source: str | bytes, device: Device) -> AsyncIterator[OpenPage]:
        """Opens a page in a fresh profile, for at most `page_seconds`.

        Args:
          source: an http(s) address, or the bytes of an HTML document.

        Raises:
          PageError: the page does not load, takes too long, or crashes the browser.
          BrowserError: the browser does not start.
        """
        from playwright.async_api import Error as PlaywrightError

        if isinstance(source, str) and self.network == "none":
            raise PageError("page needs the network", "browser.network is 'none'")
        await self._start()
        try:
            async with asyncio.timeout(self.config.page_seconds):
                context = await self._context(device)
                try:
                    yield await self._load(context, source)
                finally:
                    await asyncio.wait_for(context.close(), _STOP_SECONDS)
        except TimeoutError:
            await self._stop()  # the browser itself may hang
            raise PageError("page takes too long", f"{self.config.page_seconds:g} s") from None
        except PlaywrightError as error:
            if not self._browser.is_connected():
                await self._stop()
            said = error.message.partition("\n")[0][:200]
            raise PageError("browser failed on the page", said) from None

    async def _start(self) -> None:
        if self._browser and self._browser.is_connected():
            return
        from playwright.async_api import Error as PlaywrightError
        from playwright.async_api import async_playwright

        await self._stop()
        self._playwright = await async_playwright().start()
        try:
            self._browser = await self._playwright.chromium.launch(
                executable_path=self._path,
                chromium_sandbox=self.config.sandbox,
                args=_arguments(self.network, self.config.private_addresses),
                env=dict(os.environ) | {"FONTCONFIG_FILE": _write_font_list(self.config.fonts)},
            )
            session = await self._browser.new_browser_cdp_session()
            own = (await session.send("Browser.getVersion"))["userAgent"]
            self._fetch = dataclasses.replace(self._fetch, browser=own)
        except PlaywrightError as error:
            await self._stop()
            root = "running as root without --no-sandbox" in error.message
            hint = "Chromium has no sandbox as root: set config.browser.sandbox=False, or run it as another user"
            lines = [line.strip() for line in error.message.splitlines() if line.strip()]
            said = hint if root or "sandbox" in error.message.lower() else " ".join(lines)[:300]
            raise BrowserError(f"{self._path} does not start: {said}") from None

    async def _stop(self) -> None:
        playwright, self._playwright, self._browser = self._playwright, None, None
        if playwright:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(playwright.stop(), _STOP_SECONDS)

    async def _context(self, device: Device):
        return await self._browser.new_context(
            viewport={"width": device.width, "height": device.height},
            device_scale_factor=device.scale,
            is_mobile=device.mobile,
            user_agent=f"{self._fetch.browser} {self._fetch.user_agent}",
            has_touch=device.mobile,
            java_script_enabled=self.network == "all",
            service_workers="block",
            accept_downloads=False,
            offline=self.network != "all",
        )

    async def _load(self, context, source: str | bytes) -> OpenPage:
        from playwright.async_api import TimeoutError as PlaywrightTimeout

        document = await self._document(source)
        gate = _Gate(self.network, document, self._fetch)
        await context.route("**/*", gate.decide)
        if self.network == "all":  # the gate does not see web sockets' targets
            await context.add_init_script(_CLOSE_WAYS_OUT)
            await context.route_web_socket("**/*", lambda socket: socket.close())
        page = await context.new_page()
        try:
            address = source if document is None else document.url
            timeout = 1e3 * self.config.load_seconds
            answer = await page.goto(address, wait_until="load", timeout=timeout)
        except PlaywrightTimeout:
            detail = f"{self.config.load_seconds:g} s"
            raise PageError("page does not load in time", detail) from None
        if answer is not None and not answer.ok:
            raise PageError("server refuses the page", f"status {answer.status}")
        # Chromium follows redirections by itself. A forbidden page is not used.
        request = answer.request if answer else None
        while request and request.redirected_from:
            await _fetched(self._fetch.check, request.url)
            request = request.redirected_from
        session = await context.new_cdp_session(page)
        frame = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
        world = await session.send("Page.createIsolatedWorld", {"frameId": frame})
        return OpenPage(page, session, world["executionContextId"], gate.blocked)

    async def _document(self, source: str | bytes) -> web.Answer | None:
        """The document; None if Chromium fetches it.

        Raises:
          PageError: it cannot be fetched, or may not be.
        """
        if isinstance(source, bytes):
            return web.Answer(200, _LOCAL_ADDRESS, _content_type(source), source)
        if self.network == "all":
            return await _fetched(self._fetch.check, source)
        document = await _fetched(self._fetch.answer, source)
        if document.status != 200:
            raise PageError("server refuses the page", f"status {document.status}")
        return document


async def _fetched(get: Callable[[str], Any], url: str) -> Any:
    """What a method of `web.Fetch` returns, called in a thread.

    Raises:
      PageError: the address cannot be fetched, or may not be.
    """
    try:
        return await asyncio.to_thread(get, url)
    except web.FetchError as error:
        raise PageError(str(error), url[:200]) from None


class _Gate:
    """Decides on every request of a page: the document passes, and everything that `network` and robots.txt allow.

    Args:
      document: the document of the page; None: Chromium fetches it.

    Attributes:
      blocked: addresses of the requests that did not pass.
    """

    def __init__(self, network: str, document: web.Answer | None, fetch: web.Fetch):
        self._network, self._document, self._fetch = network, document, fetch
        self._is_open, self.blocked = False, []

    async def decide(self, route) -> None:
        from playwright.async_api import Error as PlaywrightError

        # A page that took too long may already be closed when its pictures arrive.
        with contextlib.suppress(PlaywrightError):
            try:
                await self._answer(route)
            except PageError:
                self.blocked.append(route.request.url)
                # After status 204 the browser stays on its page.
                moves = route.request.is_navigation_request()
                await (route.fulfill(status=204) if moves else route.abort())

    async def _answer(self, route) -> None:
        """
        Raises:
          PageError: the request is not allowed.
        """
        request = route.request
        is_page = request.is_navigation_request() and request.frame.parent_frame is None
        is_first, self._is_open = is_page and not self._is_open, True
        if is_first and self._document is not None:
            await _fulfill(route, self._document)
        elif is_first:
            await route.continue_()
        elif self._network == "all":
            await _fetched(self._fetch.check, request.url)
            await route.continue_()
        elif self._network == "static" and request.resource_type in _STATIC:
            await _fulfill(route, await _fetched(self._fetch.answer, request.url))
        else:
            raise PageError("page may not load it")


async def _fulfill(route, answer: web.Answer) -> None:
    # Without this header, Chromium refuses fonts of another host.
    headers = {"Access-Control-Allow-Origin": "*"}
    headers |= {"Content-Type": answer.content_type} if answer.content_type else {}
    await route.fulfill(status=answer.status, headers=headers, body=answer.body)


def _write_font_list(fonts: Sequence[str]) -> str:
    """Writes a fontconfig file (the system's fonts, `FONT_PACKAGES`, `fonts`) and returns its path."""
    specs = filter(None, map(import_util.find_spec, FONT_PACKAGES))
    folders = [str(Path(spec.origin).parent) for spec in specs] + list(fonts)
    lines = "".join(f"<dir>{escape(folder)}</dir>" for folder in folders)
    # One folder for all browsers, since a killed process could not remove its own folder.
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pangea_jax" / "fonts"
    )
    cache.mkdir(parents=True, exist_ok=True)
    text = (
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd"><fontconfig>'
        f'<include ignore_missing="yes">/etc/fonts/fonts.conf</include>{lines}'
        f"<cachedir>{escape(str(cache))}</cachedir></fontconfig>"
    ).encode()
    path = cache / f"{hashlib.sha256(text).hexdigest()[:16]}.conf"
    write_bytes(path, text)
    return str(path)


def _content_type(document: bytes) -> str:
    """The content type of a saved page, which has lost the one of its server; most pages are UTF-8."""
    if b"charset" not in document[:1024].lower():  # where browsers look for it
        with contextlib.suppress(UnicodeDecodeError):
            document.decode("utf-8")
            return "text/html; charset=utf-8"
    return "text/html"


def _arguments(network: str, private_addresses: bool) -> list[str]:
    private = () if private_addresses else _PRIVATE
    rules = _CLOSED if network != "all" else ",".join(f"MAP {host} ~NOTFOUND" for host in private)
    return [
        "--disable-background-networking",
        # What looks up names or opens connections without a request that the gate could see.
        "--dns-prefetch-disable",
        "--no-pings",
        "--disable-quic",
        "--disable-domain-reliability",
        # No UDP: no peer connections, even where a page gets at their constructor. Older and newer name of the flag.
        "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
        "--webrtc-ip-handling-policy=disable_non_proxied_udp",
        "--disable-gpu",
        "--font-render-hinting=none",
        *([f"--host-resolver-rules={rules}"] if rules else []),
    ]
