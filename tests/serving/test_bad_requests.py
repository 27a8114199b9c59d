"""What a request must not hold: a 4xx with a sentence in OpenAI's form, and nothing of the request in the log."""

import base64
import dataclasses
import io
import logging
import struct
import time
import zlib

import pytest
from PIL import Image

from tests.serving.conftest import LIMITS, running

USER = {"role": "user", "content": "What is this?"}


def picture(data, form="data:image/png;base64,"):
    url = form + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def by(url):
    return {"type": "image_url", "image_url": {"url": url}}


def png(width, height):
    """A PNG whose header promises a size; a bomb, if someone believes it."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def small():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("change", "status", "param", "says"),
    [
        ({"model": "gpt-4"}, 404, "model", "this server has 'sample'"),
        ({"colour": 1}, 400, "colour", "does not know the field"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": "What?"}, 400, "messages", "list"),
        ({"messages": None}, 400, "messages", "list"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "required"),
        ({"messages": [USER | {"role": "robot"}]}, 400, "messages[0]", "'user'"),
        ({"messages": [USER | {"content": 3}]}, 400, "messages[0].content", ""),
        ({"messages": [USER | {"content": ""}]}, 400, "messages", "content is empty"),
        ({"messages": [USER | {"images": ["/etc/passwd"]}]}, 400, "messages[0].images", "know"),
        ({"messages": [USER, USER | {"role": "system"}]}, 400, "messages", "last message"),
        ({"messages": [USER | {"content": "\ud800"}]}, 400, "messages", "not Unicode"),
        ({"messages": [USER | {"content": "a " * 400}]}, 400, "messages", "context of 512"),
        ({"messages": [USER | {"content": "a" * 99_999}]}, 400, "messages", "letters"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 65}, 400, "max_tokens", "--max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens", "integer"),
        ({"max_tokens": 10**400}, 400, "max_tokens", ""),
        ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
        ({"top_p": -1}, 400, "top_p", "greater than or equal to 0"),
        ({"seed": 1.5}, 400, "seed", "integer"),
        ({"n": 2}, 400, "n", "only 1 is supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "only 0 is supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "only [] is supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "supported"),
        ({"stop": [""]}, 400, "stop", ""),
        ({"stop": ""}, 400, "stop", "empty"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "only with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "only with stream"),
        (content(by("file:///etc/passwd")), 400, "messages[0].content[0].image_url", "data:"),
        (content(by("/etc/passwd")), 400, "messages[0].content[0].image_url", "data:"),
        (content(by("http://127.0.0.1/")), 400, "messages[0].content[0].image_url", "addresses"),
        (content(by("data:image/png;base64,%%")), 400, "messages[0].content[0].image_url", "valid"),
        (content({"type": "image", "image": "/etc/passwd"}), 400, "messages[0].content[0]", ""),
        (content(picture(b"GIF89a")), 400, "messages[0].content[0].image_url", "decoded"),
        (content(picture(small()[:45])), 400, "messages", "decoded"),
        (content(picture(png(8000, 6250))), 400, "messages[0].content[0].image_url", "pixels"),
        (content(picture(png(900, 900))), 400, "messages", "decoded"),
        (content(*[picture(small())] * 3), 400, "messages[0].content[2].image_url", "2 pictures"),
        ({"messages": [USER | {"content": "a" * (1 << 20)}]}, 413, None, "1,048,576 bytes"),
    ],
)
def test_a_bad_chat(server, change, status, param, says):
    body = {"messages": [USER]} | change
    if body["messages"] == [USER | {"content": "\ud800"}]:
        raw = '{"model":"sample","messages":[{"role":"user","content":"\\ud800"}]}'
        check(send(server, raw.encode()), status, param, says)
    else:
        check(server.post(**body), status, param, says)


def send(server, raw, path="/v1/chat/completions", **headers):
    headers = {"Content-Type": "application/json"} | headers
    return server.client.post(path, content=raw, headers=headers)


def check(reply, status, param, says):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 700


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
        ({"prompt": [99_999]}, "prompt", "not below"),
        ({"prompt": [3, -1]}, "prompt[1]", "or equal to 0"),
        ({"prompt": "a b c d " * 80}, "prompt", "context of 512"),
        ({"prompt": ["a"] * 99}, "prompt", "at most 4 prompts"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"suffix": "x"}, "suffix", "supported"),
        ({"best_of": 3}, "best_of", "only 1 is supported"),
    ],
)
def test_a_bad_completion(server, change, param, says):
    check(server.post("/v1/completions", **({"prompt": "a"} | change)), 400, param, says)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"model": "\xff"}', "JSON"),
        (b"[" * 200_000, "JSON"),
        (
            b'{"model": "sample", "messages": [{"role": "user", "content": "a"}], "top_p": NaN}',
            "top_p",
        ),
    ],
)
def test_a_body_that_is_no_json(server, raw, says):
    reply = send(server, raw)
    assert reply.status_code == 400
    assert says in reply.json()["error"]["message"]


def test_other_bodies_and_paths(server):
    for reply, status in (
        (send(server, b"{}", **{"Content-Type": "text/plain"}), 400),  # a form of another site
        (server.client.get("/v1/nothing"), 404),
        (server.client.get("/v1/chat/completions"), 405),
        (server.client.get("/v1/models/gpt-4"), 404),
    ):
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_others_are_unaffected(server):
    """After all of the above."""
    assert server.client.get("/health").json() == {"status": "ok", "model": "sample"}
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "sample" and model["max_model_len"] == 512
    assert server.client.get("/v1/models/sample").json() == model
    assert server.post(messages=[USER], max_tokens=2).status_code == 200
    assert server.meter("waiting_requests") == 0


def test_a_key_is_asked_for(engine):
    with running(engine, key="secret", hosts={"127.0.0.1"}) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            reply = server.client.get("/v1/models", headers=headers)
            check(reply, 401, None, "Authorization")
            assert server.client.get("/metrics", headers=headers).status_code == 401
        assert server.client.get("/health").status_code == 200
        right = {"Authorization": "Bearer secret"}
        assert server.client.get("/v1/models", headers=right).status_code == 200
        other = server.client.get("/health", headers={"Host": "evil.example"})
        check(other, 403, None, "127.0.0.1")


def test_a_slow_body_is_refused(engine):
    limits = dataclasses.replace(LIMITS, upload_seconds=0.3)

    def slowly():
        yield b"{"
        time.sleep(1)
        yield b"}"

    with running(engine, limits) as server:
        check(send(server, slowly()), 408, None, "did not arrive")


def test_addresses_are_read_by_the_crawlers_rules(engine, monkeypatch):
    web = pytest.importorskip("pangea_jax.curation.web")
    with running(engine, fetch=web.Fetch(robots=False)) as server:
        reply = server.post(**content(by(f"{server.url}/health")))
        check(reply, 400, "messages[0].content[0].image_url", "address is private")
    fetched = []
    fetch = lambda url: fetched.append(url) or small()  # noqa: E731
    with running(engine, fetch=fetch) as server:
        reply = server.post(**content(by("https://a.example/b.png")), max_tokens=1)
        assert reply.status_code == 200
    assert fetched == ["https://a.example/b.png"]


def test_logs_hold_no_texts(engine, monkeypatch, caplog):
    """Neither a refused request nor one at which the engine fails."""
    caplog.set_level(logging.DEBUG)
    secret = "zebra crossing"
    begin = engine._programs.begin
    with running(engine) as server:
        server.post(messages=[USER | {"content": secret}], colour=secret)

        def fail(*args, **kwargs):
            raise RuntimeError(secret)

        monkeypatch.setattr(engine._programs, "begin", fail)
        failed = server.post(messages=[USER | {"content": secret}], max_tokens=1)
        check(failed, 500, None, "the model failed")
        monkeypatch.setattr(engine._programs, "begin", begin)
        # The next request finds a new batch.
        assert server.post(messages=[USER], max_tokens=1).status_code == 200
    assert "the engine failed with RuntimeError" in caplog.text
    assert secret not in caplog.text
