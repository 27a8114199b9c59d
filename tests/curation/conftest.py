"""A real OpenAI-compatible server on loopback, as reliable as it is told to be."""

import contextlib
import hashlib
import http.server
import json
import select
import socket
import struct
import threading
import time
from collections import Counter

import pytest

from tests.loopback import refuse_others

CONTENTS = ("good", "malformed", "refused", "wrong_language", "slow")
"""What a prompt is answered with, every time it is asked."""

TROUBLES = ("busy", "broken", "cut", "page")
"""What happens to a prompt before it is answered: 429, 500, a dropped connection, a page of HTML."""

SLOW_SECONDS = 0.2


class Endpoint:
    """Answers chat completions and embeddings on 127.0.0.1 from a thread.

    What becomes of a prompt depends on the seed and the prompt alone, so that it is the same whoever asks
    and in whatever order. `answer` writes the text:

        def answer(request: dict, kind: str) -> str | tuple[str, str]

    where `kind` is of CONTENTS, and a second text is the finish_reason. For "refused" the server itself answers
    with a refusal.

    Args:
      shares: kind of CONTENTS or TROUBLES -> share of the prompts, each set summing to at most 1; what
        is left of CONTENTS is good, of TROUBLES untroubled.
      failures: how often a troubled prompt fails before it is answered.
      embed: text -> vector, for /v1/embeddings.
      usage: what is said of the tokens: numbers that go over those counted; None: nothing is said.

    Attributes:
      url: of the API, for `base_url`.
      asked: key -> requests that arrived. Keys are those of `pangea_jax.curation.llm.request_key`.
      finished: key -> completions that were sent to their end, which is when they are paid for.
      kinds: key -> (content, trouble or "").
      requests: key -> the request.
      down: while True, every connection is dropped.
    """

    def __init__(self, answer, *, shares=None, seed=0, failures=1, embed=None, usage=()):
        self._answer, self._embed, self._shares = answer, embed, shares or {}
        unknown = set(self._shares) - {*CONTENTS, *TROUBLES}
        assert not unknown, unknown
        self._seed, self._failures, self._usage = seed, failures, usage
        self.asked, self.finished, self.kinds, self.requests = Counter(), Counter(), {}, {}
        self.down, self._lock = False, threading.Lock()
        handler = type("Handler", (_Handler,), {"endpoint": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def kind(self, key):
        """(content, trouble) of a prompt."""
        return self._draw(CONTENTS, key) or "good", self._draw(TROUBLES, key)

    def _draw(self, kinds, key):
        digest = hashlib.sha256(f"{self._seed}/{kinds[0]}/{key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for kind in kinds:
            place -= self._shares.get(kind, 0.0)
            if place < 0:
                return kind
        return ""

    def wait_until_idle(self):
        """Until all that a killed client has sent is answered; living clients may stay connected."""
        quiet = 0
        while quiet < 3:
            quiet = quiet + 1 if self._server.is_idle() else 0
            time.sleep(0.02)

    def respond(self, handler, request):
        body = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        key = hashlib.sha256(body.encode()).hexdigest()
        content, trouble = self.kind(key)
        with self._lock:
            self.asked[key] += 1
            self.kinds[key], self.requests[key] = (content, trouble), request
            troubled = trouble and self.asked[key] <= self._failures
        if self.down or (troubled and trouble == "cut"):
            handler.drop()
        elif troubled:
            handler.fail(trouble)
        else:
            self._complete(handler, key, request, content)

    def _complete(self, handler, key, request, content):
        usage = {"prompt_tokens": len(json.dumps(request)) // 4, "total_tokens": 0}
        if "input" in request:
            data = [
                {"object": "embedding", "index": i, "embedding": self._embed(text)}
                for i, text in enumerate(request["input"])
            ]
            reply = {"object": "list", "model": request["model"], "data": data, "usage": usage}
        else:
            if content == "slow":
                time.sleep(SLOW_SECONDS)
            text = None if content == "refused" else self._answer(request, content)
            text, finish = text if isinstance(text, tuple) else (text, "stop")
            message = {"role": "assistant", "content": text}
            message |= {"refusal": "I cannot help with that."} if content == "refused" else {}
            reply = {
                "id": key[:12],
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": usage | {"completion_tokens": len(text or "") // 4},
            }
        if self._usage is None:
            del reply["usage"]
        else:
            reply["usage"] |= dict(self._usage)
        handler.send(200, json.dumps(reply).encode())
        with self._lock:
            self.finished[key] += 1


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.answering, self._connections, self._lock = 0, set(), threading.Lock()

    def process_request(self, request, client_address):
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    @contextlib.contextmanager
    def answers(self):
        with self._lock:
            self.answering += 1
        try:
            yield
        finally:
            with self._lock:
                self.answering -= 1

    def is_idle(self):
        """Whether nothing is being answered, nor waits to be read or accepted."""
        with self._lock:
            sockets = [s for s in (self.socket, *self._connections) if s.fileno() >= 0]
            return not self.answering and not select.select(sockets, [], [], 0)[0]

    def handle_error(self, request, client_address):
        pass  # clients are killed in the tests


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        with self.server.answers():
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.endpoint.respond(self, request)

    def send(self, status, body, kind="application/json", **headers):
        self.send_response(status)
        headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def fail(self, trouble):
        if trouble == "page":
            self.send(200, b"<html>The gateway says hello</html>", "text/html")
            return
        status = {"busy": 429, "broken": 500}[trouble]
        error = {"error": {"message": f"planned {status}", "type": "planned"}}
        self.send(status, json.dumps(error).encode(), **{"retry-after-ms": "10"})

    def drop(self):
        """Ends the connection in the middle of an answer, as a proxy that falls over does."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        self.wfile.flush()
        # With a zero linger the socket is reset rather than closed.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    refuse_others(monkeypatch)


@pytest.fixture
def start_endpoint():
    """Makes `Endpoint`s and closes them."""
    started = []

    def start(answer, **settings):
        started.append(Endpoint(answer, **settings))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.close()


@pytest.fixture(scope="session")
def chromium():
    """Where Chromium is; skips where there is none."""
    from pangea_jax.curation import browser

    try:
        return browser.find_chromium()
    except browser.BrowserError as error:
        pytest.skip(str(error))
