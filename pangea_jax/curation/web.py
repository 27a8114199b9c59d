"""What is fetched from the web: from public addresses alone, and what robots.txt lets a robot have (RFC 9309).

A name is resolved once a request, and the connection goes to an address that was checked: a name that
leads elsewhere a moment later (DNS rebinding) leads nowhere. The certificate is still that of the name.
"""

import contextlib
import dataclasses
import ipaddress
import math
import os
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
_LOOK_UPS = threading.BoundedSemaphore(512)  # more than are under way unless a resolver hangs

# The last 32 bits of these lead to that IPv4 address: of NAT64 (RFC 6052), and as the first hosts wrote it.
_OVER_IPV4 = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")


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
      timeout: seconds for the whole of it, looking up the name, redirections and all of a host's addresses
        included, and as many for each host's robots.txt.
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

    def addresses(self, url: str, seconds: float | None = None) -> list[str]:
        """The addresses of a host, in the order in which they are to be tried.

        Args:
          seconds: to look them up in; by default `timeout`.

        Raises:
          FetchError: there are none, not in time, or they may not be asked.
        """
        parts = _split(url)
        seconds = self.timeout if seconds is None else seconds
        try:
            found = _look_up(parts.hostname, parts.port or 443, seconds)
        except (OSError, ValueError):  # of names and ports that cannot be any
            raise FetchError("address cannot be reached") from None
        addresses = list(dict.fromkeys(entry[4][0] for entry in found))
        if not self.private and not all(map(_is_public, addresses)):
            raise FetchError("address is private")
        return addresses

    def _get(self, url: str, *, robots: bool, cut_at: float = math.inf) -> Answer:
        """What the server answers; of a body longer than `cut_at` bytes the beginning."""
        seconds = self.timeout
        with requests.Session() as session:
            # Not what the environment says: ~/.netrc has passwords, and a proxy looks up names again.
            session.trust_env = False
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            # Where requests sees a redirection, it reads all of the page that tells of it, however long.
            session.get_redirect_target = lambda reply: None
            session.headers["User-Agent"] = f"{self.browser} {self.user_agent}".strip()
            for _ in range(_MAX_REDIRECTS + 1):
                _split(url)
                if robots:
                    self._check_robots(url)
                with _Deadline(seconds) as deadline:
                    found = self._ask(session, url, deadline, cut_at)
                if isinstance(found, Answer):
                    return found
                url, seconds = found, deadline.seconds_left
        raise FetchError("address leads in circles")

    def _ask(self, session, url: str, deadline: "_Deadline", cut_at: float) -> Answer | str:
        """What the server answers, or the address that it sends us to."""
        try:
            with contextlib.closing(_Pinned(self, deadline)) as pinned:
                session.mount("http://", pinned)
                session.mount("https://", pinned)
                with session.get(url, stream=True, allow_redirects=False) as reply:
                    deadline.check()  # headers may have been cut off
                    target = requests.Session.get_redirect_target(session, reply)
                    if target is not None:
                        return urllib.parse.urljoin(url, target)
                    kind = reply.headers.get("Content-Type", "")
                    body = self._body(reply, deadline, cut_at)
                    return Answer(reply.status_code, reply.url, kind, body)
        # Addresses of crawls are of every broken kind, which surfaces as errors of several libraries.
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError):
            deadline.check()
            raise FetchError("address cannot be reached") from None

    def _body(self, reply, deadline: "_Deadline", cut_at: float) -> bytes:
        body = bytearray()
        # What has come so far, not a block filled up: a byte a second must not go on for days.
        while block := reply.raw.read1(1 << 16, decode_content=True):
            body += block
            if len(body) >= cut_at:
                return bytes(body[: int(cut_at)])
            if len(body) > self.max_bytes:
                raise FetchError("file is too large")
            deadline.check()
        deadline.check()  # that we have hung up looks like the end of a body
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
        try:
            return protego.Protego.parse(text)
        except ValueError:
            raise FetchError("robots.txt cannot be read") from None


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


def _look_up(host: str, port: int, seconds: float) -> list[tuple]:
    """`socket.getaddrinfo`, which nothing can stop: when the time is over, its thread is left to itself.

    Raises:
      FetchError: the time is over, or so many threads have been left that no other is started.
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
    """Whether an address is of the public web; one that leads to an IPv4 address if that is, too."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return parsed.is_global
    if parsed.ipv4_mapped:
        return parsed.ipv4_mapped.is_global
    inner = parsed.sixtofour
    if any(parsed in network for network in _OVER_IPV4):
        inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
    return parsed.is_global and (inner is None or inner.is_global)


class _Deadline:
    """Hangs up when the time is over: a server that sends a byte now and then never times out by itself."""

    def __init__(self, seconds: float):
        self._end, self._is_over = time.monotonic() + seconds, False
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

    def check(self) -> None:
        """
        Raises:
          FetchError: the time is over.
        """
        if self._is_over or self.seconds_left <= 0:
            raise FetchError("address is too slow")

    def watch(self, line: socket.socket) -> None:
        """Hangs up on this connection too, also once TLS has taken its socket over."""
        with self._lock:
            self._sockets.append(line.dup())
        if self._is_over:
            self._hang_up()

    def _hang_up(self) -> None:
        self._is_over = True
        with self._lock:
            for line in self._sockets:
                with contextlib.suppress(OSError):  # they were quicker
                    line.shutdown(socket.SHUT_RDWR)


class _Pinned(requests.adapters.HTTPAdapter):
    """Connects to addresses that `fetch` has checked, whatever their name is resolved to next."""

    def __init__(self, fetch: Fetch, deadline: _Deadline):
        super().__init__()
        self._fetch, self._deadline, self._address = fetch, deadline, ""

    def send(self, request, *arguments, **settings):
        request.headers["Host"] = _host(_split(request.url))
        addresses = self._fetch.addresses(request.url, self._deadline.seconds_left)
        for number, self._address in enumerate(addresses):
            self._deadline.check()
            # One that is silent leaves the others their share of the time.
            left = self._deadline.seconds_left
            settings["timeout"] = left / (len(addresses) - number), left
            try:
                return super().send(request, *arguments, **settings)
            except requests.ConnectionError:
                if number == len(addresses) - 1:
                    raise

    def get_connection_with_tls_context(self, *arguments, **settings):
        pool = super().get_connection_with_tls_context(*arguments, **settings)
        deadline = self._deadline

        class Connection(type(pool).ConnectionCls):
            def _new_conn(self):
                line = super()._new_conn()
                deadline.watch(line)
                return line

        pool.ConnectionCls = Connection
        return pool

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
        error = rules.exception()
        if isinstance(error, FetchError):  # each its own: a traceback grows where it is raised
            raise FetchError(str(error))
        return rules.result()


_RULES = _Rules()
