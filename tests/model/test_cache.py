"""Decoding from the KV cache equals the full forward pass and transformers' generate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangea_jax import checkpoints

IMAGE_ID = 96
PROMPT, TILES, NEW = 112, 5, 64


@pytest.fixture(scope="module")
def reference(make_reference):
    return make_reference("qwen2", False)


@pytest.fixture(scope="module")
def model(reference):
    config = checkpoints.config_from_folder(reference.folder)
    config = dataclasses.replace(config, dtype="float32")
    return checkpoints.load_model(reference.folder, config)


@pytest.fixture(scope="module")
def prompts(model, make_examples, picture):
    """Rows of different lengths, their pictures, and the padded batch."""
    examples = make_examples(model.config, IMAGE_ID)
    pictures = [picture(300, 200), picture(40, 120), None]
    rows = [
        examples.row([1, 2], pictures[0], [3, 4, 5]),
        examples.row([6], pictures[1], [7, 8]),
        examples.row([9, 10, 11, 12]),
    ]
    return rows, pictures, examples.batch(rows, PROMPT, TILES)


@jax.jit
def prefill(model, batch):
    return model.prefill(batch, PROMPT + NEW)


@jax.jit
def extend(model, cache, tokens, positions):
    """Logits and cache after T more words in every row."""
    x = model.language.embed(tokens, jnp.float32)
    hidden, cache = model.language.extend(x, positions, jnp.ones_like(tokens), cache)
    return model.language.logits(hidden), cache


def continued(rows, words):
    return [
        (tokens + new, index + [-1] * len(new), tiles)
        for (tokens, index, tiles), new in zip(rows, words, strict=True)
    ]


def test_prefill_and_extend_equal_the_full_forward(model, prompts, make_examples):
    rows, _, batch = prompts
    lengths = np.array([len(tokens) for tokens, _, _ in rows])
    words = np.random.default_rng(0).integers(1, 90, (3, 6))
    full = make_examples(model.config, IMAGE_ID).batch(
        continued(rows, words.tolist()), PROMPT + 6, TILES
    )
    expected = jax.jit(lambda m, b: m(b))(model, full)

    hidden, cache = prefill(model, batch)
    prompt_logits = model.language.logits(hidden)
    assert cache.length == PROMPT
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(prompt_logits[b, :length], expected[b, :length], atol=2e-5)
    # Four words at once, then one by one.
    found = []
    for start, stop in ((0, 4), (4, 5), (5, 6)):
        positions = lengths[:, None] + np.arange(start, stop)
        logits, cache = extend(model, cache, words[:, start:stop], positions)
        found.append(logits)
    found = np.concatenate(found, axis=1)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(found[b], expected[b, length : length + 6], atol=2e-5)


def greedy(model, batch, lengths):
    """NEW tokens for every row of a padded batch."""
    hidden, cache = prefill(model, batch)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logits, out = model.language.logits(last), []
    for step in range(NEW):
        out.append(jnp.argmax(logits, axis=-1))
        logits, cache = extend(model, cache, out[-1], (lengths + step)[:, None])
    return np.concatenate(out, axis=1)


def test_greedy_decoding_equals_generate(model, reference, prompts):
    import torch

    from pangea_jax.model.vision import normalize

    rows, pictures, batch = prompts
    lengths = jnp.array([len(tokens) for tokens, _, _ in rows])
    found = greedy(model, batch, lengths)
    for (tokens, _, tiles), picture, ours in zip(rows, pictures, found, strict=True):
        inputs = {"input_ids": torch.tensor([tokens])}
        if tiles:
            pixels = np.asarray(normalize(jnp.asarray(np.stack(tiles)))).transpose(0, 3, 1, 2)
            inputs["pixel_values"] = torch.tensor(pixels)[None]
            inputs["image_sizes"] = torch.tensor([picture.size[::-1]])
        with torch.no_grad():
            theirs = reference.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert ours.tolist() == theirs[0, len(tokens) :].tolist()
    assert len(np.unique(found)) > 5  # it does not repeat one token
