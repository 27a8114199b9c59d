"""Logits and gradients equal those of transformers' LLaVA-NeXT in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pangea_jax import checkpoints
from pangea_jax.model.vision import CLIP_MEAN, CLIP_STD

IMAGE_ID = 96
LENGTH, TILES = 192, 10  # two pictures of at most 88 tokens and 5 tiles
TOLERANCE = 1e-4
DECODERS = [("qwen2", False), ("qwen2", True), ("mistral", False), ("llama", True)]
SIZES = [
    *[(1, 1), (2, 3), (20, 20), (28, 28), (56, 56), (300, 300), (1500, 1500)],  # square and tiny
    *[(640, 480), (480, 640), (500, 333), (333, 500), (1200, 627), (100, 40), (40, 100)],
    *[(84, 28), (300, 100), (900, 130), (2000, 9), (57, 28)],  # panoramas
    *[(28, 84), (100, 300), (130, 900), (9, 2000), (28, 57)],  # tall
    *[(2600, 1700), (1700, 2600)],  # huge
]
# Prefixes in transformers 5, and in the checkpoints of LLaVA's own code, such as neulab/Pangea-7B.
LLAVA_NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "image_newline": "model.image_newline",
}


class Pair:
    """A reference model and ours with the same parameters, read from `folder`."""

    def __init__(self, reference, make_examples, folder=None):
        config = checkpoints.config_from_folder(reference.folder)
        self.reference = reference.model
        self.config = dataclasses.replace(config, dtype="float32")
        self.model = checkpoints.load_model(folder or reference.folder, self.config)
        self.examples = make_examples(self.config, IMAGE_ID)
        self.forward = jax.jit(lambda model, batch: model(batch))

    def ours(self, rows):
        rows = [self.examples.row(*pieces) for pieces in rows]
        logits = self.forward(self.model, self.examples.batch(rows, LENGTH, TILES))
        return [np.asarray(logits[b, : len(rows[b][0])]) for b in range(len(rows))]

    def inputs(self, rows):
        """Arguments of the reference for right-padded rows."""
        import torch

        made = [self.examples.row(*pieces) for pieces in rows]
        longest = max(len(tokens) for tokens, _, _ in made)
        padded = [tokens + [0] * (longest - len(tokens)) for tokens, _, _ in made]
        mask = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _, _ in made]
        inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        pictures = [piece for pieces in rows for piece in pieces if not isinstance(piece, list)]
        if pictures:
            tiles = [torch.tensor(pixels(self.examples.row(picture)[2])) for picture in pictures]
            # One stack, padded with zeros. The reference removes the padding with image_sizes.
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)
            inputs["image_sizes"] = torch.tensor([picture.size[::-1] for picture in pictures])
            if not self.config.pinpoints:  # LLaVA-1.5 has neither tiles nor sizes
                inputs["pixel_values"] = inputs["pixel_values"][:, 0]
                del inputs["image_sizes"]
        return inputs

    def theirs(self, rows):
        import torch

        inputs = self.inputs(rows)
        with torch.no_grad():
            logits = self.reference(**inputs).logits.numpy()
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [logits[b, :length] for b, length in enumerate(lengths)]

    def assert_equal(self, rows):
        for ours, theirs in zip(self.ours(rows), self.theirs(rows), strict=True):
            assert ours.shape == theirs.shape
            assert np.abs(theirs).max() > 1  # not all are zero
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def pixels(tiles):
    """CLIP's normalisation in float64, channels first."""
    normalised = (np.stack(tiles) / 255 - CLIP_MEAN) / CLIP_STD
    return normalised.transpose(0, 3, 1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def make_pair(make_reference, make_examples):
    made = {}

    def make(decoder="qwen2", tied=False):
        if (decoder, tied) not in made:
            made[decoder, tied] = Pair(make_reference(decoder, tied), make_examples)
        return made[decoder, tied]

    return make


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_picture_size(make_pair, picture, size):
    make_pair().assert_equal([([1, 2, 3], picture(*size), [4, 5, 6, 7, 8])])


@pytest.mark.parametrize(("decoder", "tied"), DECODERS)
def test_decoders(make_pair, picture, decoder, tied):
    pair = make_pair(decoder, tied)
    assert pair.config.language.qkv_bias == (decoder == "qwen2")
    assert pair.config.language.tied_head == tied
    pair.assert_equal([([1, 2, 3], picture(640, 480), [4, 5, 6, 7, 8])])
    pair.assert_equal([(list(range(1, 90)),)])


def test_llava_names(make_reference, make_examples, picture, tmp_path):
    """The same weights under the names of neulab/Pangea-7B, which are listed here and not taken from the table."""
    from safetensors.numpy import load_file, save_file

    reference = make_reference()
    named = {}
    for name, tensor in load_file(reference.folder / "model.safetensors").items():
        (prefix,) = (prefix for prefix in LLAVA_NAMES if name.startswith(prefix))
        named[LLAVA_NAMES[prefix] + name.removeprefix(prefix)] = tensor
    save_file(named, tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in named} == {"model", "lm_head"}
    pair = Pair(reference, make_examples, folder=tmp_path)
    pair.assert_equal([([1, 2, 3], picture(640, 480), [4, 5]), (list(range(1, 90)),)])


def test_llava_1_5(make_pair, picture):
    """The model has one tile, no newline vector, and a Llama decoder without biases."""
    pair = make_pair("llava-1.5")
    assert (pair.config.pinpoints, pair.config.newline) == ((), False)
    assert not pair.config.language.qkv_bias
    pair.assert_equal(
        [
            ([1, 2, 3], picture(640, 480), [4, 5, 6]),
            ([7], picture(30, 90), [8, 9], picture(20, 20)),
            (list(range(1, 40)),),
        ]
    )


def test_two_pictures_in_one_row(make_pair, picture):
    make_pair().assert_equal(
        [([1], picture(90, 30), [2, 3], picture(50, 80), [4, 5, 6])],
    )


def test_right_padded_rows_of_different_lengths(make_pair, picture):
    make_pair().assert_equal(
        [
            ([1, 2], picture(300, 200), [3, 4]),
            ([5, 6, 7],),
            ([8], picture(30, 70), [9, 10, 11], picture(31, 31), [12]),
        ]
    )


def test_picture_features_matter(make_pair, picture):
    pair = make_pair()
    seen, other = (pair.ours([([1], picture(60 + i, 30), [2, 3])])[0] for i in (0, 1))
    assert np.abs(seen[-1] - other[-1]).max() > 100 * TOLERANCE


def next_token_loss(logits, tokens, words):
    """Mean cross-entropy of words (not picture tokens), each predicted from the token before."""
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    trained = words[:, 1:]
    return -(scores[..., 0] * trained).sum() / trained.sum()


@pytest.mark.parametrize(("decoder", "tied"), DECODERS[:3])
def test_gradients_of_every_parameter(make_pair, picture, tmp_path, decoder, tied):
    """The reference's gradients, written as a checkpoint, are read through the same table."""
    import torch
    from safetensors.torch import save_file

    pair = make_pair(decoder, tied)
    rows = [([1, 2, 3], picture(640, 480), [4, 5, 6, 7]), ([8], picture(30, 90), [9, 10])]
    inputs = pair.inputs(rows)
    ignored = (inputs["input_ids"] == IMAGE_ID) | (inputs["attention_mask"] == 0)
    pair.reference.zero_grad()
    expected_loss = pair.reference(
        **inputs, labels=inputs["input_ids"].masked_fill(ignored, -100)
    ).loss
    expected_loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in pair.reference.named_parameters()
    }
    save_file(gradients, tmp_path / "model.safetensors")
    expected = checkpoints.load(tmp_path, pair.config)

    batch = pair.examples.batch([pair.examples.row(*row) for row in rows], LENGTH, TILES)
    graph, state = nnx.split(pair.model)
    words = (batch.image_index < 0) & (batch.segment_ids > 0)

    @jax.jit
    @jax.value_and_grad
    def loss(state):
        return next_token_loss(nnx.merge(graph, state)(batch), batch.tokens, words)

    value, found = loss(state)
    np.testing.assert_allclose(value, expected_loss.item(), rtol=1e-5)
    unused = ("tail_blocks", "post_norm")
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True
    ):
        error = jnp.linalg.norm(ours[...] - theirs[...])
        norm = jnp.linalg.norm(theirs[...])
        if path[1:] and path[1] in unused:
            assert (norm, error) == (0, 0)
        elif path[-1] in ("k_bias_hc", "k_bias_kc") and "vision" in path:
            assert (
                error < 1e-6
            )  # a key bias cancels in the softmax, so both gradients are rounding noise
        else:
            assert norm > 0, path
            assert error <= 1e-4 * norm, (path, float(error), float(norm))
