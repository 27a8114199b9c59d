"""Fetching from servers on loopback: limits, private networks, names that lead elsewhere, robots.txt."""

import contextlib
import http.server
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from concurrent import futures

import pytest

pytest.importorskip("urllib3", reason="urllib3 is in requirements-curation.txt")
pytest.importorskip("protego", reason="Protego is in requirements-curation.txt")

from urllib3.util import connection

from pangea_jax.curation import web
from pangea_jax.curation.web import Fetch, FetchError


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/circle"):
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        moved = self.path == "/moved"
        self.send_response(302 if moved else 200)
        self.send_header("Location", "plain")
        self.end_headers()
        for _ in range(50):
            try:
                self.wfile.write(b"x" * 100)
                self.wfile.flush()
            except OSError:
                return
            if self.path in ("/slow", "/moved"):
                time.sleep(0.1)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()
    found.server_close()


def test_a_picture_is_fetched(server):
    assert Fetch(private=True)(f"{server}/plain") == b"x" * 5000


@pytest.mark.parametrize("path", ["/slow", "/moved"])
def test_a_slow_answer_takes_no_longer_than_the_timeout(server, path):
    began = time.monotonic()
    with contextlib.suppress(FetchError):
        Fetch(private=True, timeout=0.5)(server + path)
    assert time.monotonic() - began < 3  # of the 5 s that the server would take


def test_of_a_redirection_only_the_address_is_read(server):
    assert Fetch(private=True)(f"{server}/moved") == b"x" * 5000


@pytest.mark.parametrize(
    ("path", "settings", "problem"),
    [
        ("/plain", {"max_bytes": 4000}, "too large"),
        ("/slow", {"timeout": 0.2}, "too slow"),
        ("/circle", {}, "circles"),
        ("/plain", {"private": False}, "private"),
    ],
)
def test_what_cannot_be_fetched_says_why(server, path, settings, problem):
    with pytest.raises(FetchError, match=problem):
        Fetch(**({"private": True} | settings))(server + path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://",
        "http://[::1",
        "",
        "http://a b/",
        "//x/y",
    ],
)
def test_addresses_of_every_broken_kind(url):
    with pytest.raises(FetchError):
        Fetch(private=True, timeout=1.0)(url)


