"""Clients of others, unmodified, against the server."""

import base64

import pytest

openai = pytest.importorskip("openai", reason="openai is in requirements-eval.txt")

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def messages(drawing):
    url = "data:image/png;base64," + base64.b64encode(drawing).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "text", "text": QUESTION},
    ]
    return [{"role": "user", "content": parts}]


def test_chats(server, client, messages):
    (expected,) = server.engine.generate([messages], 16)
    settings = dict(model="sample", messages=messages, max_tokens=16)
    found = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    answer = found.choices[0].message
    assert answer.content == expected
    assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(**settings, stream=True, user="a")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    # An answer goes back as it came.
    longer = [*messages, answer, {"role": "user", "content": QUESTION}]
    again = client.chat.completions.create(model="sample", messages=longer, max_tokens=4)
    assert again.usage.prompt_tokens > found.usage.prompt_tokens


def test_completions_and_models(server, client):
    (expected,) = server.engine.generate(["What is"], 4)
    found = client.completions.create(model="sample", prompt="What is", max_tokens=4, logprobs=0)
    assert found.choices[0].text == expected
    assert [model.id for model in client.models.list()] == ["sample"]
    assert client.models.retrieve("sample").id == "sample"


def test_errors_are_those_of_the_package(client, messages):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="sample", messages=messages, temperature=9)
    assert bad.value.param == "temperature"


def test_the_evaluations_client(server, messages):
    from eval.bench.endpoint import Endpoint

    endpoint = Endpoint("sample", f"{server.url}/v1", retries=0)
    (expected,) = server.engine.generate([messages], 16)
    assert endpoint.chat(messages, max_tokens=16) == expected
    text, rest = "What is this?\n猫 ", "a cat"
    (found,) = server.engine.loglikelihood([server.engine.candidates(text, [rest])])
    before, whole = endpoint.echo(text), endpoint.echo(text + rest)
    total = sum(whole[len(before) :])
    assert total == pytest.approx(found[0].total, abs=1e-3)


def test_the_client_of_curation(server, tmp_path):
    llm = pytest.importorskip("pangea_jax.curation.llm")
    config = llm.ClientConfig(
        model="sample", base_url=f"{server.url}/v1", max_tokens=16, retries=0, patience=5.0
    )
    messages = [{"role": "user", "content": QUESTION}]
    reply = llm.Client(config, tmp_path / "replies.sqlite").complete(messages, purpose="test")
    (expected,) = server.engine.generate([messages], 16)
    assert reply.text == expected
    assert reply.prompt_tokens == len(server.engine.read(messages).tokens)
