import dataclasses

import jax
import numpy as np
import pytest

from pangea_jax.sample.augment import MILD, STRONG, Views, augment

SIDE = 64


@pytest.fixture(scope="module")
def square():
    """An opaque black square in the middle of a transparent drawing."""
    drawing = np.zeros((SIDE, SIDE, 4), np.uint8)
    drawing[20:44, 20:44, 3] = 255
    return drawing


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), 64)


def views(drawings, keys, size=48, how=MILD):
    return np.asarray(augment(drawings, keys, size=size, how=how))


def test_a_view_depends_on_its_own_drawing_and_key_alone(square, keys):
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 256, (64, SIDE, SIDE, 4), np.uint8)
    drawings[5] = square
    among_others = views(drawings, keys)
    assert among_others.shape == (64, 48, 48, 3)
    assert among_others.dtype == np.uint8
    # For another batch size, XLA may round a pixel differently.
    alone = views(drawings[5:6], keys[5:6])[0].astype(int)
    assert np.abs(alone - among_others[5]).max() <= 1
    assert np.array_equal(among_others, views(drawings, keys))
    assert len({view.tobytes() for view in views(np.stack([square] * 64), keys)}) == 64


def test_transparent_pixels_do_not_show_their_colour(square, keys):
    coloured = square.copy()
    coloured[square[..., 3] == 0, :3] = (255, 0, 200)
    assert np.array_equal(
        views(np.stack([square] * 64), keys), views(np.stack([coloured] * 64), keys)
    )


def test_half_of_the_backgrounds_are_white(keys):
    # An empty drawing is all background.
    empty = views(np.zeros((64, SIDE, SIDE, 4), np.uint8), keys)
    assert (empty == empty[:, :1, :1]).all()
    # Contrast and brightness shift white, but keep it lighter than most random colours.
    light = empty[:, 0, 0].mean(axis=-1) > 200
    assert 0.3 < light.mean() < 0.7


def shown(view):
    """The pixels of the square: they differ from the corner by half of the contrast."""
    distance = np.abs(view.astype(int) - view[0, 0].astype(int)).sum(-1)
    return distance > distance.max() / 2 if distance.max() > 40 else None


def test_size_and_place_stay_within_the_documented_limits(square, keys):
    masks = [m for m in map(shown, views(np.stack([square] * 64), keys, SIDE)) if m is not None]
    assert len(masks) > 50
    areas = np.array([mask.mean() for mask in masks]) / (24 / SIDE) ** 2
    # Shear times turn adds at most 1 / (1 - 0.2 sin 0.35) to the square of the scale.
    assert areas.min() > 0.8**2 * 0.9
    assert areas.max() < 1.3**2 * 1.1
    assert areas.max() / areas.min() > 1.5
    centres = np.array([np.mean(np.nonzero(mask), axis=1) for mask in masks]) - (SIDE - 1) / 2
    # 8 % of the side, enlarged up to 1.3 / (stretch 0.82) and sheared.
    assert 2 < np.abs(centres).max() < 0.08 * SIDE * 1.3 * 1.25 * 1.3


def test_about_half_are_mirrored(keys):
    drawing = np.zeros((SIDE, SIDE, 4), np.uint8)
    drawing[16:48, 16:32, 3] = 255
    masks = [m for m in map(shown, views(np.stack([drawing] * 64), keys, SIDE)) if m is not None]
    right = [np.mean(np.nonzero(mask)[1]) > SIDE / 2 for mask in masks]
    assert 0.3 < np.mean(right) < 0.7


def test_views_of_a_drawing_look_like_it_on_average(keys):
    # Random views must not lose the drawing: their mean correlates with the drawing on white.
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    coarse = np.where(np.abs(np.arange(SIDE) - 31.5)[:, None, None] < 24, coarse, coarse // 2)
    symmetric = np.maximum(coarse, coarse[:, ::-1])
    drawing = np.dstack([symmetric, np.full((SIDE, SIDE), 255, np.uint8)])
    mean = views(np.stack([drawing] * 64), keys, SIDE).mean(0)
    inner = (slice(12, 52), slice(12, 52))
    correlation = np.corrcoef(mean[inner].ravel(), symmetric[inner].ravel())[0, 1]
    assert correlation > 0.7


STILL = Views(
    smaller=0.0,
    larger=0.0,
    stretch=0.0,
    turn=0.0,
    shear=0.0,
    shift=0.0,
    mix=0.0,
    contrast=0.0,
    brightness=0.0,
    grey=0.0,
)


def test_without_changes_a_view_is_the_drawing_or_its_mirror_image(keys):
    rng = np.random.default_rng(2)
    drawing = rng.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    drawing[..., 3] = 255
    seen = set()
    for view in views(np.stack([drawing] * 64), keys, SIDE, STILL):
        mirrored = np.abs(view.astype(int) - drawing[..., :3]).max() > 1
        seen.add(mirrored)
        expected = drawing[:, ::-1, :3] if mirrored else drawing[..., :3]
        assert np.abs(view.astype(int) - expected).max() <= 1
    assert seen == {True, False}


def test_strong_views_differ_more_than_mild_ones(square, keys):
    def spread(how):
        masks = [shown(view) for view in views(np.stack([square] * 64), keys, SIDE, how)]
        areas = [mask.mean() for mask in masks if mask is not None]
        return np.std(np.log(areas))

    assert spread(STRONG) > 1.3 * spread(MILD)


def test_turned_hues_keep_grey_and_lightness(keys):
    how = dataclasses.replace(STILL, hue=1.0)
    colours = np.zeros((64, SIDE, SIDE, 4), np.uint8)
    colours[:, : SIDE // 2] = (150, 120, 120, 255)
    colours[:, SIDE // 2 :] = (90, 90, 90, 255)
    found = views(colours, keys, SIDE, how).astype(int)
    assert (np.abs(found[:, -1, 0] - 90) <= 1).all()
    red, green, blue = found[:, 0, 0].T
    assert (np.abs(red + green + blue - 390) <= 3).all()
    for channel in (red, green, blue):
        assert (channel > 140).any()


def test_erased_rectangles(keys):
    how = dataclasses.replace(STILL, erased=0.5, largest_hole=0.4)
    white = np.full((64, SIDE, SIDE, 4), 255, np.uint8)
    holes = (views(white, keys, SIDE, how) < 255).any(-1)
    erased = holes.any((1, 2))
    assert 0.3 < erased.mean() < 0.7
    for hole in holes[erased]:
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns  # whole
        assert max(rows, columns) <= 0.4 * SIDE + 1
