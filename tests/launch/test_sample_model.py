"""The shipped model works: `load("sample")` is far above chance, and needs the pictures."""

import numpy as np
import pytest

import pangea_jax
from pangea_jax.data import chat, image
from pangea_jax.data.record import Turn
from pangea_jax.sample import emoji, turns
from pangea_jax.sample.sample_store import SampleStore

LANGUAGES = ("en", "es", "sw", "ar", "hi", "zh", "ko", "ru")


@pytest.fixture(scope="module")
def sample():
    return pangea_jax.load("sample")


def message(key, question):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": SampleStore().image(key)},
                {"type": "text", "text": question},
            ],
        }
    ]


def questions(language, count):
    """(picture key, question, name) of drawings by the artist never trained on."""
    concepts = emoji.load_concepts()
    chosen = concepts[:: len(concepts) // count][:count]
    return [
        (
            emoji.image_key(emoji.TEST_ARTIST, concept.codepoint),
            *turns.ask_name(concept, language, n),
        )
        for n, concept in enumerate(chosen)
    ]


def test_names_unseen_drawings_and_only_by_looking(sample):
    """Exact English names of drawings that were never trained on. With exchanged pictures nearly all are wrong."""
    asked = questions("en", 60)
    answers = sample.generate([message(key, q) for key, q, _ in asked], max_new_tokens=16)
    right = np.mean([a == name for a, (*_, name) in zip(answers, asked, strict=True)])
    exchanged = [message(asked[i - 7][0], q) for i, (_, q, _) in enumerate(asked)]
    blind = sample.generate(exchanged, max_new_tokens=16)
    blind_right = np.mean([a == name for a, (*_, name) in zip(blind, asked, strict=True)])
    assert right > 0.5
    assert blind_right < 0.05


def test_the_true_name_outranks_another_in_the_other_languages(sample):
    """The true name is more likely than another name far more often than by chance."""
    wins = []
    for language in LANGUAGES[1:]:
        asked = questions(language, 40)
        for i, (key, question, name) in enumerate(asked):
            other = asked[i - 11][2]
            scores = [log_likelihood(sample, key, question, text) for text in (name, other)]
            wins.append(scores[0] > scores[1])
    # Of 280 fair coins, 168 or more show heads only once in 2,000 trials.
    assert sum(wins) >= 240, f"{sum(wins)} of {len(wins)}"


def log_likelihood(sample, key, question, name):
    """The log likelihood of an answer and its end token, from `Engine.logits` of the whole conversation."""
    messages = [*message(key, question), {"role": "assistant", "content": name}]
    logits = sample.logits(messages)
    vision = sample.config.vision
    rendered = chat.render(
        [Turn("user", f"<image>\n{question}"), Turn("assistant", name)],
        sample.tokenizer,
        [np.append(np.arange(vision.patches) + 1, 0)],
        tiles_per_image=[1],
        patches=vision.patches,
    )
    where = np.flatnonzero(rendered.trained)
    before = logits[where - 1].astype(np.float64)
    log_normaliser = np.log(np.exp(before - before.max(-1, keepdims=True)).sum(-1)) + before.max(-1)
    return (before[np.arange(len(where)), rendered.tokens[where]] - log_normaliser).sum()


def test_transparent_pictures_are_laid_on_white(sample):
    picture = image.decode(SampleStore().image("twemoji/1f408"), background=(255, 255, 255))
    opaque = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "x"}],
        }
    ]
    np.testing.assert_array_equal(
        sample.logits(opaque), sample.logits(message("twemoji/1f408", "x"))
    )


def test_a_prompt_beyond_the_context_is_refused(sample):
    with pytest.raises(ValueError, match="context of 512"):
        sample.generate([[{"role": "user", "content": "what " * 600}]])
