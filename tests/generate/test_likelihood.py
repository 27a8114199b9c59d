"""Log-likelihoods of continuations: each against a forward pass over prompt and continuation."""

import dataclasses

import jax
import numpy as np
import pytest

from pangea_jax.generate.engine import Engine
from pangea_jax.generate.likelihood import Candidates, pad_candidates

CONTEXTS = [
    "Paka alilala. Mbwa alikuja.",
    "",
    "Wer kommt mit? Alle. " * 9,
    [{"role": "user", "content": "What is this?"}],
]
CONTINUATIONS = [" Paka alikimbia mbali.", " Paka", " no", " 猫が走った。"]


@pytest.fixture(scope="module")
def engine(make_random_model, emoji_tokenizer):
    return Engine(make_random_model(), emoji_tokenizer)


def _expected(engine, prompt, tokens):
    """Sum and greediness of the last of `tokens`, by one uncached forward pass of a row of its own."""
    none = np.full(len(tokens) - len(prompt.tokens), -1, np.int32)
    row = dataclasses.replace(
        prompt,
        tokens=np.asarray(tokens, np.int32),
        image_index=np.concatenate([prompt.image_index, none]),
    )
    logits = engine.logits(row)[len(prompt.tokens) - 1 : -1]
    new = tokens[len(prompt.tokens) :]
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(new)), new]
    return log_probabilities.sum(), bool((logits.argmax(-1) == new).all())


def _wholes(engine, context, prompt):
    if isinstance(context, str) and context:
        return [engine.tokenizer.encode(context + text) for text in CONTINUATIONS]
    return [[*prompt.tokens.tolist(), *engine.tokenizer.encode(text)] for text in CONTINUATIONS]


def test_sums_equal_the_forward_pass(engine, picture):
    parts = [
        {"type": "image", "image": picture(50, 30)},
        {"type": "text", "text": "Nini?"},
    ]
    contexts = [*CONTEXTS, [{"role": "user", "content": parts}]]
    items = [engine.candidates(context, CONTINUATIONS) for context in contexts]
    found = engine.loglikelihood(items, batch_size=3)
    for context, row in zip(contexts, found, strict=True):
        prompt = engine.read(context)
        for whole, score in zip(_wholes(engine, context, prompt), row, strict=True):
            assert whole[: len(prompt.tokens)] == prompt.tokens.tolist()
            total, greedy = _expected(engine, prompt, whole)
            assert score.total == pytest.approx(total, abs=2e-4)
            assert score.greedy == greedy
            assert score.tokens == len(whole) - len(prompt.tokens)


def test_what_the_model_says_itself_is_greedy(engine):
    """The tokens that greedy decoding gives, scored, are each the likeliest; one other is not."""
    prompt = engine.read(CONTEXTS[0])
    logits = engine.logits(prompt)
    likeliest = int(logits[-1].argmax())
    wholes = [[*prompt.tokens.tolist(), id] for id in (likeliest, (likeliest + 1) % 90)]
    found = Candidates.make(wholes, len(prompt.tokens))
    ((first, second),) = engine.loglikelihood([(prompt, found)])
    assert first.greedy and not second.greedy
    assert first.total > second.total


def test_tokens_across_the_border_belong_to_the_continuation(engine):
    """Where the end of a prompt is tokenised together with what follows, as many tokens as the prompt
    alone has are not scored, and what all share is read but once."""
    wholes = [[5, 6, 7, 8], [5, 6, 9, 8, 3], [5, 6, 7]]
    found = Candidates.make(wholes, prompt=2)
    assert (found.shared, found.unscored) == (2, 0)
    found = Candidates.make([[5, 6, 7, 8], [5, 1, 9, 8, 3]], prompt=3)
    assert (found.shared, found.unscored, found.tails) == (1, 2, ((6, 7, 8), (1, 9, 8, 3)))
    tokens, scored = pad_candidates([found])
    assert tokens.shape == (1, 2, 4)
    np.testing.assert_array_equal(scored[0], [[0, 0, 1, 0], [0, 0, 1, 1]])
    prompt = engine.read("abc")
    one = dataclasses.replace(prompt, tokens=np.array([5], np.int32), image_index=np.array([-1]))
    three = dataclasses.replace(
        prompt, tokens=np.array([5, 6, 7], np.int32), image_index=np.full(3, -1)
    )
    ((score, _),) = engine.loglikelihood([(one, found)])
    assert score.total == pytest.approx(_expected(engine, three, [5, 6, 7, 8])[0], abs=1e-4)
    assert score.tokens == 1


@pytest.mark.parametrize("text", ["bana", "Hii ni nin", "a"])
def test_a_text_that_its_continuations_change_is_read_as_they_have_it(engine, text):
    """Both begin with one letter, which makes one token with the end of the text: nothing tells them apart
    until after it, and what is read before is not the text's own tokens."""
    beginning = {"bana": "na", "Hii ni nin": "i", "a": "s"}[text]
    continuations = [f"{beginning} butterfly", f"{beginning} no"]
    wholes = [engine.tokenizer.encode(text + continuation) for continuation in continuations]
    length = len(engine.tokenizer.encode(text))
    assert {tuple(whole[:length]) for whole in wholes} != {tuple(engine.tokenizer.encode(text))}
    for asked in (continuations, continuations[:1]):
        (scores,) = engine.loglikelihood([engine.candidates(text, asked)])
        for whole, score in zip(wholes, scores, strict=False):
            before = dataclasses.replace(
                engine.read(text),
                tokens=np.asarray(whole[:length], np.int32),
                image_index=np.full(length, -1, np.int32),
            )
            total, _ = _expected(engine, before, whole)
            assert score.total == pytest.approx(total, abs=2e-4)
            assert score.tokens == len(whole) - length


@pytest.mark.parametrize(
    ("wholes", "message"),
    [
        ([], "no continuations"),
        ([[1, 2], [1]], "continuation 1 has no"),
        ([[1, 2], [3, 4]], "one by one"),
    ],
)
def test_what_cannot_be_scored(wholes, message):
    with pytest.raises(ValueError, match=message):
        Candidates.make(wholes, prompt=1)


def test_a_continuation_over_the_context_is_refused(engine, monkeypatch):
    short = dataclasses.replace(engine.config.language, max_positions=16)
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, language=short))
    with pytest.raises(ValueError, match="over the model's context of 16"):
        engine.candidates("abc", ["x" * 40])


def test_raw_text_has_no_template(engine):
    text = "Swali: 2 + 2?\nJibu:"
    prompt = engine.read(text)
    assert prompt.tokens.tolist() == engine.tokenizer.encode(text)
    assert (prompt.image_index == -1).all() and len(prompt.tiles) == 0
    asked = [text, [{"role": "user", "content": text}], prompt]
    raw, chat, read = engine.generate(asked, 8, stop=[])
    assert raw == read != chat
    assert "".join(engine.stream(text, 8, stop=[])) == raw


def test_shapes_are_what_batches_are_padded_to(engine, picture):
    message = {"role": "user", "content": "x", "images": [picture(60, 30)]}
    for conversation in ("short", "long " * 90, [message]):
        prompt = engine.read(conversation)
        batch = engine._batch([prompt])
        assert engine.shape(prompt) == (batch.tokens.shape[1], batch.tiles.shape[1])
