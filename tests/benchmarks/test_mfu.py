"""benchmarks/mfu.py on a CPU: it runs the real step, but the MFU is unknown."""

import jax
import numpy as np
import pytest

from benchmarks import mfu
from configs import ablate_en_ratio, rehearsal
from pangea_jax import experiment, sharding
from pangea_jax.experiment import Experiment
from pangea_jax.typed_config import build


@pytest.fixture
def config():
    """A tiny model that reads tiles, with rows short enough for a CPU."""
    config = rehearsal.get_config()
    config.pipeline.update(rows=2, row_tokens=64, row_tiles=2)
    config.model.language.vocab_size = 512
    return config


def test_steps_are_measured(config):
    found = mfu.measure(build(Experiment, config), steps=2)
    assert found["rows"] == 8 and found["row_tokens"] == 64  # padded to eight devices
    assert found["tokens_per_s"] == pytest.approx(8 * 64 / found["step_s"])
    assert found["mfu"] is None  # the peak of a CPU is unknown
    assert found["losses"][1] < found["losses"][0]
    parts = found["model_flops"]
    rate = parts["total"] / found["step_s"] / found["devices"]
    assert found["tflops_per_device"] * 1e12 == pytest.approx(rate)
    text = mfu.describe(found)
    assert "8 x cpu" in text and "MFU       unknown" in text


@pytest.mark.parametrize("make", [rehearsal.get_config, ablate_en_ratio.get_config])
def test_the_batch_is_full_rows_of_whole_conversations(make):
    exp, mesh = build(Experiment, make()), sharding.make_mesh()
    batch = mfu.make_batch(exp, mesh)
    shapes = experiment.batch_shapes(exp, mesh)
    assert jax.tree.structure(batch) == jax.tree.structure(shapes)
    for found, wanted in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert batch.segment_ids.min() > 0
    assert batch.image_index.max() <= batch.pictures.shape[1] * exp.model.vision.patches
    assert not np.any(batch.weights[batch.image_index >= 0])
    targets = exp.pipeline.max_targets
    assert targets is None or (batch.weights > 0).sum(axis=1).max() <= targets
