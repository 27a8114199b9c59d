import io

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from pangea_jax import sharding
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.data.store import RecordStore
from pangea_jax.model import VisionTower
from pangea_jax.model.vision import normalize
from pangea_jax.sample.augment import augment
from pangea_jax.sample.emoji import load_concepts
from pangea_jax.sample.features import frozen_features

WHITE = ReadingPolicy(background=(255, 255, 255))
KEYS = [f"noto/{concept.codepoint}" for concept in load_concepts()[:5]]


def drawing(number):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (24, 24, 4), np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    pictures = []
    for number, key in enumerate(KEYS):
        file = io.BytesIO()
        Image.fromarray(drawing(number)).save(file, "PNG")
        pictures.append(Picture(key, file.getvalue(), 24, 24))
    directory = tmp_path_factory.mktemp("store")
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={},
        images={"noto": iter(pictures)},
    )
    return RecordStore(directory)


@pytest.fixture(scope="module")
def tower(tiny_config):
    return jax.jit(lambda: VisionTower(tiny_config.vision, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def features(tower, store):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return frozen_features(tower, store, KEYS, mesh, WHITE, augmented=2, seed=7, batch_size=3)


def test_view_zero_is_the_original_picture(features, tower):
    for number, key in enumerate(KEYS):
        rgba = Image.fromarray(drawing(number))
        white = Image.new("RGBA", rgba.size, "white")
        tile = Image.alpha_composite(white, rgba).convert("RGB").resize((16, 16), Image.BICUBIC)
        expected = tower(normalize(np.asarray(tile)[None]))[0]
        assert features[key].shape == (3, 16, 32)
        assert features[key].dtype == np.float16
        # Compositing may round up or down by one level of 255.
        np.testing.assert_allclose(features[key][0], expected, atol=0.03)


def test_random_views_are_drawn_as_documented(features, tower):
    for view in (1, 2):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(7), view), len(KEYS))
        tiles = augment(np.stack([drawing(n) for n in range(len(KEYS))]), keys, size=16)
        expected = tower(normalize(tiles))
        for number, key in enumerate(KEYS):
            np.testing.assert_allclose(features[key][view], expected[number], atol=0.02)


@pytest.mark.parametrize(("sizes", "batch_size"), [((2, 4, 1), 8), ((1, 4, 2), 256)])
def test_mesh_and_batch_size_change_nothing(features, tower, store, sizes, batch_size):
    mesh = sharding.make_mesh(*sizes)
    again = frozen_features(
        tower, store, KEYS, mesh, WHITE, augmented=2, seed=7, batch_size=batch_size
    )
    assert list(again) == KEYS
    for key in KEYS:
        np.testing.assert_allclose(again[key], features[key], atol=0.02)


def test_another_seed_gives_other_views_of_the_same_pictures(features, tower, store):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    other = frozen_features(tower, store, KEYS, mesh, WHITE, augmented=1, seed=8, batch_size=3)
    for key in KEYS:
        assert np.array_equal(other[key][0], features[key][0])
        assert np.abs(other[key][1] - features[key][1]).max() > 0.1
    plain = frozen_features(tower, store, KEYS[:2], mesh, WHITE, augmented=0, batch_size=3)
    assert [value.shape[0] for value in plain.values()] == [1, 1]


def test_the_cache_gives_the_same_features_and_has_a_file_for_each_input(
    features, tower, store, tmp_path
):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    arguments = dict(augmented=2, batch_size=3, cache=tmp_path)
    for _ in range(2):
        cached = frozen_features(tower, store, KEYS, mesh, WHITE, seed=7, **arguments)
        assert list(cached) == KEYS
        for key in KEYS:
            np.testing.assert_array_equal(cached[key], features[key])
        assert len(list(tmp_path.iterdir())) == 1
    frozen_features(tower, store, KEYS, mesh, WHITE, seed=8, **arguments)
    other = jax.jit(lambda: VisionTower(tower.config, rngs=nnx.Rngs(1)))()
    frozen_features(other, store, KEYS, mesh, WHITE, seed=7, **arguments)
    frozen_features(tower, store, KEYS[:4], mesh, WHITE, seed=7, **arguments)
    assert len({file.suffix for file in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_only_prevents_the_cache(features, tower, store, tmp_path, monkeypatch):
    def save(file, values, **_):
        file.write(b"the first bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pangea_jax.sample.features.np.save", save)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = frozen_features(
        tower, store, KEYS, mesh, WHITE, augmented=2, seed=7, batch_size=3, cache=tmp_path
    )
    for key in KEYS:
        np.testing.assert_array_equal(found[key], features[key])
    assert not list(tmp_path.iterdir())


def test_features_come_from_the_cache(tower, store, tmp_path, monkeypatch):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    arguments = dict(augmented=0, batch_size=3, cache=tmp_path)
    first = frozen_features(tower, store, KEYS, mesh, WHITE, **arguments)
    monkeypatch.setattr("pangea_jax.sample.features._compute", None)
    second = frozen_features(tower, store, KEYS, mesh, WHITE, **arguments)
    np.testing.assert_array_equal(first[KEYS[0]], second[KEYS[0]])
