"""Adapters in peft's layout: peft loads them, and its forward and backward pass equal ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pangea_jax import checkpoints
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import CheckpointError, adapter
from pangea_jax.model import LoraConfig, Pangea, lora
from pangea_jax.model import params as model_params
from pangea_jax.model.params import flatten, unflatten
from tests.checkpoints.tiny import (
    CONFIG,
    TOKENS,
    assert_same_state,
    random_state,
    with_language,
    write_run,
)

TOLERANCE = 1e-4
T = 24


@pytest.fixture(scope="module", params=[lora.TARGETS, ("q", "down")], ids=["all", "two"])
def adapted(request, make_reference):
    """The reference's weights with random adapters: (reference, config, graphdef, parameters)."""
    reference = make_reference("qwen2", False)
    config = dataclasses.replace(checkpoints.config_from_folder(reference.folder), dtype="float32")
    language = dataclasses.replace(
        config.language, lora=LoraConfig(rank=3, alpha=6.0, targets=request.param)
    )
    config = dataclasses.replace(config, language=language)
    graphdef, params = model_params.split(Pangea(config, rngs=nnx.Rngs(0)))
    params |= model_params.flatten(checkpoints.load(reference.folder, config))
    random = np.random.default_rng(0)
    for name in params:
        if "_lora." in name:
            noise = 0.2 * random.normal(size=params[name].shape)
            params[name] = jnp.asarray(noise, jnp.float32)
    return reference, config, graphdef, params


