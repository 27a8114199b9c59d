"""Each hop of a crawl: where redirections and names may lead. Servers and names are the test's own.

The public addresses are made up: whoever dials one reaches the test's server on loopback, and every other address is
refused before anything is sent (`tests/loopback.py`).
"""

import gzip
import http.server
import socket
import threading
import time

import pytest

pytest.importorskip("urllib3", reason="urllib3 is in requirements-curation.txt")
pytest.importorskip("protego", reason="Protego is in requirements-curation.txt")

from urllib3.util import connection

from pangea_jax.curation.web import Fetch, FetchError
from tests.loopback import LeavesThisMachine, refuse_others

SITE, OTHER = "93.184.215.14", "93.184.215.15"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"].partition(":")[0], self.path))
        status, body, headers = self.server.pages.get(self.path, (200, b"a picture", {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        blocks = [body] if isinstance(body, bytes) else body
        try:
            for block in blocks:
                self.wfile.write(block)
                self.wfile.flush()
        except OSError:  # who has enough hangs up
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def crawl(monkeypatch):
    """A server on loopback behind made-up names and public addresses.

    Attributes: `names` maps a name to the answers of its look-ups, the last one for ever; `dialled` lists who was
    dialled, `refused` whom the guard kept from being reached; `asked` lists (host, path) of what arrived.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.pages, server.dialled = [], {}, []
    server.names = {"site.example": [[SITE]], "other.example": [[OTHER]]}
    server.port = server.server_address[1]
    look_up, dial = socket.getaddrinfo, connection.create_connection

    def resolve(host, port, *more, **settings):
        if host not in server.names:  # numbers in all spellings, without asking any server of names
            settings |= {"flags": socket.AI_NUMERICHOST} if host != "localhost" else {}
            return look_up(host, port, *more, **settings)
        answers = server.names[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        family = [socket.AF_INET6 if ":" in a else socket.AF_INET for a in found]
        return [
            (f, socket.SOCK_STREAM, 6, "", (a, port)) for f, a in zip(family, found, strict=True)
        ]

    def to_loopback(address, *more, **settings):
        server.dialled.append(address[0])
        if address[0] not in (SITE, OTHER):
            return dial(address, *more, **settings)
        return dial(("127.0.0.1", server.port), *more, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connection, "create_connection", to_loopback)
    server.refused = refuse_others(monkeypatch)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    assert not server.refused, "the code dialled an address that is not loopback"


def test_the_guard_itself(monkeypatch):
    refused = refuse_others(monkeypatch)
    for family, address in ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family) as line, pytest.raises(LeavesThisMachine):
            line.connect((address, 80))
    assert [host for host, _ in refused] == ["203.0.113.1", "2001:db8::1"]


def move(where, status=302):
    return status, b"", {"Location": where}


PRIVATE = (
    *(
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "http://[::1]:{port}/secret",
    ),
    *(
        "http://2130706433:{port}/secret",
        "http://0x7f000001:{port}/secret",
        "http://127.1:{port}/secret",
    ),
    *(
        "http://0.0.0.0:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "//127.0.0.1:{port}/secret",
    ),
    *(
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://[64:ff9b::a9fe:a9fe]/",
    ),
    *(
        "http://[64:ff9b:1::a9fe:a9fe]/",
        "http://[fec0::1]/",
        "http://224.0.0.1/",
        "http://[ff02::1]/",
    ),
    *("http://100.64.0.1/", "http://10.0.0.1/", "http://inside.example/", "http://half.example/"),
)
OTHER_SCHEMES = (
    "file:///etc/passwd",
    "ftp://site.example/x",
    "gopher://site.example/x",
    "data:,x",
    "javascript:1",
)


@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("where", [*PRIVATE, *OTHER_SCHEMES])
def test_a_redirection_is_judged_at_each_hop(crawl, where, hops):
    crawl.names |= {"inside.example": [["10.0.0.1"]], "half.example": [[OTHER, "169.254.169.254"]]}
    for hop in range(1, hops):
        crawl.pages[f"/{hop}"] = move(f"http://other.example/{hop + 1}", 301)
    crawl.pages[f"/{hops}"] = move(where.format(port=crawl.port), 307)
    problem = "not of the web" if where in OTHER_SCHEMES else "private"
    with pytest.raises(FetchError, match=problem):
        Fetch(robots=False, timeout=20)("http://site.example/1")
    assert [path for _, path in crawl.asked] == [f"/{hop}" for hop in range(1, hops + 1)]
    assert set(crawl.dialled) <= {SITE, OTHER}


def test_robots_txt_is_fetched_by_the_same_rules(crawl):
    crawl.pages["/robots.txt"] = move(f"http://127.0.0.1:{crawl.port}/secret")
    with pytest.raises(FetchError, match="private"):
        Fetch(timeout=20)("http://site.example/1.jpg")
    assert crawl.asked == [("site.example", "/robots.txt")] and crawl.dialled == [SITE]


@pytest.mark.parametrize("later", ["127.0.0.1", "169.254.169.254", "::1", "fec0::1"])
def test_a_name_that_resolves_anew_is_judged_anew(crawl, later):
    crawl.names["site.example"] = [[SITE], [later]]
    crawl.pages["/1"] = move("/2")
    with pytest.raises(FetchError, match="private"):
        Fetch(robots=False, timeout=20)("http://site.example/1")
    assert crawl.asked == [("site.example", "/1")] and crawl.dialled == [SITE]


def drip():
    while True:
        time.sleep(0.1)
        yield b"x"


def endless():
    while True:
        yield b"x" * 65_536


BOMB = gzip.compress(bytes(64 << 20), 9)


@pytest.mark.parametrize(
    ("body", "headers", "problem"),
    [
        (drip(), {}, "too slow"),
        (endless(), {}, "too large"),
        (BOMB, {"Content-Encoding": "gzip"}, "too large"),
        (gzip.compress(BOMB), {"Content-Encoding": "gzip, gzip"}, "too large"),
    ],
    ids=["drip", "endless", "bomb", "bomb in a bomb"],
)
def test_a_body_within_limits(crawl, body, headers, problem):
    crawl.pages["/1"] = 200, body, headers
    fetch = Fetch(robots=False, timeout=1.5 if problem == "too slow" else 30, max_bytes=1 << 20)
    began = time.monotonic()
    with pytest.raises(FetchError, match=problem):
        fetch("http://site.example/1")
    assert time.monotonic() - began < 20
