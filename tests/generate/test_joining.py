"""Requests that join and leave between steps: chunks of long prompts, cancellation, log-probabilities."""

import numpy as np
import pytest

import pangea_jax
from pangea_jax.generate import batching
from pangea_jax.generate.decode import Sampling

NEW, TOP = 24, 3
LONG = "river the over mountain " * 28


@pytest.fixture(scope="module")
def sample():
    return pangea_jax.load("sample")


def ask(sample, text, name=None, limit=NEW, **more):
    prompt = sample.read([{"role": "user", "content": text}], limit)
    return batching.Request(name or text, prompt, Sampling.make(1), limit, **more)


def answers(sample, requests, rows=4, **settings):
    """Each request's (text, how it ended), and the names in the order of all progress."""
    found, order, feed = {}, [], iter(requests)
    batch = sample.open(rows, 512, 64, stop=[], top=TOP)

    def take(most, _):
        return [request for request, _ in zip(feed, range(most))]

    for progress in batching.run(batch, take, **settings):
        order.append(progress.request.name)
        if progress.ended:
            text = sample.tokenizer.decode(progress.tokens)
            found[progress.request.name] = text, progress.ended
    return found, order


def test_a_long_prompt_does_not_stall_the_others(sample):
    """It is read in pieces, and a short one that came later goes on between them; both say the same as alone."""
    alone = {
        text: sample.generate([[{"role": "user", "content": text}]], NEW, stop=[])[0]
        for text in ("a", LONG, "What is this?")
    }
    texts = ("a", LONG, "What is this?")
    found, order = answers(sample, [ask(sample, t) for t in texts], chunk=64, pace=1e-9)
    assert {name: text for name, (text, _) in found.items()} == alone
    before = order[: order.index(LONG)]
    assert before.count("a") >= 3 and "What is this?" in before


def test_each_has_its_own_limit_and_the_cancelled_leave(sample):
    requests = [ask(sample, "a", limit=5), ask(sample, "b", limit=9), ask(sample, "c")]
    gone = requests[2]
    batch, feed, ended = sample.open(2, 64, 64, stop=[]), iter([requests]), {}
    for progress in batching.run(batch, lambda *_: next(feed, []), pace=1e-9):
        gone.cancelled |= progress.request is gone
        if progress.ended:
            ended[progress.request.name] = len(progress.tokens), progress.ended
    assert ended == {"a": (5, "length"), "b": (9, "length")}
    assert not batch.busy


def test_log_probabilities_are_those_of_the_logits(sample):
    messages = [{"role": "user", "content": "What is this?"}]
    wanted = ask(sample, "What is this?", limit=6, wants=True)
    batch, feed, likely, tokens = sample.open(2, 64, 64, stop=[], top=TOP), iter([[wanted]]), [], []
    for progress in batching.run(batch, lambda *_: next(feed, []), pace=1e-9):
        likely.append(progress.likely)
        tokens = progress.tokens
    chosen = np.concatenate([part.chosen for part in likely])
    ids = np.concatenate([part.ids for part in likely])
    values = np.concatenate([part.values for part in likely])
    prompt = sample.read(messages, 6)
    whole = np.concatenate([prompt.tokens, tokens]).astype(np.int32)
    index = np.full(len(whole), -1, np.int32)
    asked = type(prompt)(whole, index, prompt.tiles)
    logits = sample.logits(asked).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    before = np.arange(len(prompt.tokens), len(whole)) - 1
    np.testing.assert_allclose(chosen, expected[before, tokens], atol=1e-4)
    assert (ids[:, 0] == tokens).all()
    np.testing.assert_allclose(values, -np.sort(-expected[before])[:, :TOP], atol=1e-4)
    # The same of a text that was not written by the model.
    echoed = sample._programs.echo(sample._batch([asked]), top=TOP)
    np.testing.assert_allclose(
        np.asarray(echoed.chosen)[0, 1 : len(whole)],
        expected[np.arange(len(whole) - 1), whole[1:]],
        atol=1e-4,
    )


def test_what_is_safe_to_tell_before_a_stop_string():
    ends = batching.StopStrings(["\n\n", "END"])
    assert ends.safe("one\n") == "one"
    assert ends.safe("one\ntwo EN") == "one\ntwo "
    assert ends.safe("one END two") == "one "
    assert ends.safe("one") == "one"
