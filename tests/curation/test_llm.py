"""The client against a real server: troubles, cache, what is counted."""

import json
import pickle
import threading
import time
import types
import weakref

import pytest

pytest.importorskip("openai", reason="openai is in requirements-curation.txt")

from pangea_jax.curation import llm, reply_store

from .clients import MANY, ask, calls_under_way, client_config, echo


def test_every_trouble_is_survived_and_every_prompt_paid_once(start_endpoint, tmp_path):
    shares = {"busy": 0.25, "broken": 0.25, "cut": 0.05, "page": 0.25, "slow": 0.1, "refused": 0.1}
    endpoint = start_endpoint(echo, shares=shares)
    client = llm.Client(client_config(endpoint), tmp_path / "replies.sqlite")

    def text_of(prompt):
        try:
            return ask(client, prompt).text.partition(": ")[2]
        except llm.Refused as refused:
            return refused.reason

    replies = dict(client.map(text_of, MANY))
    refused = [prompt for prompt, reply in replies.items() if reply != prompt]
    assert {replies[prompt] for prompt in refused} == {"the model declines"}
    kinds = list(endpoint.kinds.values())
    assert len(refused) == sum(content == "refused" for content, _ in kinds) > 0
    assert {trouble for _, trouble in kinds} == {"busy", "broken", "cut", "page", ""}
    assert set(endpoint.finished.values()) == {1}
    troubled = sum(trouble != "" for _, trouble in kinds)
    assert endpoint.asked.total() == len(MANY) + troubled

    # A second client, as after a restart, asks nothing; not even what was refused.
    again = llm.Client(client_config(endpoint), tmp_path / "replies.sqlite")
    assert dict(again.map(lambda prompt: _cached(again, prompt), MANY)) == replies
    assert endpoint.asked.total() == len(MANY) + troubled


def _cached(client, prompt):
    try:
        reply = ask(client, prompt)
    except llm.Refused as refused:
        return refused.reason
    assert reply.cached
    return reply.text.partition(": ")[2]


def test_sampling_is_part_of_the_key_and_purpose_is_not(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo)
    client = llm.Client(client_config(endpoint), tmp_path / "r.sqlite")
    messages = [{"role": "user", "content": "a"}]
    first = client.complete(messages, purpose="one")
    assert client.complete(messages, purpose="two").key == first.key
    assert client.complete(messages, purpose="one", temperature=0.7).key != first.key
    assert set(endpoint.requests) == {
        first.key,
        client.complete(messages, purpose="", temperature=0.7).key,
    }
    (settings,) = [r for k, r in endpoint.requests.items() if k == first.key]
    assert llm.request_key(settings) == first.key
    assert settings["max_tokens"] == 4096 and settings["temperature"] == 0.0


def test_no_more_calls_under_way_than_allowed(start_endpoint, tmp_path):
    now, most, lock = [], [], threading.Lock()

    def answer(request, kind):
        with lock:
            now.append(1)
            most.append(len(now))
        time.sleep(0.1)
        with lock:
            now.pop()
        return "x"

    endpoint = start_endpoint(answer)
    client = llm.Client(client_config(endpoint, concurrency=3), tmp_path / "r.sqlite")
    assert len(list(client.map(lambda prompt: ask(client, prompt), MANY[:24]))) == 24
    assert max(most) == 3


def test_usage_is_what_the_server_counted(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo)
    config = client_config(endpoint, price_in=2.0, price_out=8.0)
    client = llm.Client(config, tmp_path / "r.sqlite")
    for prompt in MANY[:5] * 2:
        ask(client, prompt)
    sent = sum(len(json.dumps(request)) // 4 for request in endpoint.requests.values())
    came = sum(len(f"good: {prompt}") // 4 for prompt in MANY[:5])
    dollars = (2 * sent + 8 * came) / 1e6
    assert client.usage() == {"test": reply_store.Usage(5, sent, came, pytest.approx(dollars))}


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": "many", "completion_tokens": -1},
    ],
)
def test_what_is_not_counted_is_charged_as_the_most_that_it_can_be(start_endpoint, tmp_path, usage):
    endpoint = start_endpoint(lambda request, kind: "東京", usage=usage, embed=lambda text: [1.0])
    prices = {"price_in": 2.0, "price_out": 8.0, "image_tokens": 500}
    client = llm.Client(client_config(endpoint, **prices), tmp_path / "r.sqlite")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9_000}}
    content = [picture, {"type": "text", "text": "Où ?"}]
    reply = client.complete([{"role": "user", "content": content}], purpose="test")
    assert client.embed(["été", "no"], model="e", purpose="vectors") == [[1.0], [1.0]]
    # Bytes of all texts, 16 around a message and around each part of it, 500 for the picture.
    sent, came = 16 + len("user") + 500 + 16 + len("text") + 5, 6
    assert (reply.prompt_tokens, reply.completion_tokens) == (sent, came)
    used = client.usage()
    dollars = (2 * sent + 8 * came) / 1e6
    assert used["test"] == reply_store.Usage(1, sent, came, pytest.approx(dollars), estimated=1)
    assert used["vectors"].prompt_tokens == 7 and used["vectors"].estimated == 1


