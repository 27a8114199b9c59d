"""The two stages of Pangea-7B with their own configs, at a small size. The second starts from the first."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.launch.conftest import call

ROOT = Path(__file__).parents[2]
# The sizes and data of the embedded sample. All other values come from the config of the stage.
SMALL = {
    "data.store": "emoji",
    "data.tokenizer": "emoji",
    "model.vision.image_size": 64,
    "model.vision.patch_size": 16,
    "model.vision.width": 160,
    "model.vision.layers": 4,
    "model.vision.heads": 5,
    "model.vision.mlp": 640,
    "model.vision.feature_layer": -1,
    "model.language.vocab_size": 5200,
    "model.language.width": 64,
    "model.language.layers": 2,
    "model.language.heads": 2,
    "model.language.kv_heads": 1,
    "model.language.head_width": 32,
    "model.language.mlp": 128,
    "pipeline.row_tokens": 512,
    "pipeline.threads": 2,
    "log_every": 1,
}


def train(config, workdir, **overrides):
    flags = [f"--config.{key}={value}" for key, value in (SMALL | overrides).items()]
    done = call(
        "launch/train.py", f"--config={config}", f"--workdir={workdir}", *flags, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(workdir / "model" / "model.safetensors")


@pytest.mark.slow
def test_projector_first_then_everything(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    first = train(
        "configs/pangea_7b_pretrain.py:num_examples=64",
        one,
        pretrained="('tower',)",
        **{"pipeline.rows": 4},
    )
    second = train(
        "configs/pangea_7b_finetune.py:num_examples=512",
        two,
        pretrained=f"('{one / 'model'}:vision+projector+language',)",
        **{"pipeline.rows": 4, "model.pinpoints": "((64,128),(128,64))"},
    )
    results = [json.loads((w / "results.json").read_text()) for w in (one, two)]
    assert results[0]["steps"] == 64 // 16
    assert results[0]["splits"] == {}
    projector = [name for name in first if "projector" in name]
    trained = sum(first[name].size for name in projector)
    assert results[0]["parameters"]["trained"] == trained == 160 * 64 + 64 + 64 * 64 + 64
    assert results[1]["parameters"]["frozen"] == 0
    start = load_file(ROOT / "pangea_jax" / "assets" / "sample_model" / "tower.safetensors")
    for name, value in start.items():
        # bfloat16 holds a frozen parameter.
        np.testing.assert_allclose(_like(first, name), value.astype(np.float32), rtol=2**-8)
    moved = [name for name in second if not np.array_equal(first[name], second[name])]
    assert any("vision" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert set(projector) <= set(moved)
    losses = [json.loads(line)["loss"] for line in (two / "metrics.jsonl").open()]
    assert np.isfinite(losses).all()


def _like(params, name):
    return next(value for key, value in params.items() if key.endswith(name)).astype(np.float32)
