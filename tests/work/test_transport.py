"""Answers of endpoints that drip, never end, inflate or lead elsewhere; all servers are on loopback."""

import contextlib
import gzip
import http.server
import json
import threading
import time
import zlib

import pytest

from pangea_jax.work import transport

openai = pytest.importorskip("openai", reason="openai is in requirements-eval.txt")

COMPLETION = json.dumps(
    {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "good"},
            }
        ],
    }
).encode()
LIMIT = 1 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        with contextlib.suppress(OSError):  # who has enough hangs up
            self.server.answers.get(self.path, type(self).complete)(self)

    do_GET = do_POST

    def complete(self, body=COMPLETION, **headers):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip_body(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.drip()

    def drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.drip()

    def drip(self):
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)
        self.close_connection = True

    def never_end(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        for _ in range(64):
            self.wfile.write(b" " * LIMIT)
        self.close_connection = True

    def zip(self):
        self.complete(gzip.compress(COMPLETION), Content_Encoding="gzip")

    def bomb(self):
        packer = zlib.compressobj(9, wbits=31)
        body = b"".join(packer.compress(bytes(LIMIT)) for _ in range(64)) + packer.flush()
        assert len(body) < LIMIT // 8
        self.complete(body, Content_Encoding="gzip")

    def brotli(self):
        self.complete(Content_Encoding="br")

    def move(self, where, status=307):
        self.send_response(status)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def start():
    servers = []

    def make(answer=Handler.complete):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.asked, server.answers = [], {"/v1/chat/completions": answer}
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server, seconds=20.0, retries=1):
    kind = transport.limited(openai.DefaultHttpxClient, seconds, LIMIT)
    api = openai.OpenAI(
        api_key="k", base_url=f"{server.url}/v1", max_retries=retries, timeout=5, http_client=kind()
    )
    messages = [{"role": "user", "content": "?"}]
    return api.chat.completions.create(model="m", messages=messages).choices[0].message.content


@pytest.mark.parametrize("answer", [Handler.complete, Handler.zip])
def test_an_answer_within_the_limits(start, answer):
    server = start(answer)
    assert [ask(server), ask(server)] == ["good", "good"]


@pytest.mark.parametrize("answer", [Handler.drip_body, Handler.drip_headers])
def test_the_time_limit_holds_for_the_whole_answer(start, answer):
    server, began = start(answer), time.monotonic()
    with pytest.raises(openai.APITimeoutError):
        ask(server, seconds=0.4, retries=0)
    assert time.monotonic() - began < 3  # of the 5 s that the server would take


def test_a_slow_answer_is_asked_for_again(start):
    server = start()
    answers = iter([Handler.drip_body, Handler.complete])
    server.answers["/v1/chat/completions"] = lambda handler: next(answers)(handler)
    assert ask(server, seconds=1.0) == "good"
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Handler.never_end, "over the limit of 1 MiB"),
        (Handler.bomb, "over the limit of 1 MiB"),
        (Handler.brotli, "compressed as 'br'"),
    ],
)
def test_an_answer_without_end_is_refused_once(start, answer, said):
    server = start(answer)
    with pytest.raises(openai.UnprocessableEntityError, match=said):
        ask(server)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "name.invalid"])
def test_another_host_is_not_asked(start, host, status):
    other = start()
    port = other.server_address[1]
    server = start(lambda h: h.move(f"http://{host}:{port}/v1/chat/completions", status))
    with pytest.raises(openai.UnprocessableEntityError, match=f"leads to http://{host}:{port}"):
        ask(server)
    assert len(server.asked) == 1 and not other.asked


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x", "//[::1]/x"])
def test_other_schemes_are_not_followed(start, where):
    server = start(lambda h: h.move(where))
    with pytest.raises(openai.OpenAIError):
        ask(server, retries=0)
    assert len(server.asked) == 1


def test_the_same_host_is_asked_and_circles_end(start):
    server = start(lambda h: h.move("/v2"))
    assert ask(server) == "good"
    assert server.asked == ["/v1/chat/completions", "/v2"]
    server.answers["/v2"] = lambda h: h.move("/v2")
    with pytest.raises(openai.UnprocessableEntityError, match="in circles"):
        ask(server)


def test_tls_is_not_given_up(start):
    httpx = __import__(openai.DefaultHttpxClient.__mro__[1].__module__.split(".")[0])
    same = [
        ("http://a/x", "http://a:80/y"),
        ("http://a/", "https://a/"),
        ("https://a/", "https://a:443/"),
    ]
    other = [
        ("https://a/", "http://a/"),
        ("http://a:8/", "https://a:8/"),
        ("http://a/", "http://b/"),
    ]
    for pairs, expected in ((same, True), (other, False)):
        for pair in pairs:
            assert transport._is_same_host(*map(httpx.URL, pair)) is expected, pair
