"""The two scripts that pretrain the sample model, for a few steps each."""

import json
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from configs import sample_stage1, sample_tower
from pangea_jax.checkpoints import load
from pangea_jax.model import PangeaConfig, VisionTower
from pangea_jax.model import params as model_params
from pangea_jax.model.params import flatten
from pangea_jax.model.vision import normalize
from pangea_jax.sample import emoji, sources
from pangea_jax.sample.pretraining import Stage1Config, TowerConfig
from pangea_jax.typed_config import build
from tests.launch.conftest import call
from tests.sample.packages import write_package


def run(script, *flags):
    """(exit code, standard output, standard error) on one device."""
    done = call(f"launch/{script}.py", *flags)
    return done.returncode, done.stdout, done.stderr


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


@pytest.fixture
def packages(tmp_path):
    """Packages of two artists, one with code points and one with names, who draw a disc of another colour for each."""
    folder = tmp_path / "packages"
    folder.mkdir()
    names = {c.codepoint: re.sub(r"\W+", "-", c.names["en"]) for c in emoji.load_concepts()}
    bodies = {
        name: {"body": f'<circle cx="8" cy="8" r="7" fill="#{place:03x}"/>'}
        for place, name in enumerate(names.values())
    }
    for artist in sources.TOWER_ARTISTS:
        if artist.id in ("noto", "noto_v1"):
            path = folder / sources.archive_name(artist.package, artist.version)
            files = {
                "package.json": {"name": artist.package, "version": artist.version},
                "info.json": {"license": {"spdx": artist.spdx}},
                "icons.json": {"icons": bodies, "width": 16, "height": 16},
                "chars.json": {code: name for code, name in names.items() if artist.id == "noto"},
            }
            write_package(path, files)
    return folder


def test_tower(tmp_path, packages):
    small = (
        *("--config.first.steps=4", "--config.last.steps=2", "--config.batch_size=8"),
        *("--config.log_every=2", "--config.artists=('noto','noto_v1')"),
    )
    workdir = tmp_path / "run"
    code, out, err = run("pretrain_tower", f"--workdir={workdir}", f"--packages={packages}", *small)
    assert code == 0, err[-3000:]
    results = json.loads(out[out.index("{") :])
    assert set(results["artists"]) == {"noto", "noto_v1", "twemoji"}
    assert set(results["probe"]) == {"views", "test"}
    assert len(losses(workdir)) == 3
    vision = build(TowerConfig, sample_tower.get_config()).vision
    state = load(workdir / "tower", PangeaConfig(vision=vision, pinpoints=()), only=["vision"])
    tower = flatten(state)
    assert all(np.isfinite(value).all() for value in tower.values())
    # The saved features have unit scale.
    graphdef, _ = model_params.split(VisionTower(vision, rngs=nnx.Rngs(0)))
    names = {name.removeprefix("vision."): np.float32(value) for name, value in tower.items()}
    tiles = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    features = model_params.merge(graphdef, names)(normalize(tiles))
    assert 0.3 < float(np.sqrt(np.mean(np.square(features)))) < 3


def test_a_missing_package_and_an_unknown_artist_are_named(tmp_path):
    flags = (f"--workdir={tmp_path / 'run'}", f"--packages={tmp_path}")
    code, _, err = run("pretrain_tower", *flags)
    assert code == 1
    assert err.startswith("error: ") or "\nerror: " in err
    assert "iconify-json-noto-1.2.9.tgz is missing; leave out --packages to download it" in err
    code, _, err = run("pretrain_tower", *flags, "--config.artists=('twemoji',)")
    assert code == 1
    assert "error: config.artists: twemoji is not one of noto, fluent, " in err


def test_stage1_learns(tmp_path):
    small = (
        *("--config.picture_passes=1", "--config.text_plan.varieties=2", "--config.log_every=4"),
        *("--config.languages=('en',)", "--config.sources=('emoji/noto',)"),
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
