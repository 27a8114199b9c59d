"""Weights in 8 and 4 bits from any checkpoint: rounded as they are read, stored, read back bit-equal, on a mesh."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import pangea_jax
from pangea_jax import checkpoints, sharding
from pangea_jax.checkpoints import CheckpointError, adapter, convert, rounded
from pangea_jax.generate.engine import load_folder
from pangea_jax.model import LoraConfig, quantized
from pangea_jax.model.params import flatten, unflatten
from pangea_jax.sample import emoji
from tests.checkpoints.tiny import CONFIG, TOKENS, random_state

QUESTION = [{"role": "user", "content": "What is a cat?"}]


@pytest.fixture(scope="module")
def source(emoji_tokenizer, tmp_path_factory):
    """A small random model in the public layout, with the sample's tokenizer and a head of its own."""
    folder = tmp_path_factory.mktemp("source")
    language = dataclasses.replace(CONFIG.language, vocab_size=emoji_tokenizer.vocab_size)
    config = dataclasses.replace(CONFIG, language=language)
    tokens = checkpoints.SpecialTokens.of(emoji_tokenizer)
    checkpoints.save(random_state(config), config, folder, tokens=tokens)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, folder)
    return folder


def in_form(folder, form):
    return rounded.in_form(checkpoints.config_from_folder(folder), form)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)


@pytest.mark.parametrize("form", quantized.FORMS)
def test_every_kernel_of_the_language_model_is_near_its_own(source, form):
    """Tower, projector, norms and biases stay; embedding and head have 8 bits."""
    plain = flatten(checkpoints.load(source))
    config = in_form(source, form)
    found = rounded.whole(flatten(checkpoints.load(source, config)), config)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        error = np.asarray(found[name]) - np.asarray(value)
        relative = np.sqrt(np.mean(error**2) / np.mean(np.asarray(value) ** 2))
        is_kernel = name.startswith("language.") and ("_kernel_" in name or "embedding" in name)
        bits8 = form == "int8" or ".blocks." not in name
        assert bool(relative) == is_kernel, name
        assert relative < (0.01 if bits8 else 0.13), name


@pytest.mark.parametrize(("kind", "form"), [("orbax", "int8"), ("hf", "nf4")])
def test_stored_weights_are_read_back_bit_equal(source, tmp_path, kind, form):
    tokenizer, out = checkpoints.load_tokenizer(source), tmp_path / "out"
    files = checkpoints.tokenizer_files(source)
    convert.convert(source, out, tokenizer, tokenizer_files=files, form=kind, form_of_weights=form)
    wanted = flatten(checkpoints.load(source, in_form(source, form)))
    assert_equal(flatten(checkpoints.load(out)), wanted)
    assert checkpoints.config_from_folder(out) == in_form(source, form)
    with pytest.raises(CheckpointError, match=f"out has its weights in {form} already; leave out"):
        pangea_jax.load(out, weights="int8")


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_mesh_holds_the_same_codes(source, form):
    """Also where a kernel is split along its inputs and its groups."""
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    config = in_form(source, form)
    whole = flatten(checkpoints.load(source, config))
    places = sharding.param_shardings(whole, mesh)
    split = flatten(checkpoints.load(source, config, shardings=unflatten(places)))
    assert_equal(split, whole)
    codes = split["language.blocks.down_kernel_fd.codes"]
    assert codes.addressable_shards[0].data.size == codes.size // 4
    if form == "int8":
        return
    one = pangea_jax.load(source, dtype="float32", weights=form)
    several = load_folder(source, dtype="float32", weights=form, mesh=mesh)
    np.testing.assert_allclose(several.logits(QUESTION), one.logits(QUESTION), atol=2e-3)


def test_what_cannot_be_is_refused_in_a_sentence(source, tmp_path):
    with pytest.raises(ValueError, match="weights 'int3' is not one of int8, int4, nf4"):
        pangea_jax.load(source, weights="int3")
    values = json.loads((source / "config.json").read_text())
    shutil.copytree(source, tmp_path / "awq")
    values["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "awq" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="quantised by 'awq', which is not read; give the"):
        pangea_jax.load(tmp_path / "awq")
    language = dataclasses.replace(CONFIG.language, width=20)
    config = dataclasses.replace(CONFIG, language=language)
    checkpoints.save(random_state(config), config, tmp_path / "odd", tokens=TOKENS)
    with pytest.raises(ValueError, match=r"has 20 inputs, which no group .*'int8'"):
        checkpoints.load(tmp_path / "odd", rounded.in_form(config, "int4"))


def test_adapters_are_merged_before_the_rounding(source, tmp_path):
    lora, C = LoraConfig(rank=2, targets=("q",)), checkpoints.config_from_folder(source).language
    shapes = {"a_ir": (C.layers, C.width, 2), "b_ro": (C.layers, 2, C.heads * C.head_width)}
    params = {f"language.blocks.q_lora.{n}": np.ones(s, np.float32) for n, s in shapes.items()}
    adapter.save(params, lora, tmp_path / "adapter", base=str(source))
    path = checkpoints.resolve(tmp_path / "adapter")
    config = in_form(source, "int8")
    found = rounded.whole(flatten(checkpoints.load(path, config)), config)
    name = "language.blocks.q_kernel_dhc"
    wanted = np.asarray(flatten(checkpoints.load(path))[name])
    assert np.abs(np.asarray(found[name]) - wanted).max() <= np.abs(wanted).max() / 127
    stored = checkpoints.load(source, config)
    checkpoints.save(stored, config, tmp_path / "int8", tokens=TOKENS)
    assert_equal(flatten(checkpoints.load(tmp_path / "int8")), flatten(stored))
    with pytest.raises(CheckpointError, match="weights in int8, into which no adapters are merged"):
        checkpoints.load(checkpoints.resolve(tmp_path / "adapter", tmp_path / "int8"))


def test_the_sample_model_answers_in_8_bits_as_in_float32():
    plain, narrow = (pangea_jax.load("sample", weights=form) for form in (None, "int8"))
    wanted, found = (engine.logits(QUESTION) for engine in (plain, narrow))
    relative = np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))
    assert 0 < relative < 0.03
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.9
