"""Fetches from the web: only from public addresses, and only what robots.txt allows (RFC 9309).

Each request looks up its host name once and connects to the address that was checked. So it does not matter if the
name resolves to another address a moment later (DNS rebinding). The certificate is still checked against the name.
"""

import contextlib
import dataclasses
import functools
import ipaddress
import math
import os
import socket
import ssl
import threading
import time
import urllib.parse
from concurrent import futures
from typing import NamedTuple

try:
    import certifi
    import protego
    import urllib3
    from urllib3.util import connection
except ImportError as error:
    raise ImportError(
        f"{error.name} is missing; run: pip install -r requirements-curation.txt"
    ) from None

from pangea_jax.work import transport

USER_AGENT = "pangea_jax"

_MAX_REDIRECTS = 5
_ROBOTS_BYTES = 500 << 10  # RFC 9309 asks a robot to read at least this much
_ROBOTS_SECONDS, _ROBOTS_RETRY_SECONDS = 24 * 3600, 300
_ROBOTS_HOSTS = 4_096
_LOOK_UPS = threading.BoundedSemaphore(512)  # reached only if the resolver hangs

# What IANA's registries of special-purpose addresses take out of the public ones, and multicast. The list is ours
# because `ipaddress` answers differently in every release of Python.
_SPECIAL_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
# Global unicast, all that is given out. Loopback, local, multicast and other NAT64 addresses lie outside.
_UNICAST_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = tuple(
    map(
        ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")
    )  # Teredo is in the first
)
# IPv6 networks whose addresses hold an IPv4 address, and the number of bits behind it: mapped (RFC 4291) and an older
# form, NAT64 (RFC 6052), 6to4 (RFC 3056).
_AROUND_IPV4 = tuple(
    (ipaddress.IPv6Network(network), bits)
    for network, bits in (
        ("::ffff:0:0/96", 0),
        ("::/96", 0),
        ("64:ff9b::/96", 0),
        ("2002::/16", 80),
    )
)
# Bits 32 to 63 of an ISATAP address (RFC 5214), whose last 32 bits are an IPv4 address.
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


class FetchError(Exception):
    """An address cannot or must not be fetched. The message is a short fixed phrase."""


