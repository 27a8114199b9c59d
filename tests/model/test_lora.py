"""Adapters start at zero, compute the same as merged kernels, and are the only parameters that learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pangea_jax import checkpoints, sharding
from pangea_jax.batch import Batch
from pangea_jax.checkpoints import CheckpointError, SpecialTokens, huggingface
from pangea_jax.checkpoints.convert import convert
from pangea_jax.model import LoraConfig, Pangea, lora
from pangea_jax.model import params as model_params
from pangea_jax.train import optimizer as optim
from pangea_jax.train.flops import train_flops
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step


@pytest.fixture(scope="module")
def tiny_batch(tiny_config):
    """Eight rows, each with a picture of one tile and words."""
    rng = np.random.default_rng(0)
    patches, T = tiny_config.vision.patches, 20
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (8, T))
    tokens = rng.integers(4, tiny_config.language.vocab_size, place.shape, np.int32)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        weights=(place >= patches + 1).astype(np.float32),
        image_index=np.where(place <= patches, place, -1).astype(np.int32),
        positions=place,
        segment_ids=np.ones_like(place),
        tiles=rng.integers(0, 256, (8, 1, 16, 16, 3), np.uint8),
    )


@pytest.fixture
def adapted(tiny_config):
    """(config with adapters, its parameters with every adapter random)."""
    language = dataclasses.replace(tiny_config.language, lora=LoraConfig(rank=3, alpha=6.0))
    config = dataclasses.replace(tiny_config, language=language)
    graphdef, params = model_params.split(Pangea(config, rngs=nnx.Rngs(0)))
    key = jax.random.key(1)
    for i, name in enumerate(sorted(params)):
        if name.endswith(".b_ro"):
            noise = jax.random.normal(jax.random.fold_in(key, i), params[name].shape)
            params[name] = 0.3 * noise
    return config, graphdef, params


def hidden(graphdef, params, batch):
    return model_params.merge(graphdef, params).hidden(batch)


def test_an_adapter_of_every_kernel_starts_as_nothing(tiny_config, tiny_batch, adapted):
    config, graphdef, _ = adapted
    params = model_params.split(Pangea(config, rngs=nnx.Rngs(0)))[1]
    names = {name.split(".")[2] for name in params if "_lora." in name}
    assert names == {f"{target}_lora" for target in lora.TARGETS}
    plain = {name: value for name, value in params.items() if "_lora." not in name}
    base = model_params.abstract(lambda: Pangea(tiny_config, rngs=nnx.Rngs(0)))[0]
    np.testing.assert_array_equal(
        hidden(graphdef, params, tiny_batch), hidden(base, plain, tiny_batch)
    )


def test_merged_kernels_compute_the_same(tiny_config, tiny_batch, adapted):
    config, graphdef, params = adapted
    merged = lora.merge(params, config.language.lora)
    base, shapes = model_params.abstract(lambda: Pangea(tiny_config, rngs=nnx.Rngs(0)))
    assert {n: v.shape for n, v in merged.items()} == {n: v.shape for n, v in shapes.items()}
    with_adapters = hidden(graphdef, params, tiny_batch)
    np.testing.assert_allclose(
        with_adapters, hidden(base, merged, tiny_batch), rtol=1e-4, atol=1e-4
    )
    without = {name: v for name, v in params.items() if "_lora." not in name}
    assert np.abs(with_adapters - hidden(base, without, tiny_batch)).max() > 1e-2


def test_merging_is_the_product_in_float64(adapted):
    config, _, params = adapted
    merged = lora.merge(params, config.language.lora)
    a, b = (np.float64(params[f"language.blocks.o_lora.{x}"]) for x in ("a_ir", "b_ro"))
    kernel = np.float64(params["language.blocks.o_kernel_hcd"])
    wanted = kernel + 2.0 * np.einsum("lir,lro->lio", a, b).reshape(kernel.shape)
    np.testing.assert_allclose(merged["language.blocks.o_kernel_hcd"], wanted, rtol=1e-5, atol=1e-5)


def test_a_saved_model_has_its_adapters_merged_and_starts_another(adapted, tmp_path):
    config, _, params = adapted
    tokens = SpecialTokens(image=1, end=2, pad=3)
    huggingface.save(model_params.unflatten(params), config, tmp_path, tokens=tokens)
    saved = checkpoints.config_from_folder(tmp_path)
    assert saved.language.lora.rank == 0
    read = model_params.flatten(checkpoints.load(tmp_path, config))
    for name, value in lora.merge(params, config.language.lora).items():
        np.testing.assert_array_equal(read.pop(name), value, err_msg=name)
    assert not read


def test_only_adapters_learn_and_the_rest_is_bfloat16(tiny_config, tiny_batch):
    language = dataclasses.replace(
        tiny_config.language, lora=LoraConfig(rank=2, targets=("q", "down"))
    )
    config = dataclasses.replace(tiny_config, language=language, dtype="bfloat16")
    optimizer = optim.make_optimizer(optim.OptimizerConfig(learning_rate=0.05), 20)
    mesh = sharding.make_mesh(fsdp=2, tensor=2, data=2)
    graphdef, state, shardings = init_state(config, optimizer, mesh, seed=0, frozen=lora.FROZEN)
    assert len(state.trainable) == 4 and all("_lora." in name for name in state.trainable)
    assert {value.dtype.name for value in state.frozen.values()} == {"bfloat16"}
    before = {name: np.asarray(value) for name, value in state.params.items()}
    step = make_train_step(graphdef, optimizer, shardings, mesh)
    losses = []
    for _ in range(12):
        state, metrics = step(state, tiny_batch.place(mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    for name, value in state.params.items():
        same = np.array_equal(np.asarray(value), before[name])
        assert same == ("_lora." not in name), name


def test_gradients_are_those_of_the_merged_kernel(tiny_batch, adapted):
    """By the chain rule: with W' = W + s A B, dA = s dW' B^T and dB = s A^T dW'."""
    config, graphdef, params = adapted
    base, _ = model_params.abstract(
        lambda: Pangea(huggingface.without_adapters(config), rngs=nnx.Rngs(0))
    )

    T, D = tiny_batch.tokens.shape[1], config.language.width
    weights = jax.random.normal(jax.random.key(2), (T, D))

    def loss(graphdef):
        return lambda params: jnp.sum(hidden(graphdef, params, tiny_batch) * weights)

    found = jax.grad(loss(graphdef))(params)
    dense = jax.grad(loss(base))(lora.merge(params, config.language.lora))
    for target, kernel in (("q", "q_kernel_dhc"), ("o", "o_kernel_hcd"), ("up", "up_kernel_df")):
        stem = f"language.blocks.{target}_lora."
        a, b = params[stem + "a_ir"], params[stem + "b_ro"]
        slope = dense[f"language.blocks.{kernel}"].reshape(len(a), a.shape[1], b.shape[2])
        for name, wanted in (
            ("a_ir", 2.0 * jnp.einsum("lio,lro->lir", slope, b)),
            ("b_ro", 2.0 * jnp.einsum("lir,lio->lro", a, slope)),
        ):
            size = np.abs(wanted).max()
            np.testing.assert_allclose(found[stem + name], wanted, atol=1e-4 * size, err_msg=name)


