"""What is fetched from the web: from public addresses alone, and what robots.txt lets a robot have (RFC 9309).

A name is resolved once a request, and the connection goes to an address that was checked: a name that
leads elsewhere a moment later (DNS rebinding) leads nowhere. The certificate is still that of the name.
"""

import dataclasses
import ipaddress
import math
import socket
import threading
import time
import urllib.parse
from concurrent import futures
from typing import NamedTuple

try:
    import protego
    import requests
    import urllib3
except ImportError as error:
    raise ImportError(
        f"{error.name} is missing; run: pip install -r requirements-curation.txt"
    ) from None

USER_AGENT = "pangea_jax"

_MAX_REDIRECTS = 5
_ROBOTS_BYTES = 500 << 10  # of which RFC 9309 asks that they be read
_ROBOTS_SECONDS, _ROBOTS_RETRY_SECONDS = 24 * 3600, 300
_ROBOTS_HOSTS = 4_096


class FetchError(Exception):
    """What could not be fetched, or may not be; the message is a short fixed phrase."""


class Answer(NamedTuple):
    """What a server said.

    Attributes:
      url: where it said so, after redirections.
      content_type: as it says, may be empty.
    """

    status: int
    url: str
    content_type: str
    body: bytes


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Gets what lies behind addresses.

    Attributes:
      timeout: seconds for the whole of it, and as many for the host's robots.txt.
      max_bytes: larger files are given up.
      private: whether addresses of private networks may be asked; a crawl can hold any address.
      robots: whether robots.txt is obeyed. It is read once a day for each host by each process.
      user_agent: who asks. robots.txt can name it; say in it how you can be reached.
      browser: what a browser calls itself, said before that.
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
          FetchError: there are none, they are too many or come too slowly, or may not be fetched.
        """
        answer = self.answer(url)
        if answer.status != 200:
            raise FetchError(f"address answers {answer.status}")
        return answer.body

    def answer(self, url: str) -> Answer:
        """What the server answers, be it an error.

        Raises:
          FetchError: nothing, too much or too slowly, or it may not be asked.
        """
        return self._get(url, robots=self.robots)

    def check(self, url: str) -> None:
        """Whether an address may be asked, without asking it.

        Raises:
          FetchError: it is not of the public web, or robots.txt forbids it.
        """
        self.addresses(url)
        if self.robots:
            self._check_robots(url)

    def addresses(self, url: str) -> list[str]:
        """The addresses of a host, in the order in which they are to be tried.

        Raises:
          FetchError: there are none, or they may not be asked.
        """
        parts = _split(url)
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 443)
        except (OSError, ValueError):  # of names and ports that cannot be any
            raise FetchError("address cannot be reached") from None
        addresses = list(dict.fromkeys(entry[4][0] for entry in found))
        if not self.private and not all(map(_is_public, addresses)):
            raise FetchError("address is private")
        return addresses

    def _get(self, url: str, *, robots: bool, cut_at: float = math.inf) -> Answer:
        """What the server answers; of a body longer than `cut_at` bytes the beginning."""
        deadline = time.monotonic() + self.timeout
        try:
            with requests.Session() as session:
                session.headers["User-Agent"] = f"{self.browser} {self.user_agent}".strip()
                target_of = session.get_redirect_target
                # Where requests sees a redirection, it reads all of the page that tells of it, however long.
                session.get_redirect_target = lambda reply: None
                session.mount("http://", _Pinned(self))
                session.mount("https://", _Pinned(self))
                for _ in range(_MAX_REDIRECTS + 1):
                    _split(url)
                    if robots:
                        self._check_robots(url)
                    with session.get(
                        url, stream=True, allow_redirects=False, timeout=self.timeout
                    ) as reply:
                        target = target_of(reply)
                        if target is None:
                            kind = reply.headers.get("Content-Type", "")
                            body = self._body(reply, deadline, cut_at)
                            return Answer(reply.status_code, reply.url, kind, body)
                        url = urllib.parse.urljoin(url, target)
            raise FetchError("address leads in circles")
        # Addresses of crawls are of every broken kind, which surfaces as errors of several libraries.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError):
            raise FetchError("address cannot be reached") from None

    def _body(self, reply, deadline: float, cut_at: float) -> bytes:
        body = bytearray()
        # What has come so far, not a block filled up: a byte a second must not go on for days.
        while block := reply.raw.read1(1 << 16, decode_content=True):
            body += block
            if len(body) >= cut_at:
                return bytes(body[: int(cut_at)])
            if len(body) > self.max_bytes:
                raise FetchError("file is too large")
            if time.monotonic() > deadline:
                raise FetchError("address is too slow")
        return bytes(body)

    def _check_robots(self, url: str) -> None:
        parts = _split(url)
        try:
            rules = _RULES.of(f"{parts.scheme}://{_host(parts).lower()}", self)
            allowed = rules.can_fetch(url, self.user_agent)
        except ValueError:
            raise FetchError("robots.txt cannot be read") from None
        if not allowed:
            raise FetchError("robots.txt forbids it")

    def read_robots(self, origin: str) -> protego.Protego:
        """The rules of a host.

        Raises:
          FetchError: the host cannot be reached or is out of order, and nothing of it may be fetched.
        """
        answer = self._get(f"{origin}/robots.txt", robots=False, cut_at=_ROBOTS_BYTES)
        if answer.status >= 500 or answer.status == 429:
            raise FetchError("robots.txt cannot be read")
        text = answer.body.decode("utf-8", "replace") if answer.status == 200 else ""
        return protego.Protego.parse(text)


def _split(url: str) -> urllib.parse.SplitResult:
    """
    Raises:
      FetchError: it is no address of the web.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    except ValueError:
        pass
    raise FetchError("address is not of the web")


def _host(parts: urllib.parse.SplitResult) -> str:
    """Host and port as the address has them."""
    return parts.netloc.rpartition("@")[2]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_global


class _Pinned(requests.adapters.HTTPAdapter):
    """Connects to addresses that `fetch` has checked, whatever their name is resolved to next."""

    def __init__(self, fetch: Fetch):
        super().__init__()
        self._fetch, self._address = fetch, ""

    def send(self, request, *arguments, **settings):
        request.headers["Host"] = _host(_split(request.url))
        *others, last = self._fetch.addresses(request.url)
        for self._address in others:
            try:
                return super().send(request, *arguments, **settings)
            except requests.ConnectionError:
                continue
        self._address = last
        return super().send(request, *arguments, **settings)

    def build_connection_pool_key_attributes(self, request, verify, cert=None):
        host, pool = super().build_connection_pool_key_attributes(request, verify, cert)
        if host["scheme"] == "https":  # whom the server must prove to be
            pool = pool | {"server_hostname": host["host"], "assert_hostname": host["host"]}
        return host | {"host": self._address}, pool


class _Rules:
    """The robots.txt of hosts; each is read by one thread, for which the others wait."""

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
                with self._lock:  # a host that is out of order may soon be well again
                    self._of[key] = now - _ROBOTS_SECONDS + _ROBOTS_RETRY_SECONDS, rules
        return rules.result()


_RULES = _Rules()
