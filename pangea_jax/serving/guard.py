"""What every request passes first: the host's name, the key, limits of the body, and a log line without texts."""

import asyncio
import contextlib
import hmac
import logging
import time
import traceback
from collections.abc import Collection
from typing import Any

from pangea_jax.serving.faults import Fault
from pangea_jax.serving.inputs import Limits
from pangea_jax.serving.meters import Meters

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
# The page and the health of the server hold no answers.
_OPEN = ("/", "/health")
_log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware.

    Args:
      key: that callers must give as `Authorization: Bearer KEY`; None: no key.
      hosts: names by which the server may be called; None: any. With names, a web page whose own name was made to
        point here (DNS rebinding) is refused.
      most: number of requests that may be open at once.
    """

    def __init__(
        self,
        app: Any,
        *,
        limits: Limits,
        meters: Meters,
        most: int,
        key: str | None = None,
        hosts: Collection[str] | None = None,
    ):
        self._app, self._limits, self._meters, self._most = app, limits, meters, most
        self._key, self._hosts, self._open = key, hosts, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, status = time.monotonic(), 0

        async def note(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._open += 1
        try:
            await self._handle(scope, receive, note)
        except Fault as fault:
            if not status:
                await fault.response()(scope, receive, note)
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("a request failed with %s\n%s", type(error).__name__, where)
            if status:
                raise
            fault = Fault(500, "the server failed; its log says where", code="internal_error")
            await fault.response()(scope, receive, note)
        finally:
            self._open -= 1
            # Of the route, so that callers cannot make up labels.
            path = getattr(scope.get("route"), "path", "other")
            self._meters.requests.labels(path, status).inc()
            _log.info("%s %s %d, %.2f s", scope["method"], path, status, time.monotonic() - begun)

    async def _handle(self, scope, receive, send):
        headers = dict(scope["headers"])
        self._check_host(headers.get(b"host", b""))
        self._check_key(scope["path"], headers.get(b"authorization", b""))
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if self._open > self._most:
            raise Fault(429, "too many open requests", code="overloaded", headers=_RETRY)
        body = await self._read(headers, receive)
        told = False

        async def replay():
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_host(self, host: bytes) -> None:
        if self._hosts is None:
            return
        name = host.decode("latin-1").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if name not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            raise Fault(403, f"this server may be called {known}; see --host", code="unknown_host")

    def _check_key(self, path: str, given: bytes) -> None:
        if self._key is None or path in _OPEN or path.startswith("/page/"):
            return
        scheme, _, key = given.partition(b" ")
        # In constant time, so that answers do not tell how much of a guess was right.
        if not hmac.compare_digest(key.strip(), self._key.encode()) or scheme.lower() != b"bearer":
            raise Fault(
                401,
                "send the server's key as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, headers, receive) -> bytes:
        """The whole body.

        Raises:
          Fault: it is too large, or does not arrive in time.
        """
        most, body = self._limits.body, bytearray()
        fault = Fault(413, f"a body may have {most:,} bytes", code="body_too_large", headers=_CLOSE)
        with contextlib.suppress(ValueError):
            if int(headers.get(b"content-length", b"0")) > most:
                raise fault
        try:
            async with asyncio.timeout(self._limits.upload_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Fault(400, "the client is gone")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise fault
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            said = f"the body did not arrive within {self._limits.upload_seconds:g} s"
            raise Fault(408, said, code="body_too_slow", headers=_CLOSE) from None


_RETRY, _CLOSE = {"Retry-After": "1"}, {"Connection": "close"}
