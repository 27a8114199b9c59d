"""HTTP within limits: of time and size for a whole answer, and of where it may lead.

HTTP libraries limit each read. So a server that sends a byte now and then keeps a call for ever, and one that sends
without end fills the memory. Here the limits hold for a whole answer, from connecting to its last byte.
"""

import contextlib
import json
import socket
import sys
import threading
import time
import zlib
from typing import Any

MAX_BYTES = 64 << 20
"""Maximum size of an answer, as sent and inflated. Completions have some kB, a batch of embeddings some MB."""

_MAX_REDIRECTS = 5
# A status that the openai package does not try again, and raises as UnprocessableEntityError.
_REFUSED = 422
_GZIP = ("gzip", "x-gzip", "deflate")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_BLOCK = 1 << 20


class Deadline:
    """Closes connections after a time limit, also if a slow server sends a byte now and then."""

    def __init__(self, seconds: float):
        self._end, self.is_over = time.monotonic() + seconds, False
        self._lock, self._sockets = threading.Lock(), []
        self._timer = threading.Timer(max(0.0, seconds), self._hang_up)
        self._timer.daemon = True

    def __enter__(self):
        self._timer.start()
        return self

    def __exit__(self, *_):
        self._timer.cancel()
        with self._lock:
            for line in self._sockets:
                line.close()
            self._sockets.clear()

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def watch(self, line: socket.socket) -> None:
        """Adds a connection. A copy of its socket is kept, since TLS may take over the original."""
        with self._lock:
            self._sockets.append(line.dup())
        if self.is_over:
            self._hang_up()

    def _hang_up(self) -> None:
        self.is_over = True
        with self._lock:
            for line in self._sockets:
                with contextlib.suppress(OSError):  # already closed
                    line.shutdown(socket.SHUT_RDWR)


class _LimitError(Exception):
    """An answer breaks a limit."""


def limited(kind: type, seconds: float, max_bytes: int = MAX_BYTES) -> type:
    """A subclass of a client of httpx whose answers are whole and within limits.

    An answer that takes longer than `seconds` raises the ReadTimeout of httpx, and the openai package tries again. An
    answer that is larger than `max_bytes`, as sent or inflated, or that leads to another host becomes one with an error
    status that says so, which the package does not try again.

    Args:
      kind: `openai.DefaultHttpxClient`, whose base is a class of httpx or of httpx2.
    """
    library = sys.modules[
        next(c for c in kind.__mro__ if c.__name__ == "Client").__module__.split(".")[0]
    ]

    class Limited(kind):
        def send(self, request, **settings):
            settings |= {"stream": True, "follow_redirects": False}
            with Deadline(seconds) as deadline:

                def watch(event, info):
                    if event == "connection.connect_tcp.complete":
                        deadline.watch(info["return_value"].get_extra_info("socket"))

                try:
                    return self._follow(request, settings, watch)
                except _LimitError as error:
                    body = json.dumps({"error": {"message": str(error)}}).encode()
                    headers = {"Content-Type": "application/json"}
                    return library.Response(
                        _REFUSED, headers=headers, content=body, request=request
                    )
                except Exception:
                    if not deadline.is_over:
                        raise
                    said = f"no whole answer within {seconds:g} s"
                    raise library.ReadTimeout(said, request=request) from None

        def _follow(self, request, settings, watch):
            for _ in range(_MAX_REDIRECTS + 1):
                request.extensions["trace"] = watch
                # `watch` would not see a connection that is used again.
                request.headers.update({"Connection": "close", "Accept-Encoding": "gzip"})
                reply = super().send(request, **settings)
                with contextlib.closing(reply):
                    target = reply.next_request
                    if target is None:
                        return _whole(reply, max_bytes)
                    if not _is_same_host(request.url, target.url):
                        raise _LimitError(
                            f"{_place(request.url)} leads to {_place(target.url)} and is not followed; if you trust "
                            "that host, give its address"
                        )
                    request = target
            raise _LimitError(f"{_place(request.url)} leads in circles")

    return Limited


def _place(url: Any) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"[:100]


def _is_same_host(first: Any, second: Any) -> bool:
    """Whether a redirection stays on its host and port; it may go from plain HTTP to TLS, but not back."""
    ports = {"http": 80, "https": 443}
    upgraded = (first.scheme, second.scheme) == ("http", "https")
    at_default = {first.port or 80, second.port or 443} == {80, 443}
    same_port = first.scheme == second.scheme and (first.port or ports.get(first.scheme)) == (
        second.port or ports.get(second.scheme)
    )
    return first.host == second.host and (same_port or (upgraded and at_default))


def _whole(reply: Any, max_bytes: int) -> Any:
    """An answer with its body, which is read and inflated within limits.

    Raises:
      _LimitError: it is too large, or compressed in another way than was asked for.
      zlib.error: it is damaged.
    """
    encoding = reply.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "", *_GZIP):
        raise _LimitError(f"the answer is compressed as {encoding[:40]!r}, which was not asked for")
    inflater = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding in _GZIP else None
    body, received = bytearray(), 0
    for block in reply.iter_raw():
        received += len(block)
        while block and max(received, len(body)) <= max_bytes:
            if inflater is None:
                body += block
                break
            body += inflater.decompress(block, _BLOCK)
            block = inflater.unconsumed_tail
        if max(received, len(body)) > max_bytes:
            raise _LimitError(f"the answer is over the limit of {max_bytes >> 20} MiB")
    own = ("content-encoding", "content-length", "transfer-encoding")
    headers = [
        (name, value) for name, value in reply.headers.raw if name.decode().lower() not in own
    ]
    return type(reply)(
        reply.status_code, headers=headers, content=bytes(body), request=reply.request
    )
