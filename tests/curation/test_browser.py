"""Pages and the network: local ones reach nothing, others what the config and robots.txt let them."""

import contextlib
import dataclasses
import http.server
import socket
import threading
import time

import pytest

pytest.importorskip("regex", reason="regex is in requirements-curation.txt")
pytest.importorskip("urllib3", reason="urllib3 is in requirements-curation.txt")
pytest.importorskip("protego", reason="Protego is in requirements-curation.txt")

from pangea_jax.curation import browser
from pangea_jax.curation.ocr_pages import Page

from .web_pages import BODY, CONFIG, DESKTOP, shoot, write_pages


class Counting(http.server.BaseHTTPRequestHandler):
    """Counts what arrives; /hang and /late answer with pages whose scripts never end, /moved leads to /page."""

    def do_GET(self):
        self.server.paths.append(self.path)
        self.server.agents.add(self.headers["User-Agent"])
        if self.path == "/refused":
            self.send_error(403)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/page")
            self.end_headers()
            return
        kind = "text/css" if self.path.endswith(".css") else "text/html; charset=utf-8"
        body = {
            "/robots.txt": self.server.robots,
            "/hang": BODY + "<script>while (true);</script>",
            "/late": BODY
            + "<script>onload = () => setTimeout(() => { while (true); }, 5)</script>",
            "/page": '<html lang="en"><link rel="stylesheet" href="/a.css">'
            "<script src='/s.js'></script><script>fetch('/fetched');"
            "fetch('/out/' + [...'RTCPeerConnection WebTransport Worker'.split(' ')].map((n) => typeof window[n]));"
            "new WebSocket(location.origin.replace('http', 'ws') + '/socket')</script>"
            + f"{BODY}<iframe src='/frame' style='position: absolute; top: 300px'></iframe>",
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
    server.paths, server.agents, server.robots = [], set(), ""
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
        address = Page(f"{server.address}/page", f"{server.address}/page", "en")
        refused = Page("refused", f"{server.address}/refused", "en")

        def config(**changes):
            settings = dataclasses.replace(CONFIG.browser, load_seconds=2, **changes)
            return dataclasses.replace(DESKTOP, browser=settings)

        shots = shoot([address], config())
        assert shots[address.id].reason == "page needs the network"
        port = server.server_port
        hosts = ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]")
        private = [Page(host, f"http://{host}:{port}/page", "en") for host in hosts]
        shots = shoot(private, config(network="static"))
        assert {shot.reason for shot in shots.values()} == {"address is private"}
        assert (server.paths, server.connections) == ([], 0)

        shots = shoot([address, refused], config(network="static", private_addresses=True))
        assert shots[address.id].text == "A first sentence of some words."
        assert shots[address.id].inside[3] - shots[address.id].inside[1] > 30  # the style sheet
        assert shots["refused"].reason == "server refuses the page"
        assert sorted(set(server.paths) - {"/favicon.ico"}) == [
            "/a.css",
            "/page",
            "/refused",
            "/robots.txt",
        ]
        assert server.paths.count("/robots.txt") == 1
        assert all("pangea_jax" in agent for agent in server.agents)

        hang, late = (Page(name, f"{server.address}/{name}", "en") for name in ("hang", "late"))
        began = time.monotonic()
        everything = config(network="all", private_addresses=True, page_seconds=3)
        shots = shoot([hang, late, address], everything)
        # On a busy machine the whole time may be over first.
        assert shots["hang"].reason in ("page does not load in time", "page takes too long")
        assert shots["late"].reason == "page takes too long"
        assert time.monotonic() - began < 60
        assert shots[address.id].text == "A first sentence of some words."
        assert {"/s.js", "/fetched", "/frame"} <= set(server.paths)
        assert "/socket" not in server.paths
        assert "/out/undefined,undefined,undefined" in server.paths


@pytest.mark.parametrize("network", ["none", "static", "all"])
def test_flags_close_the_other_ways_out(network):
    """Also where no Chromium is installed."""
    flags = browser._arguments(network, private_addresses=False)
    assert {"--disable-quic", "--dns-prefetch-disable", "--no-pings"} <= set(flags)
    assert "--force-webrtc-ip-handling-policy=disable_non_proxied_udp" in flags
    (rules,) = (flag for flag in flags if flag.startswith("--host-resolver-rules="))
    private = ("127.*", "10.*", "169.254.*", "100.64.*", "224.*", "localhost", "*:*")
    assert "MAP * ~NOTFOUND" in rules or all(f"MAP {host} ~NOTFOUND" in rules for host in private)
    # Chromium takes the last one, and Playwright has its own.
    assert not any(flag.startswith("--disable-features") for flag in flags)


def test_robots_txt_is_obeyed(chromium):
    with serve() as server:
        page, moved = (Page(name, f"{server.address}/{name}", "en") for name in ("page", "moved"))

        def shots(*pages, **changes):
            server.paths.clear()
            changes = {"network": "static", "private_addresses": True} | changes
            settings = dataclasses.replace(CONFIG.browser, **changes)
            return shoot(pages, dataclasses.replace(DESKTOP, browser=settings))

        # Rules are kept for a day, for each name of a robot.
        server.robots = "User-agent: *\nDisallow: /page"
        found = shots(page, moved, user_agent="first")
        assert {shot.reason for shot in found.values()} == {"robots.txt forbids it"}
        assert found["page"].stage == "page"
        assert server.paths == ["/robots.txt", "/moved"]
        found = shots(page, moved, user_agent="first", network="all")
        assert {shot.reason for shot in found.values()} == {"robots.txt forbids it"}
        # By itself Chromium follows the redirection; the page is not used.
        assert server.paths.count("/page") == 1

        server.robots = "User-agent: second\nDisallow: /*.css"
        found = shots(page, user_agent="second")
        assert found["page"].facts["blocked"] == 2  # and the frame
        assert "/a.css" not in server.paths and "/page" in server.paths

        found = shots(moved, user_agent="first", robots=False)
        assert found["moved"].text == "A first sentence of some words."
        assert server.paths == ["/moved", "/page", "/a.css"]  # relative to where it led


def test_names_that_lead_to_this_machine_are_not_asked(chromium, monkeypatch):
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more: look_up(host.replace("pages.example", "127.0.0.1"), *more),
    )
    with serve() as server:
        page = Page("x", f"http://pages.example:{server.server_port}/page", "en")
        settings = dataclasses.replace(CONFIG.browser, network="static")
        (shot,) = shoot([page], dataclasses.replace(DESKTOP, browser=settings)).values()
        assert shot.reason == "address is private"
        assert (server.paths, server.connections) == ([], 0)
