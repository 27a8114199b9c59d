"""The two scripts that pretrain the sample model, for a few steps each."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import sample_stage1, sample_tower
from pangea_jax.checkpoints import load
from pangea_jax.model import PangeaConfig
from pangea_jax.model.params import flatten
from pangea_jax.sample.pretraining import Stage1Config, TowerConfig
from pangea_jax.typed_config import build
from tests.launch.conftest import call


def run(script, *flags):
    """(exit code, standard output, standard error) on one device."""
    done = call(f"launch/{script}.py", *flags, XLA_FLAGS="")
    return done.returncode, done.stdout, done.stderr


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


def test_tower(tmp_path):
    small = ("--config.steps=6", "--config.batch_size=8", "--config.warmup_steps=1")
    code, out, err = run("pretrain_tower", f"--workdir={tmp_path}", *small, "--config.log_every=2")
    assert code == 0, err[-3000:]
    scores = json.loads(out[out.index("{") :])
    assert set(scores) == {"noto", "fluent", "emojione", "openmoji", "twemoji"}
    assert len(losses(tmp_path)) == 3
    vision = build(TowerConfig, sample_tower.get_config()).vision
    tower = load(tmp_path / "tower", PangeaConfig(vision=vision, pinpoints=()), only=["vision"])
    assert all(np.isfinite(value).all() for value in flatten(tower).values())


def test_stage1_learns(tmp_path):
    small = (
        *("--config.picture_passes=1", "--config.translation_passes=1", "--config.log_every=8"),
        *("--config.languages=('en','es')", "--config.sources=('emoji/noto',)"),
        *("--config.augmented_views=0", "--config.pipeline.rows=16"),
    )
    code, _, err = run("pretrain_sample", f"--workdir={tmp_path}", *small)
    assert code == 0, err[-3000:]
    found = losses(tmp_path)
    assert found[-1] < 0.6 * found[0]
    (file,) = (tmp_path / "stage1").glob("*.safetensors")
    model = build(Stage1Config, sample_stage1.get_config()).model
    vocabulary = (model.language.vocab_size, model.language.width)
    assert vocabulary in {value.shape for value in load_file(file).values()}


@pytest.mark.parametrize("script", ["pretrain_tower", "pretrain_sample"])
def test_an_unknown_key_is_named(script, tmp_path):
    code, _, err = run(script, f"--workdir={tmp_path}", "--config.sed=3")
    assert code == 1
    assert "error: config.sed is an unknown key; did you mean 'seed'?" in err