@pytest.mark.parametrize(
    "address", ["10.0.0.1", "169.254.169.254", "::1", "192.168.0.7", "::ffff:10.0.0.1"]
)
def test_private_networks_are_not_asked(monkeypatch, address):
    found = [(0, 0, 0, "", (a, 80)) for a in ("93.184.215.14", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    with pytest.raises(FetchError, match="private"):
        Fetch()("http://looks-public.example/1.jpg")
    with pytest.raises(FetchError, match="private"):
        Fetch().check("http://looks-public.example/1.jpg")


@pytest.mark.parametrize("address", ["10.0.0.1", "93.184.215.14"])
@pytest.mark.parametrize("network", ["::", "64:ff9b::", "::ffff:0:0", "2002::"])
def test_addresses_that_lead_to_ipv4_are_judged_by_where_they_lead(monkeypatch, network, address):
    inner = int(ipaddress.IPv4Address(address)) << (80 if network == "2002::" else 0)
    outer = ipaddress.IPv6Address(int(ipaddress.IPv6Address(network)) + inner)
    found = [(0, 0, 0, "", (str(outer), 80, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    private = address.startswith("10.")
    with pytest.raises(FetchError, match="private") if private else contextlib.nullcontext():
        assert Fetch().addresses("http://looks-public.example/1.jpg") == [str(outer)]


SPECIAL = (
    "0.0.0.0 0.1.2.3 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.0.1 169.254.169.254 172.16.0.1 "
    "172.31.255.255 192.0.0.8 192.0.0.170 192.0.2.1 192.88.99.1 192.168.255.255 198.18.0.1 198.19.255.255 "
    "198.51.100.7 203.0.113.255 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 "
    # Loopback, unspecified, link-local and site-local, unique local, multicast, discard-only, documentation.
    ":: ::1 fe80::1 fe80::1%eth0 febf::1 fec0::1 feff::1 fc00::1 fdff::1 ff02::1 ff0e::1 100::1 2001:db8::1 3fff::1 "
    # Teredo, benchmarks, ORCHID, segment routing, a zone on a public address.
    "2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 5f00::1 2606:4700::1111%1 "
    # IPv4 inside IPv6: mapped, compatible, NAT64 of both kinds, 6to4, translated, ISATAP.
    "::ffff:127.0.0.1 ::ffff:169.254.169.254 ::ffff:224.0.0.1 ::ffff:100.64.0.1 ::127.0.0.1 64:ff9b::10.0.0.1 "
    "64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1::8.8.8.8 2002:7f00:1:: 2002:a00:1::1 2002:e000:1::1 "
    "::ffff:0:8.8.8.8 2607:f8b0::5efe:10.0.0.1 2607:f8b0::200:5efe:127.0.0.1"
)
GLOBAL = (
    "1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 "
    "172.15.255.255 172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 223.255.255.255 "
    "2606:4700::1111 2a00:1450:4001::1 2001:4860:4860::8888 2001:200::1 2003::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 "
    "2002:808:808::1 2607:f8b0::5efe:8.8.8.8"
)


@pytest.mark.parametrize("address", SPECIAL.split())
def test_an_address_that_is_not_public(address):
    assert not web._is_public(address)


@pytest.mark.parametrize("address", GLOBAL.split())
def test_a_public_address(address):
    assert web._is_public(address)


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "0x7f000001", "1.2.3", "::g", "a b"])
def test_what_is_no_address_is_not_public(text):
    assert not web._is_public(text)


def test_the_decision_asks_nothing_of_python(monkeypatch):
    """Releases of Python differ in what `ipaddress` calls global and private."""
    for kind in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        for name in ("is_global", "is_private", "is_reserved", "is_multicast", "is_link_local"):
            monkeypatch.delattr(kind, name)
    assert web._is_public("8.8.8.8") and not web._is_public("fec0::1")


# Servers that never come to an end


@pytest.fixture
def dripping():
    """Sends a header byte by byte, for ever: of HTTP, for `/go` after a whole redirection, or of TLS."""
    stop, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def drip(line):
        with line, contextlib.suppress(OSError):
            asked = line.recv(4096)
            if asked.startswith(b"GET /go"):
                line.sendall(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n")
                line.recv(4096)
            is_tls = asked.startswith(b"\x16")
            line.sendall(b"\x16\x03\x03\x40\0" if is_tls else b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not stop.wait(0.1):
                line.sendall(b"x")

    def serve():
        with contextlib.suppress(OSError):
            while True:
                line, _ = listener.accept()
                threading.Thread(target=drip, args=(line,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    threading.Timer(5, stop.set).start()  # so that a test that fails comes to an end
    yield listener.getsockname()[1]
    stop.set()
    listener.close()


@pytest.mark.parametrize("robots", [False, True])
@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{}/x", "http://127.0.0.1:{}/go", "https://127.0.0.1:{}/"]
)
def test_headers_that_drip_take_no_longer_than_the_timeout(dripping, address, robots):
    with futures.ThreadPoolExecutor(1) as pool:
        fetch = Fetch(private=True, timeout=0.5, robots=robots)
        call = pool.submit(fetch, address.format(dripping))
        done, _ = futures.wait([call], timeout=3)
        assert done, "still under way"
        with pytest.raises(FetchError, match="address is too slow"):
            call.result()


def test_silent_addresses_share_the_time(monkeypatch):
    dialled = []

    def dial(address, timeout, *more, **settings):
        dialled.append(address[0])
        time.sleep(timeout)
        raise TimeoutError

    found = [(0, 0, 0, "", (f"93.184.215.{n}", 80)) for n in range(5)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    monkeypatch.setattr(connection, "create_connection", dial)
    began = time.monotonic()
    with pytest.raises(FetchError):
        Fetch(timeout=0.5, robots=False)("http://silent.example/1.jpg")
    assert 0.4 < time.monotonic() - began < 1.5
    assert dialled == [f"93.184.215.{n}" for n in range(5)]


# A resolver that hangs


@pytest.fixture
def resolver(monkeypatch):
    """Knows no name until it is told to go on; the threads that wait for it."""
    go_on, waiting = threading.Event(), []

    def hang(*_):
        waiting.append(threading.current_thread())
        go_on.wait(10)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    yield waiting
    go_on.set()
    for thread in waiting:
        thread.join()


@pytest.mark.parametrize("robots", [False, True])
@pytest.mark.parametrize("method", [Fetch.__call__, Fetch.check, Fetch.addresses])
def test_looking_up_a_name_takes_no_longer_than_the_timeout(resolver, method, robots):
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"^name is not looked up in time$"):
        method(Fetch(timeout=0.3, robots=robots), "http://unknown.example/1.jpg")
    assert 0.2 < time.monotonic() - began < 1.5
    assert len(resolver) == 1 and resolver[0].daemon  # an end of the process does not wait for it


def test_a_resolver_that_hangs_does_not_fill_the_process_with_threads(resolver, monkeypatch):
    monkeypatch.setattr(web, "_LOOK_UPS", threading.BoundedSemaphore(3))
    for _ in range(5):
        with pytest.raises(FetchError, match="not looked up in time"):
            Fetch(timeout=0.05).addresses("http://unknown.example/1.jpg")
    assert len(resolver) == 3


# What the environment says


def test_neither_passwords_nor_proxies_of_the_environment_are_used(site, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    site.start()
    assert Fetch(private=True, robots=False)(f"{site.url}/1.jpg") == b"a picture"
    assert site.passwords == [None]


# Names that lead elsewhere a moment later


class Site(http.server.BaseHTTPRequestHandler):
    """Answers with what `server.pages` has for a path, (status, body, headers), and notes who asks."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"], self.headers["User-Agent"]))
        self.server.passwords.append(self.headers["Authorization"])
        status, body, headers = self.server.pages.get(self.path, (404, b"", {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # who has enough hangs up
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    found.asked, found.passwords, found.pages = [], [], {"/1.jpg": (200, b"a picture", {})}
    found.port = found.server_address[1]
    found.url = f"http://127.0.0.1:{found.port}"
    thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
    found.start = lambda: (thread.start(), found)[1]
    yield found
    found.shutdown()
    found.server_close()


PUBLIC = ("93.184.215.14", "93.184.215.15")


@pytest.fixture
def dialled(monkeypatch):
    """pictures.example is public when it is first looked up, and this machine from then on; who is dialled."""
    look_up, dial, looked, dialled = socket.getaddrinfo, connection.create_connection, [], []

    def lying(host, port, *more):
        if host != "pictures.example":
            return look_up(host, port, *more)
        looked.append(host)
        addresses = PUBLIC if len(looked) == 1 else ("127.0.0.1",)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    def noting(address, *more, **settings):
        dialled.append(address)
        if address[0] == PUBLIC[0]:
            raise ConnectionRefusedError
        return dial(("127.0.0.1", address[1]), *more, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", lying)
    monkeypatch.setattr(connection, "create_connection", noting)
    return dialled


def test_a_name_is_looked_up_once_and_what_was_checked_is_dialled(site, dialled):
    site.start()
    body = Fetch(robots=False)(f"http://pictures.example:{site.port}/1.jpg")
    assert body == b"a picture"
    assert dialled == [(address, site.port) for address in PUBLIC]
    assert site.asked == [("/1.jpg", f"pictures.example:{site.port}", "pangea_jax")]


def test_the_certificate_is_still_that_of_the_name(site, dialled, tmp_path, monkeypatch):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not on PATH")
    for name in ("pictures.example", "other.example"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        command += ["-keyout", f"{tmp_path}/{name}.key", "-out", f"{tmp_path}/{name}.pem"]
        subprocess.run(command, check=True, capture_output=True)
    both = "".join((tmp_path / f"{n}.example.pem").read_text() for n in ("pictures", "other"))
    (tmp_path / "both.pem").write_text(both)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "both.pem"))
    named = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda connection, name, context: named.append(name)
    context.load_cert_chain(tmp_path / "pictures.example.pem", tmp_path / "pictures.example.key")
    site.socket = context.wrap_socket(site.socket, server_side=True)
    site.start()
    url = f"https://pictures.example:{site.port}/1.jpg"
    assert Fetch(robots=False)(url) == b"a picture"
    assert named == ["pictures.example"]
    # Another's certificate, of the same trust, is refused.
    context.load_cert_chain(tmp_path / "other.example.pem", tmp_path / "other.example.key")
    with pytest.raises(FetchError, match="cannot be reached"):
        Fetch(robots=False, private=True)(url)
    assert named == ["pictures.example"] * 2 and len(site.asked) == 1


# robots.txt

ROBOTS = b"""User-agent: *
Disallow: /private/
Allow: /private/open/
Disallow: /*.gif$

User-agent: rude_robot
Disallow: /
"""


@pytest.fixture
def ruled(site):
    for path in ("/private/1.jpg", "/private/open/1.jpg", "/1.gif"):
        site.pages[path] = (200, b"a picture", {})
    site.pages["/moved"] = (302, b"", {"Location": "/private/1.jpg"})
    site.pages["/robots.txt"] = (200, ROBOTS, {})
    return site.start()


def paths(site):
    return [path for path, _, _ in site.asked]


@pytest.mark.parametrize("path", ["/1.jpg", "/private/open/1.jpg", "/1.gif?large"])
def test_what_robots_may_have_is_fetched(ruled, path):
    ruled.pages["/1.gif?large"] = ruled.pages["/1.gif"]
    assert Fetch(private=True)(ruled.url + path) == b"a picture"
    assert paths(ruled) == ["/robots.txt", path]


@pytest.mark.parametrize("path", ["/private/1.jpg", "/1.gif"])
def test_what_robots_may_not_have_is_not_asked_for(ruled, path):
    with pytest.raises(FetchError, match=r"^robots\.txt forbids it$"):
        Fetch(private=True)(ruled.url + path)
    assert paths(ruled) == ["/robots.txt"]
    assert Fetch(private=True, robots=False)(ruled.url + path) == b"a picture"


def test_redirections_are_obeyed_as_well(ruled):
    with pytest.raises(FetchError, match="forbids"):
        Fetch(private=True)(f"{ruled.url}/moved")
    assert paths(ruled) == ["/robots.txt", "/moved"]


def test_a_host_out_of_order_gives_an_error_of_its_own_to_each(site):
    site.pages["/robots.txt"] = (503, b"", {})
    site.start()
    depths = set()
    for _ in range(3):
        with pytest.raises(FetchError, match="cannot be read") as caught:
            Fetch(private=True)(f"{site.url}/1.jpg")
        depths.add(len(caught.traceback))
    assert paths(site) == ["/robots.txt"] and len(depths) == 1


def test_rules_are_those_of_the_robot_that_asks(ruled):
    name = "rude_robot/1.0 (+https://robots.example)"
    with pytest.raises(FetchError, match="forbids"):
        Fetch(private=True, user_agent=name)(f"{ruled.url}/1.jpg")
    assert [agent for _, _, agent in ruled.asked] == [name]


def test_robots_txt_is_read_once_for_each_host(ruled):
    fetch = Fetch(private=True)
    with futures.ThreadPoolExecutor(16) as pool:
        assert set(pool.map(fetch, [f"{ruled.url}/1.jpg"] * 64)) == {b"a picture"}
    assert paths(ruled).count("/robots.txt") == 1
    fetch(f"http://localhost:{ruled.port}/1.jpg")  # another host, for all that is known
    assert paths(ruled).count("/robots.txt") == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((404, b"User-agent: *\nDisallow: /", {}), None),
        ((403, b"", {}), None),
        ((503, b"", {}), "robots.txt cannot be read"),
        ((429, b"", {}), "robots.txt cannot be read"),
        ((301, b"", {"Location": "/robots.txt"}), "address leads in circles"),
        ((301, b"", {"Location": "/elsewhere.txt"}), "robots.txt forbids it"),
        ((200, b"\xff\xfe\0 nonsense [" * 9_000, {}), None),
        # Longer than has to be read: what follows is not.
        ((200, b"# comment\n" * 51_200 + b"User-agent: *\nDisallow: /\n", {}), None),
        ((200, b"User-agent: *\nDisallow: /\n" + b"# endless\n" * 5_000_000, {}), "forbids"),
    ],
)
def test_a_host_without_rules_allows_all_and_one_out_of_order_nothing(site, answer, problem):
    site.pages |= {
        "/robots.txt": answer,
        "/elsewhere.txt": (200, b"User-agent: *\nDisallow: /", {}),
    }
    site.start()
    with pytest.raises(FetchError, match=problem) if problem else contextlib.nullcontext():
        assert Fetch(private=True)(f"{site.url}/1.jpg") == b"a picture"
    assert ("/1.jpg" in paths(site)) == (problem is None)
