"""Replies that threads and processes share: who may ask what is being asked, and the budget."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="openai is in requirements-curation.txt")

from pangea_jax.curation import llm, reply_store

from .clients import MANY, ask, calls_under_way, client_config, echo


def test_the_same_prompt_at_the_same_time_is_asked_once(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo, shares={"slow": 1.0})
    config = client_config(endpoint, concurrency=4)
    clients = [llm.Client(config, tmp_path / "r.sqlite") for _ in range(2)]
    replies = []
    threads = [
        threading.Thread(target=lambda c=client: replies.append(ask(c, "same")))
        for client in clients * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.text for reply in replies] == ["slow: same"] * 6
    assert sum(not reply.cached for reply in replies) == 1
    assert endpoint.asked.total() == 1


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_budget_is_never_exceeded_and_raising_it_goes_on(start_endpoint, tmp_path, journal):
    endpoint = start_endpoint(echo)
    settings = {"price_in": 1.0, "price_out": 1.0, "max_tokens": 50, "journal": journal}
    config = client_config(endpoint, budget=0.001, **settings)
    client = llm.Client(config, tmp_path / "r.sqlite")
    done = []
    with pytest.raises(
        reply_store.BudgetExceeded, match=r"the budget of \$0\.00 is spent.*raise config"
    ):
        done.extend(prompt for prompt, _ in client.map(lambda p: ask(client, p), MANY))
    spent = client.usage()["test"].dollars
    # The most that one call can cost: its bytes, what surrounds a message, and the longest reply.
    most = (len("user" + MANY[-1]) + 16 + 50) / 1e6
    assert 0.001 - most < spent <= 0.001
    assert endpoint.finished.total() == client.usage()["test"].calls
    richer = llm.Client(client_config(endpoint, budget=1.0, **settings), tmp_path / "r.sqlite")
    assert len(list(richer.map(lambda p: ask(richer, p), MANY))) == len(MANY)
    assert set(endpoint.finished.values()) == {1}


def test_limit_of_calls(start_endpoint, tmp_path):
    endpoint = start_endpoint(echo)
    client = llm.Client(client_config(endpoint, max_calls=7), tmp_path / "r.sqlite")
    with pytest.raises(reply_store.BudgetExceeded, match="7 calls were made"):
        list(client.map(lambda p: ask(client, p), MANY))
    assert endpoint.asked.total() == 7


_ASK_ONCE = """
import pathlib, sys
from pangea_jax.curation import llm
config = llm.ClientConfig(model="m", base_url=sys.argv[1], price_out=1.0)
messages = [{"role": "user", "content": "never answered"}]
llm.Client(config, pathlib.Path(sys.argv[2])).complete(messages, purpose="test")
"""


def test_claims_of_a_killed_process_are_taken_over_and_stay_charged(start_endpoint, tmp_path):
    release = threading.Event()

    def answer(request, kind):
        release.wait(5)
        return "late"

    endpoint, path = start_endpoint(answer), tmp_path / "r.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", _ASK_ONCE, endpoint.url, str(path)], cwd=Path(__file__).parents[2]
    )
    while not endpoint.asked:
        time.sleep(0.01)
    process.kill()
    process.wait()
    release.set()
    client = llm.Client(client_config(endpoint, price_out=1.0), path)
    assert ask(client, "never answered").text == "late"
    usage = client.usage()["test"]
    assert (usage.calls, usage.lost) == (1, 1)
    assert usage.lost_dollars == pytest.approx(4096 / 1e6)
    assert calls_under_way(path) == 0


def test_attempts_that_are_not_answered_in_time_stay_charged(start_endpoint, tmp_path):
    release, path = threading.Event(), tmp_path / "r.sqlite"

    def answer(request, kind):
        if endpoint.asked.total() <= 2:
            release.wait(10)
        return "at last"

    endpoint = start_endpoint(answer)
    settings = {"price_out": 1.0, "timeout": 0.6, "max_tokens": 1_000}
    client = llm.Client(client_config(endpoint, **settings), path)
    assert ask(client, "slow").text == "at last"
    release.set()
    usage = client.usage()["test"]
    assert (endpoint.asked.total(), usage.calls, usage.lost) == (3, 1, 2)
    assert usage.lost_dollars == pytest.approx(2 * 1_000 / 1e6)
    assert calls_under_way(path) == 0


def test_a_budget_holds_for_attempts_that_are_not_answered(start_endpoint, tmp_path):
    release, path = threading.Event(), tmp_path / "r.sqlite"
    endpoint = start_endpoint(lambda request, kind: "late" if release.wait(10) else "")
    settings = {"price_out": 1.0, "timeout": 0.3, "max_tokens": 1_000, "retries": 4}
    client = llm.Client(client_config(endpoint, budget=0.0025, **settings), path)
    with pytest.raises(reply_store.BudgetExceeded, match=r"raise config\.llm\.budget"):
        ask(client, "slow")
    release.set()
    assert endpoint.asked.total() == client.usage()["test"].lost == 2  # of the 5 that retries allow
    assert calls_under_way(path) == 0