def test_flops_of_adapters(tiny_config):
    """A frozen kernel costs its product and the gradient of its input; an adapter also costs its own gradient."""
    language = dataclasses.replace(tiny_config.language, lora=LoraConfig(rank=2, targets=("up",)))
    config = dataclasses.replace(tiny_config, language=language)
    _, shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))
    counts = train_flops(
        config, shapes, tokens=10, row_tokens=10, tiles=0, targets=1, frozen=lora.FROZEN
    )
    kernels = sum(
        v.size for n, v in shapes.items() if n.startswith("language.blocks.") and "_kernel_" in n
    )
    adapters = sum(v.size for n, v in shapes.items() if "_lora." in n)
    assert counts["language"] == 2 * 10 * (2 * kernels + 3 * adapters)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="some of q, k"):
        LoraConfig(rank=4, targets=("query",))
    with pytest.raises(ValueError, match="rank -1"):
        LoraConfig(rank=-1)


def test_a_run_with_adapters_has_no_public_layout(adapted, tmp_path, emoji_tokenizer):
    """The config shows it, so nothing else is read."""
    config, _, _ = adapted
    (tmp_path / "config.json").write_text(
        json.dumps({"model": dataclasses.asdict(config), "data": {"tokenizer": "emoji"}})
    )
    with pytest.raises(CheckpointError, match="model/ has the merged weights"):
        convert(tmp_path, tmp_path / "out", emoji_tokenizer, tokenizer_files=tmp_path, form="hf")