class Answer(NamedTuple):
    """A server's answer.

    Attributes:
      url: the address that answered, after redirections.
      content_type: as the server states it; may be empty.
    """

    status: int
    url: str
    content_type: str
    body: bytes


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Fetches addresses.

    Attributes:
      timeout: seconds for one fetch, including the look-up of the name, redirections and all addresses of
        the host. Each host's robots.txt gets as many seconds again.
      max_bytes: maximum size of a file.
      private: whether addresses of private networks are allowed. A crawl can contain any address.
      robots: whether robots.txt is obeyed. Each process reads it once a day for each host.
      user_agent: the name that robots.txt can address. Say in it how you can be reached.
      browser: a browser's user agent, sent before `user_agent`.
    """

    timeout: float = 20.0
    max_bytes: int = 32 << 20
    private: bool = False
    robots: bool = True
    user_agent: str = USER_AGENT
    browser: str = ""

    def __call__(self, url: str) -> bytes:
        """The bytes behind an address.

        Raises:
          FetchError: see `answer`, or the status is not 200.
        """
        answer = self.answer(url)
        if answer.status != 200:
            raise FetchError(f"address answers {answer.status}")
        return answer.body

    def answer(self, url: str) -> Answer:
        """The server's answer, with any status.

        Raises:
          FetchError: there is no answer, it is too large or too slow, or the address is not allowed.
        """
        return self._get(url, robots=self.robots)

    def check(self, url: str) -> None:
        """Checks an address without fetching it.

        Raises:
          FetchError: the address is not public, or robots.txt forbids it.
        """
        self.addresses(url)
        if self.robots:
            self._check_robots(url)

    def addresses(self, url: str, seconds: float | None = None) -> list[str]:
        """The IP addresses of a host, in the order to try them.

        Args:
          seconds: time for the look-up; by default `timeout`.

        Raises:
          FetchError: there are none, the look-up takes too long, or one of them is private.
        """
        parts = _split(url)
        seconds = self.timeout if seconds is None else seconds
        try:
            found = _look_up(parts.hostname, parts.port or 443, seconds)
        except (OSError, ValueError):  # invalid names and ports
            raise FetchError("address cannot be reached") from None
        addresses = list(dict.fromkeys(entry[4][0] for entry in found))
        if not self.private and not all(map(_is_public, addresses)):
            raise FetchError("address is private")
        return addresses

    def _get(self, url: str, *, robots: bool, cut_at: int | None = None) -> Answer:
        """The answer. With `cut_at`, the body is cut to that size, and `max_bytes` is ignored."""
        seconds = self.timeout
        for _ in range(_MAX_REDIRECTS + 1):
            _split(url)
            if robots:
                self._check_robots(url)
            with _Deadline(seconds) as deadline:
                found = self._ask(url, deadline, cut_at)
            if isinstance(found, Answer):
                return found
            url, seconds = found, deadline.seconds_left
        raise FetchError("address leads in circles")

    def _ask(self, url: str, deadline: "_Deadline", cut_at: int | None) -> Answer | str:
        """The server's answer, or the address that it redirects to."""
        agent = f"{self.browser} {self.user_agent}".strip()
        headers = urllib3.make_headers(accept_encoding=True, user_agent=agent) | {"Accept": "*/*"}
        try:
            with _pinned(self, url, deadline) as manager:
                # Without urllib3's redirections, which would not be checked.
                reply = manager.urlopen(
                    "GET",
                    url,
                    headers=headers,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    timeout=deadline.seconds_left,
                )
                with contextlib.closing(reply):
                    deadline.check()  # the headers may have been cut off
                    target = reply.get_redirect_location()
                    if target:
                        target = target.encode("latin-1").decode("utf-8", "replace")
                        return urllib.parse.urljoin(url, target)
                    kind = reply.headers.get("Content-Type", "")
                    return Answer(reply.status, url, kind, self._body(reply, deadline, cut_at))
        # Crawled addresses have all kinds of faults, for which the libraries raise different errors.
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            deadline.check()
            raise FetchError("address cannot be reached") from None

    def _body(self, reply, deadline: "_Deadline", cut_at: int | None) -> bytes:
        body = bytearray()
        # read1 returns what has arrived; read would wait until the block is full, perhaps for days.
        while block := reply.read1(1 << 16, decode_content=True):
            body += block
            if cut_at is not None and len(body) >= cut_at:
                return bytes(body[:cut_at])
            if cut_at is None and len(body) > self.max_bytes:
                raise FetchError("file is too large")
            deadline.check()
        deadline.check()  # if the deadline closed the connection, the body only seems complete
        return bytes(body)

    def _check_robots(self, url: str) -> None:
        parts = _split(url)
        host = parts.netloc.rpartition("@")[2].lower()
        try:
            allowed = _RULES.of(f"{parts.scheme}://{host}", self).can_fetch(url, self.user_agent)
        except ValueError:
            raise FetchError("robots.txt cannot be read") from None
        if not allowed:
            raise FetchError("robots.txt forbids it")

    def read_robots(self, origin: str) -> protego.Protego:
        """The rules of a host.

        Raises:
          FetchError: the host has an error or cannot be reached, so nothing may be fetched from it.
        """
        answer = self._get(f"{origin}/robots.txt", robots=False, cut_at=_ROBOTS_BYTES)
        if answer.status >= 500 or answer.status == 429:
            raise FetchError("robots.txt cannot be read")
        text = answer.body.decode("utf-8", "replace") if answer.status == 200 else ""
        try:
            return protego.Protego.parse(text)
        except ValueError:
            raise FetchError("robots.txt cannot be read") from None


def _split(url: str) -> urllib.parse.SplitResult:
    """
    Raises:
      FetchError: it is not an address with http or https.
    """
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    raise FetchError("address is not of the web")