def test_half_a_count_is_half_an_estimate(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo, usage={"completion_tokens": None})
    client = llm.Client(client_config(endpoint), tmp_path / "r.sqlite")
    reply = ask(client, "prompt")
    (request,) = endpoint.requests.values()
    counts = len(json.dumps(request)) // 4, len("good: prompt")
    assert (reply.prompt_tokens, reply.completion_tokens) == counts
    assert client.usage()["test"].estimated == 1


def test_an_endpoint_that_is_down_for_an_hour_is_waited_for(start_endpoint, tmp_path, monkeypatch):
    endpoint = start_endpoint(echo)
    endpoint.down = True
    client = llm.Client(llm.ClientConfig("m", endpoint.url, retries=0), tmp_path / "r.sqlite")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        endpoint.down = sum(waits) < 3_600

    clock = types.SimpleNamespace(time=time.time, sleep=sleep, monotonic=lambda: sum(waits))
    monkeypatch.setattr(llm, "time", clock)
    assert ask(client, "a").text == "good: a"
    assert waits[0] <= 1.0 < waits[2] and max(waits) <= 60.0 and len(waits) < 100


def test_beyond_patience_the_run_stops_and_nothing_is_lost(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo)
    client = llm.Client(client_config(endpoint, retries=0, patience=0.5), tmp_path / "r.sqlite")
    endpoint.down = True
    with pytest.raises(
        llm.EndpointError, match=r"has not answered for .* run the same command again"
    ):
        ask(client, "a")
    endpoint.down = False
    assert not ask(client, "a").cached


def test_a_prompt_that_always_fails_is_given_up_while_others_are_answered(
    start_endpoint, tmp_path, monkeypatch
):
    def answer(request, kind):
        if request["messages"][-1]["content"] == "bad":
            raise RuntimeError("the server falls over")
        return "x"

    endpoint = start_endpoint(answer)
    client = llm.Client(client_config(endpoint, retries=0, patience=100.0), tmp_path / "r.sqlite")
    asked = iter(MANY)
    # While the bad prompt waits, others are answered.
    clock = types.SimpleNamespace(
        time=time.time, sleep=lambda seconds: None, monotonic=time.monotonic
    )
    monkeypatch.setattr(llm, "time", clock)
    original = client._completion

    def completion(request):
        if request["messages"][-1]["content"] == "bad":
            ask(client, next(asked))
        return original(request)

    monkeypatch.setattr(client, "_completion", completion)
    with pytest.raises(llm.Refused, match="the endpoint fails on this prompt"):
        ask(client, "bad")
    assert calls_under_way(tmp_path / "r.sqlite") == 0


def test_wrong_key_and_wrong_settings_stop_at_once(start_endpoint, tmp_path, monkeypatch):
    endpoint = start_endpoint(echo)
    client = llm.Client(client_config(endpoint), tmp_path / "r.sqlite")
    status = []

    def respond(handler, request):
        handler.send(status[-1], b'{"error": {"message": "no such model"}}')

    monkeypatch.setattr(endpoint, "respond", respond)
    for code in (401, 403, 404):
        status.append(code)
        with pytest.raises(llm.EndpointError, match=r"refuses the request: .*no such model"):
            ask(client, "a")
    status.append(400)
    for prompt in MANY[:19]:
        with pytest.raises(llm.Refused, match="rejects this prompt"):
            ask(client, prompt)
    with pytest.raises(llm.EndpointError, match="the settings must be wrong"):
        ask(client, "a")


def test_a_spent_budget_ends_the_run_also_where_the_package_wraps_it(
    start_endpoint, tmp_path, monkeypatch
):
    import openai

    def completion(request):
        raise openai.APIConnectionError(request=None) from reply_store.BudgetExceeded("spent")

    client = llm.Client(client_config(start_endpoint(echo)), tmp_path / "r.sqlite")
    monkeypatch.setattr(client, "_completion", completion)
    with pytest.raises(reply_store.BudgetExceeded, match="spent"):
        ask(client, "a")


def test_results_are_not_kept_beyond_their_turn(start_endpoint, tmp_path):
    class Picture:
        pass

    client = llm.Client(client_config(start_endpoint(echo)), tmp_path / "r.sqlite")
    made = []
    for _, picture in client.map(lambda prompt: Picture(), MANY):
        made.append(weakref.ref(picture))
        # This one, and what threads that have just made theirs still hold.
        assert sum(ref() is not None for ref in made) <= 1 + client.config.concurrency


def test_embeddings_are_cached(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo, embed=lambda text: [float(len(text)), 1.0])
    client = llm.Client(client_config(endpoint), tmp_path / "r.sqlite")
    for _ in range(2):
        vectors = client.embed(["a", "bcd"], model="e", purpose="similarity")
        assert vectors == [[1.0, 1.0], [3.0, 1.0]]
    assert endpoint.asked.total() == 1


def test_configs_say_what_is_wrong_and_can_be_sent_to_workers():
    config = llm.ClientConfig(model="m", price_in=1.0, budget=2.0)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="budget is 5 dollars, but price_in and price_out"):
        llm.ClientConfig(model="m", budget=5)
    with pytest.raises(ValueError, match=r"config.llm.concurrency must be positive, not 0"):
        llm.ClientConfig(model="m", concurrency=0)
    with pytest.raises(ValueError, match="model is empty"):
        llm.ClientConfig(model="")
    with pytest.raises(ValueError, match="expected 'wal' or 'delete'"):
        llm.ClientConfig(model="m", journal="memory")
