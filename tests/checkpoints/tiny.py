"""Checkpoints of a small model, and functions that compare them."""

import dataclasses
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pangea_jax import checkpoints
from pangea_jax.checkpoints import SpecialTokens, huggingface
from pangea_jax.checkpoints.huggingface import abstract_state
from pangea_jax.model import LanguageConfig, PangeaConfig, VisionConfig, lora
from pangea_jax.model.params import flatten
from pangea_jax.train.resume import Checkpoints
from pangea_jax.train.state import TrainState

TOKENS = SpecialTokens(image=96, end=1, pad=0)
CONFIG = PangeaConfig(
    vision=VisionConfig(image_size=28, patch_size=7, width=32, layers=3, heads=4, mlp=48),
    language=LanguageConfig(
        vocab_size=97, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp=48
    ),
    pinpoints=((28, 56), (56, 28), (84, 28)),
)


def with_language(**changes) -> PangeaConfig:
    """`CONFIG` with another decoder."""
    return dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, **changes))


def random_state(config, seed=0, dtype=jnp.float32):
    """A state in which all parameters differ. With zeros a swap would not be noticed."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape), dtype), abstract_state(config)
    )


def save_in_shards(*args, max_bytes=60_000, **kwargs):
    """`checkpoints.save` with several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "MAX_SHARD_BYTES", max_bytes)
        checkpoints.save(*args, **kwargs)


def write_run(folder, config, params, base=""):
    """The work directory of a run in which only the adapters were trained; with `base` its checkpoints hold no more."""
    content = {"model": dataclasses.asdict(config), "data": {"tokenizer": "emoji"}}
    content |= {"checkpoint": {"base": base}, "frozen": list(lora.FROZEN)}
    (folder / "config.json").write_text(json.dumps(content))
    adapters = {name: x for name, x in params.items() if "_lora." in name}
    others = {name: x for name, x in params.items() if name not in adapters}
    saved = Checkpoints(folder / "checkpoints", keep=1, base=base)
    data = iter(grain.MapDataset.range(3).to_iter_dataset())
    saved.save(TrainState(jnp.int32(7), adapters, others, {}), data, {"train": 1.0})
    saved.close()
    return folder


def tensors(folder):
    """All tensors of a folder by name."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_state(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
