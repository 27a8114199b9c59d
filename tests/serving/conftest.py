"""A real server on loopback, with the sample model, for all tests of this folder."""

import contextlib
import dataclasses
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the server is in requirements-serve.txt")

import httpx2 as httpx

import pangea_jax
import pangea_jax.generate.engine
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.serving import app
from pangea_jax.serving.inputs import Limits

LIMITS = Limits(prompt=256, answer=64, body=1 << 20, pictures=2, pixels=1_000_000, waiting=2)
ROWS = 2


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs, its engine, and a client of it."""

    url: str
    engine: pangea_jax.generate.engine.Engine
    client: httpx.Client
    limits: Limits

    def post(self, path: str = "/v1/chat/completions", **body):
        return self.client.post(path, json={"model": "sample", **body})

    def meter(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"pangea_{name}"))


@contextlib.contextmanager
def running(engine, limits=LIMITS, **settings):
    """Serves an engine in a thread of this process."""
    line = socket.socket()
    line.bind(("127.0.0.1", 0))
    application = app.make(engine, "sample", limits, rows=ROWS, **settings)
    server = uvicorn.Server(uvicorn.Config(application, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
    thread.start()
    url = f"http://127.0.0.1:{line.getsockname()[1]}"
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx.Client(base_url=url, timeout=120) as client:
            yield Server(url, engine, client, limits)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def engine():
    return pangea_jax.load("sample")


@pytest.fixture(scope="session")
def server(engine):
    with running(engine) as found:
        yield found


@pytest.fixture(scope="session")
def drawing() -> bytes:
    return SampleStore().image("twemoji/1f408")
