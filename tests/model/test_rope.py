"""Scaled rotary positions: frequencies, logits and config.json equal those of transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pangea_jax import checkpoints
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import CheckpointError, SpecialTokens
from pangea_jax.checkpoints import config as config_file
from pangea_jax.model.rope import RopeScaling, rope_angles, scaled_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LENGTH = 128
# (rope_parameters, other fields of text_config), as they are in config.json.
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}, {}),
    "older key": ({}, {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 700.0}),
    "yarn": (YARN | {"rope_theta": 5000.0}, {}),
    "yarn, context of the config": ({"rope_type": "yarn", "factor": 2.0}, {}),
    "yarn, all keys": (
        YARN | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3, "truncate": False},
        {"rope_theta": 900.0},
    ),
    "yarn, mscale": (YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}, {}),
    "yarn, factor from the contexts": (YARN | {"factor": None}, {}),
    "yarn, context beside the section": (YARN, {"original_max_position_embeddings": 128}),
    # transformers takes the second, with the base that stands beside both.
    "both keys": (
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_scaling": YARN, "rope_theta": 300.0},
    ),
    "both keys without a base": (
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ),
    "llama3": (LLAMA3 | {"rope_theta": 5000.0}, {}),
    "proportional": (
        {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
        {},
    ),
}


def write_config(folder, reference, parameters, fields):
    """The config.json of a reference with other rotary positions."""
    values = json.loads((reference.folder / "config.json").read_text())
    text = values["text_config"]
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        text.pop(key, None)
    text |= fields | ({"rope_parameters": parameters} if parameters else {})
    (folder / "config.json").write_text(json.dumps(values))
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.symlink_to(reference.folder / "model.safetensors")
    return folder


def rotary(folder):
    """transformers' module for the decoder of a config.json."""
    import transformers

    found = transformers.AutoConfig.from_pretrained(folder).text_config
    return transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(found)


def assert_same_angles(config, theirs):
    language = config.language
    ours = scaled_frequencies(language.head_width, language.rope_theta, language.rope_scaling)
    assert language.rope_scaling.kind == theirs.rope_type
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=1e-6)
    factor = language.rope_scaling.attention_factor
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_transformers(make_reference, tmp_path, name):
    """As read, and after they are written and read again, by us and by transformers."""
    folder = write_config(tmp_path, make_reference(), *SCALINGS[name])
    config = checkpoints.config_from_folder(folder)
    assert_same_angles(config, rotary(folder))
    written = config_file.to_transformers(config, "float32", SpecialTokens(96, 1, 0))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_text(json.dumps(written))
    assert checkpoints.config_from_folder(tmp_path / "again") == config
    assert_same_angles(config, rotary(tmp_path / "again"))


@pytest.mark.parametrize("name", ["yarn, mscale", "both keys", "llama3"])
def test_logits_equal_transformers(make_reference, tmp_path, name):
    import torch

    reference = make_reference()
    folder = write_config(tmp_path, reference, *SCALINGS[name])
    theirs = type(reference.model).from_pretrained(folder).eval()
    config = dataclasses.replace(checkpoints.config_from_folder(folder), dtype="float32")
    model = checkpoints.load_model(folder, config)
    tokens = np.random.default_rng(0).integers(1, 90, (1, LENGTH), np.int32)
    batch = Batch(
        tokens=jnp.asarray(tokens),
        image_index=jnp.full_like(tokens, -1),
        positions=jnp.arange(LENGTH)[None],
        segment_ids=jnp.ones_like(tokens),
        tiles=jnp.zeros((1, 1, 28, 28, 3), jnp.uint8),
    )
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(tokens).long()).logits.numpy()
        plain = reference.model(input_ids=torch.tensor(tokens).long()).logits.numpy()
    ours = jax.jit(lambda model, batch: model(batch))(model, batch)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)
    assert np.abs(plain - wanted).max() > 0.1  # the scaling changes the logits


@pytest.mark.parametrize(
    ("parameters", "fields", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, {}, "rope_parameters.rope_type is 'dynamic'"),
        (
            {"rope_type": "default", "rope_theta": 5000.0},
            {"rope_scaling": {"type": "longrope", "factor": 4.0}},
            "rope_scaling.rope_type is 'longrope'",
        ),
        ({"rope_type": "linear"}, {}, "no text_config.rope_parameters.factor"),
        ({"rope_type": "linear", "factor": -1}, {}, "factor is -1, but only a positive number"),
        (YARN | {"mrope_section": [1, 2]}, {}, "mrope_section is"),
        (YARN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 1"),
        (LLAMA3 | {"high_freq_factor": 1.0}, {}, "must be above low_freq_factor"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    make_reference, tmp_path, parameters, fields, message
):
    folder = write_config(tmp_path, make_reference(), parameters, fields)
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[")):
        checkpoints.config_from_folder(folder)


def test_without_a_scaling_the_angles_are_the_plain_ones():
    positions = jnp.arange(50)[None]
    cos, _ = rope_angles(positions, 8, 5000.0)
    plain = RopeScaling("linear", 1.0)
    same, _ = rope_angles(positions, 8, 5000.0, plain)
    np.testing.assert_allclose(cos, same, atol=1e-5)