@pytest.fixture(scope="module")
def batch():
    """Two rows of words, and a loss as weights of their logits."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, 90, (2, T), np.int32)
    return Batch(
        tokens=tokens,
        positions=np.tile(np.arange(T, dtype=np.int32), (2, 1)),
        segment_ids=np.ones_like(tokens),
        image_index=np.full_like(tokens, -1),
        tiles=np.zeros((2, 1, 28, 28, 3), np.uint8),
    )


def divide(params):
    """The adapters, and all other parameters."""
    adapters = {name: x for name, x in params.items() if "_lora." in name}
    return adapters, {name: x for name, x in params.items() if name not in adapters}


def peft_model(reference, folder):
    """A new copy of the reference with the adapters of a folder, because peft changes the model that it gets."""
    peft = pytest.importorskip("peft", reason="peft is in requirements-parity.txt")
    base = type(reference.model).from_pretrained(reference.folder).eval()
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def test_peft_computes_the_same_logits_and_gradients(adapted, batch, tmp_path):
    import torch

    reference, config, graphdef, params = adapted
    adapter.save(params, config.language.lora, tmp_path)
    theirs = peft_model(reference, tmp_path)
    weights = np.random.default_rng(2).normal(size=(2, T, 97)).astype(np.float32)

    def loss(adapters, others):
        logits = model_params.merge(graphdef, adapters | others)(batch)
        return jnp.sum(logits * weights), logits

    adapters, others = divide(params)
    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(adapters, others)
    found = theirs(input_ids=torch.tensor(batch.tokens).long()).logits
    (found * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(logits, found.detach().numpy(), rtol=0, atol=TOLERANCE)
    with torch.no_grad(), theirs.disable_adapter():
        plain = theirs(input_ids=torch.tensor(batch.tokens).long()).logits
    assert np.abs(logits - plain.numpy()).max() > 0.1  # the adapters change the logits

    slopes = {name: x.grad for name, x in theirs.named_parameters() if x.requires_grad}
    assert len(slopes) == sum(len(x) for x in grads.values())
    for name, ours in grads.items():
        stem, _, matrix = name.removeprefix("language.blocks.").partition("_lora.")
        matrix = {"a_ir": "lora_A", "b_ro": "lora_B"}[matrix]
        for layer, slope in enumerate(ours):
            (key,) = (
                k for k in slopes if f"layers.{layer}." in k and f".{stem}_proj.{matrix}" in k
            )
            wanted = slopes[key].numpy().T
            error = np.abs(slope - wanted).max()
            assert error <= TOLERANCE * np.abs(wanted).max(), (key, error)


def test_names_and_shapes_are_those_of_peft(adapted, tmp_path):
    """The names are listed here as peft writes them, and not taken from the table."""
    _, config, _, params = adapted
    adapter.save(params, config.language.lora, tmp_path, base="neulab/Pangea-7B-hf")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    targets = config.language.lora.targets
    assert len(tensors) == 2 * len(targets) * config.language.layers
    stem = "base_model.model.model.language_model.layers.1."
    assert tensors[f"{stem}self_attn.q_proj.lora_A.weight"].shape == (3, 32)
    assert tensors[f"{stem}mlp.down_proj.lora_B.weight"].shape == (32, 3)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["bias"]) == (3, 6.0, "none")
    assert found["base_model_name_or_path"] == "neulab/Pangea-7B-hf"


@pytest.fixture(scope="module")
def run(adapted, tmp_path_factory):
    """The work directory of a run that trained the adapters."""
    _, config, _, params = adapted
    return write_run(tmp_path_factory.mktemp("run"), config, params)


def test_the_adapters_of_a_run_are_converted(adapted, run, tmp_path):
    _, config, _, params = adapted
    adapter.save(params, config.language.lora, tmp_path / "wanted")
    adapter.convert(run, tmp_path / "out")
    wanted, found = (load_file(tmp_path / n / adapter.WEIGHTS) for n in ("wanted", "out"))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    with pytest.raises(FileExistsError, match="give another --to"):
        adapter.convert(run, tmp_path / "out")


def test_the_base_is_the_model_that_the_run_started_from(adapted, run, tmp_path):
    _, config, _, _ = adapted
    model = dataclasses.asdict(config)

    def base(**values):
        return adapter.base_of({"model": model} | values)

    assert base(pretrained=["neulab/Pangea-7B-hf"]) == "neulab/Pangea-7B-hf"
    assert base(pretrained=["tower", "model"]) == "sample"
    assert base(pretrained=["DIR:vision", "DIR:language"]) == ""
    # The run below names no model; adapters that train on have its base, others its merged model.
    assert base(init_from=str(run)) == ""
    other = dataclasses.replace(config.language, lora=LoraConfig(rank=9))
    changed = dataclasses.asdict(dataclasses.replace(config, language=other))
    assert base(init_from=str(run), model=changed) == str(run / "model")


def test_adapters_are_read_to_train_on(adapted, tmp_path):
    reference, config, _, params = adapted
    adapter.save(params, config.language.lora, tmp_path, base=str(reference.folder))
    found = adapter.load(tmp_path, config)
    wanted, _ = divide(params)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    other = dataclasses.replace(config.language, lora=LoraConfig(rank=2))
    with pytest.raises(CheckpointError, match="has rank and scale"):
        adapter.load(tmp_path, dataclasses.replace(config, language=other))
    fewer = dataclasses.replace(config.language.lora, targets=("q",))
    with pytest.raises(
        CheckpointError, match=r"which config.model.language.lora.targets does not train"
    ):
        adapter.load(
            tmp_path,
            dataclasses.replace(config, language=dataclasses.replace(config.language, lora=fewer)),
        )


def test_what_has_no_adapters_is_refused(adapted, tmp_path):
    reference, _, _, params = adapted
    with pytest.raises(CheckpointError, match="is no training run with adapters"):
        adapter.convert(reference.folder, tmp_path / "out")
    _, plain = divide(params)
    with pytest.raises(ValueError, match="no adapters to save"):
        adapter.save(plain, LoraConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_saves_adapters_alone_is_read_with_its_base(tmp_path):
    """All parameters are those of the run; without the base, the error names both."""
    config = with_language(lora=LoraConfig(rank=2, targets=("q", "down")))
    base, run = tmp_path / "base", tmp_path / "run"
    below = random_state(CONFIG)
    checkpoints.save(below, CONFIG, base, tokens=TOKENS)
    params = flatten(random_state(config, seed=1)) | flatten(below)
    run.mkdir()
    write_run(run, config, params, base=str(base))
    stored = {path.name for path in (run / "checkpoints" / "7" / "state").iterdir()}
    assert not any(name.startswith("frozen") for name in stored)
    assert_same_state(checkpoints.load(run), unflatten(params))
    projector = flatten(checkpoints.load(run, only=["projector"]))
    assert {name.partition(".")[0] for name in projector} == {"projector"}
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"was trained on {base}: there is no folder {base}"):
        checkpoints.load(run)