def _look_up(host: str, port: int, seconds: float) -> list[tuple]:
    """`socket.getaddrinfo` in a thread. The call cannot be stopped, so the thread is left alone after a timeout.

    Raises:
      FetchError: a timeout, or too many threads hang already.
      OSError, ValueError: there is no such name.
    """
    end, found = time.monotonic() + seconds, futures.Future()

    def look_up():
        try:
            found.set_result(socket.getaddrinfo(host, port))
        except BaseException as error:
            found.set_exception(error)
        finally:
            _LOOK_UPS.release()

    if _LOOK_UPS.acquire(timeout=max(0.0, seconds)):
        threading.Thread(target=look_up, daemon=True).start()
        futures.wait([found], end - time.monotonic())
    if not found.done():
        raise FetchError("name is not looked up in time")
    return found.result()


def _is_public(address: str) -> bool:
    """Whether an IP address is public. An IPv6 address around an IPv4 address is judged by that one.

    The answer depends on the address alone: it is the same on every machine and every Python.

    >>> _is_public("192.168.0.7"), _is_public("::ffff:192.168.0.7"), _is_public("2606:4700::1111")
    (False, False, True)
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if parsed.version == 4:
        return not any(parsed in network for network in _SPECIAL_IPV4)
    if parsed.scope_id:  # it has a meaning on this machine only
        return False
    number = int(parsed)
    for network, behind in _AROUND_IPV4:
        if parsed in network:
            return _is_public(str(ipaddress.IPv4Address(number >> behind & 0xFFFF_FFFF)))
    if parsed not in _UNICAST_IPV6 or any(parsed in network for network in _SPECIAL_IPV6):
        return False
    inside = str(ipaddress.IPv4Address(number & 0xFFFF_FFFF))
    return number >> 32 & 0xFFFF_FFFF not in _ISATAP or _is_public(inside)


class _Deadline(transport.Deadline):
    def check(self) -> None:
        """
        Raises:
          FetchError: the time limit is over.
        """
        if self.is_over or self.seconds_left <= 0:
            raise FetchError("address is too slow")


def _pinned(fetch: Fetch, url: str, deadline: _Deadline) -> urllib3.PoolManager:
    """Connects to `url` only at addresses that `fetch` has checked."""

    class Pinned(urllib3.connection.HTTPConnection):
        def _new_conn(self) -> socket.socket:
            addresses = fetch.addresses(url, deadline.seconds_left)
            for number, address in enumerate(addresses, 1):
                deadline.check()
                # Each address has its share of the time, so that one without an answer does not use it up.
                share = deadline.seconds_left / (len(addresses) + 1 - number)
                try:
                    line = connection.create_connection((address, self.port), share)
                except OSError:
                    if number == len(addresses):
                        raise
                else:
                    deadline.watch(line)
                    return line

    class PinnedTLS(Pinned, urllib3.connection.HTTPSConnection):
        pass

    manager = urllib3.PoolManager(
        ssl_context=_trust(os.environ.get("REQUESTS_CA_BUNDLE") or certifi.where())
    )
    manager.pool_classes_by_scheme = {
        "http": type("Pool", (urllib3.HTTPConnectionPool,), {"ConnectionCls": Pinned}),
        "https": type("Pool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": PinnedTLS}),
    }
    return manager


@functools.cache
def _trust(certificates: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates)


class _Rules:
    """The robots.txt of hosts. One thread reads a host's rules, and the others wait for it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._of: dict[tuple, tuple[float, futures.Future]] = {}

    def of(self, origin: str, fetch: Fetch) -> protego.Protego:
        key, now = (origin, fetch.private, fetch.user_agent), time.monotonic()
        with self._lock:
            since, rules = self._of.get(key, (-math.inf, None))
            is_first = now - since > _ROBOTS_SECONDS
            if is_first:
                rules = futures.Future()
                self._of.pop(key, None)
                self._of[key] = now, rules
                if len(self._of) > _ROBOTS_HOSTS:
                    del self._of[next(iter(self._of))]
        if is_first:
            try:
                rules.set_result(fetch.read_robots(origin))
            except BaseException as error:
                rules.set_exception(error)
                with self._lock:  # the host may soon work again
                    self._of[key] = now - _ROBOTS_SECONDS + _ROBOTS_RETRY_SECONDS, rules
        error = rules.exception()
        if isinstance(error, FetchError):
            raise FetchError(str(error))  # a new one, since raising an error extends its traceback
        return rules.result()


_RULES = _Rules()
