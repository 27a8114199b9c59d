"""A hub on this machine: what the clients of huggingface_hub and datasets ask for, of a few small repositories."""

import contextlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories of data sets or models by name, each a mapping of paths to contents.

    Attributes:
      failing: repository -> the status of all replies.
      drops: repository -> how often the connection is cut in the middle of a file.
      asked: (method, path) of all requests.
    """

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.asked = repositories, []
        self.failing, self.drops = {}, {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b""
        if self.command == "POST":
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.urlsplit(self.path).path.lstrip("/")
        self.server.asked.append((self.command, path))
        name = next((n for n in self.server.repositories if n in path), None)
        if name is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if status := self.server.failing.get(name):
            return self._error(status, None, "busy")
        rest = path.partition(name)[2].strip("/").split("/", 2)
        # Only now: a revision may have slashes, which come quoted.
        rest = [urllib.parse.unquote(part) for part in rest]
        self._answer(name, path.startswith("api/"), rest, body)

    do_HEAD = do_POST = do_GET

    def _answer(self, name: str, api: bool, rest: list[str], body: bytes) -> None:
        files = self.server.repositories[name]
        if not api:  # resolve/REVISION/PATH
            return self._file(name, rest[2])
        kind = rest[0]
        if kind in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            return self._json(
                info | {"downloads": 0, "likes": 0, "gated": False, "disabled": False}
            )
        if kind == "tree":
            folder = rest[2] if len(rest) > 2 else ""
            found = _entries(files, folder)
            return (
                self._json(found) if found else self._error(404, "EntryNotFound", "no such folder")
            )
        if kind == "paths-info":
            wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(body)["paths"]
            entries = {entry["path"]: entry for entry in _entries(files, "")}
            return self._json([entries[path] for path in wanted if path in entries])
        self._error(404, None, f"the tests' hub has no {kind}")

    def _file(self, name: str, path: str) -> None:
        files, drops = self.server.repositories[name], self.server.drops
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        content, status, headers = files[path], 200, {}
        size = len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or size - 1), size - 1)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        headers |= {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(files[path]) & 0xFFFFFFFF:x}"'}
        cut = path.endswith(".parquet") and self.command == "GET" and drops.get(name, 0) > 0
        if cut:
            drops[name] -= 1
        self._send(status, content, headers | {"Accept-Ranges": "bytes"}, cut=cut)

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: bool = False):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def log_message(self, *args):
        pass


def _entries(files: Mapping[str, bytes], folder: str) -> list[dict]:
    """The tree below a folder, as the hub lists it."""
    inside = [path for path in files if path.startswith(f"{folder}/" if folder else "")]
    folders = {
        "/".join(path.split("/")[:i]) for path in inside for i in range(1, path.count("/") + 1)
    }
    oid = COMMIT
    found = [
        {"type": "directory", "path": path, "oid": oid, "size": 0}
        for path in sorted(folders)
        if path != folder
    ]
    return found + [
        {"type": "file", "path": path, "oid": oid, "size": len(files[path])} for path in inside
    ]


@contextlib.contextmanager
def serve(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repositories)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
