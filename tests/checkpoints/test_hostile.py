"""Checkpoints that others wrote: what is wrong is one CheckpointError, before anything is allocated."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from pangea_jax import checkpoints
from pangea_jax.checkpoints import CheckpointError
from pangea_jax.checkpoints.config import config_from_folder
from pangea_jax.checkpoints.files import INDEX, TensorFiles, check_finite
from pangea_jax.model import PangeaConfig

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIG = {
    "model_type": "llava_next",
    "image_grid_pinpoints": [[28, 56], [56, 28]],
    "vision_config": VISION,
    "text_config": TEXT,
}
LLAVA = {
    "model_type": "qwen2",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[(336, 672), (672, 336)]",
}
RUN = {"vision": {"image_size": 28, "patch_size": 7}, "language": {}, "pinpoints": [[28, 56]]}


def write(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def test_the_configs_that_are_changed_here_are_sound(tmp_path):
    for content in (CONFIG, LLAVA, {"model": RUN}):
        assert config_from_folder(write(tmp_path, content)).pinpoints


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        "null",
        CONFIG | {"text_config": "qwen2"},
        CONFIG | {"text_config": ["qwen2"]},
        CONFIG | {"vision_config": "clip"},
        CONFIG | {"vision_config": 7},
        *(CONFIG | {"text_config": TEXT | change} for change in [
            {"num_hidden_layers": 10**9},
            {"num_hidden_layers": -1},
            {"num_hidden_layers": 2.5},
            {"num_hidden_layers": "2"},
            {"num_hidden_layers": True},
            {"num_attention_heads": 10**9},
            {"num_key_value_heads": "2"},
            {"num_key_value_heads": -2},
            {"head_dim": 7.5},
            {"head_dim": 10**12},
            {"vocab_size": 10**12},
            {"hidden_size": 10**30},
            {"rms_norm_eps": NAN},
            {"rms_norm_eps": INFINITE},
            {"rms_norm_eps": [1e-6]},
            {"rope_theta": NAN},
            {"rope_theta": -1.0},
            {"rope_parameters": {"rope_theta": NAN}},
            {"rope_parameters": {"rope_theta": "many"}},
            {"rope_parameters": "default"},
            {"model_type": ["qwen2"]},
            {"sliding_window": "wide", "use_sliding_window": True},
        ]),
        *(CONFIG | {"vision_config": VISION | change} for change in [
            {"image_size": 0},
            {"image_size": NAN},
            {"patch_size": 10**9},
            {"num_hidden_layers": 10**9},
            {"layer_norm_eps": NAN},
            {"num_attention_heads": 0},
        ]),
        *(CONFIG | {"image_grid_pinpoints": pinpoints} for pinpoints in [
            [[-28, 56]],
            [[0, 0]],
            [[28, 10**9]],
            [[28]],
            [[NAN, 28]],
            [[INFINITE, 28]],
            7,
            "()" * 9,
            "(" * 5_000,
            [[28, 56]] * 5_000,
            {"28": 56},
        ]),
        *(CONFIG | {"vision_feature_layer": layer} for layer in (10**9, -(10**9), [1], NAN)),
        *(LLAVA | change for change in [
            {"mm_vision_tower": ["openai"]},
            {"mm_vision_select_layer": "last"},
            {"mm_vision_select_layer": -(10**9)},
            {"image_grid_pinpoints": "[(-336, 672)]"},
            {"model_type": 7},
            {"num_hidden_layers": 10**9},
        ]),
        *({"model": RUN | change} for change in [
            {"language": {"layers": 10**9}},
            {"language": {"norm_eps": NAN}},
            {"language": {"kv_heads": 0}},
            {"language": "7B"},
            {"vision": {"image_size": "28"}},
            {"vision": None},
            {"pinpoints": [[-1, 28]]},
            {"dtype": "int8"},
            {"colour": 1},
        ]),
    ],
    ids=lambda content: str(content)[-60:],
)  # fmt: skip
def test_a_config_beyond_reason_is_one_error(tmp_path, content):
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        config_from_folder(write(tmp_path, content))
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[]", "null", *(json.dumps({"weight_map": part}) for part in (
        [], [["a", "b.safetensors"]], "a", None, 7, {"a": 7}, {"a": None},
        {"a": "../b.safetensors"}, {"a": "b\0.safetensors"}, {"a": "x" * 5_000 + ".safetensors"},
        {"a": "\ud800.safetensors"},
    ))],
    ids=lambda content: content[:40],
)  # fmt: skip
def test_an_index_that_is_none_is_one_error(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model.safetensors"])
def test_a_named_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    # A pipe is no file, so a folder with one alone has no weights.
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"named pipe|no model\.safe"):
        config_from_folder(tmp_path) if name == "config.json" else TensorFiles(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [NAN, -INFINITE])
def test_one_value_that_is_not_finite_is_found(tmp_path, dtype, value):
    for size in (1, (1 << 20) + 5):
        x = np.full(size, np.finfo(np.float16).max, dtype)
        assert check_finite(x[::-1], tmp_path, "w") is not None
        x[-1] = value
        with pytest.raises(CheckpointError, match="w has values that are NaN or infinite"):
            check_finite(x, tmp_path, "w")


@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    from safetensors.numpy import save_file

    config, only = PangeaConfig(), ("newline",)
    save_file({"image_newline": np.full(3584, 1.0, np.float32)}, tmp_path / "a.safetensors")
    assert checkpoints.load(tmp_path / "a.safetensors", config, only=only)
    save_file({"image_newline": np.full(3584, value, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: image_newline has values that are"):
        checkpoints.load(tmp_path / "b.safetensors", config, only=only)
