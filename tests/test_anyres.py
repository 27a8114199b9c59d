"""Compares the any-resolution geometry with published counts and the reference packing."""

import numpy as np
import pytest

from pangea_jax.anyres import best_resolution, layout

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# size, canvas, tiles, features without padding, picture tokens; from LLaVA-NeXT's own functions.
GOLDEN = [
    ((336, 336), (336, 672), 3, (24, 24), 1176),
    ((224, 224), (336, 672), 3, (24, 24), 1176),
    ((640, 480), (672, 672), 5, (48, 36), 2340),
    ((480, 640), (672, 672), 5, (36, 48), 2352),
    ((1024, 768), (672, 672), 5, (48, 36), 2340),
    ((1920, 1080), (672, 672), 5, (48, 28), 1948),
    ((1080, 1920), (672, 672), 5, (28, 48), 1968),
    ((1000, 300), (1008, 336), 4, (72, 22), 2182),
    ((300, 1000), (336, 1008), 4, (22, 72), 2232),
    ((2000, 400), (1008, 336), 4, (72, 14), 1598),
    ((500, 333), (672, 336), 3, (36, 24), 1464),
    ((100, 100), (336, 672), 3, (24, 24), 1176),
    ((4096, 4096), (672, 672), 5, (48, 48), 2928),
    ((1008, 336), (1008, 336), 4, (72, 24), 2328),
    ((672, 336), (672, 336), 3, (48, 24), 1752),
    ((336, 672), (336, 672), 3, (24, 48), 1776),
    ((640, 426), (672, 672), 5, (48, 32), 2144),
    ((333, 500), (336, 672), 3, (24, 36), 1476),
    ((1200, 627), (672, 672), 5, (48, 26), 1850),
]


@pytest.mark.parametrize(("size", "canvas", "tiles", "features", "tokens"), GOLDEN)
def test_golden_sizes(size, canvas, tiles, features, tokens):
    found = layout(size, PINPOINTS, 336, 24)
    assert (found.canvas, found.num_tiles, found.features) == (canvas, tiles, features)
    assert found.image_index.shape == (tokens,)


def test_first_of_equally_good_canvases_wins():
    assert best_resolution((100, 100), PINPOINTS) == (336, 672)
    assert best_resolution((100, 100), PINPOINTS[1::-1]) == (672, 336)


def test_order_of_tokens_in_a_picture_small_enough_to_read():
    # One row of two tiles of 2 x 2 patches. The image covers both rows of patches.
    found = layout((4, 2), ((4, 2),), 2, 2)
    base = [1, 2, 3, 4]
    first_line, second_line = [5, 6, 9, 10, 0], [7, 8, 11, 12, 0]
    assert found.image_index.tolist() == base + first_line + second_line


def test_single_view_ends_with_one_newline():
    found = layout((640, 480), (), 336, 24)
    assert (found.num_tiles, found.canvas) == (1, None)
    assert found.image_index.tolist() == [*range(1, 577), 0]
    assert layout((640, 480), (), 336, 24, newline=False).image_index.tolist() == [*range(1, 577)]


def test_extreme_panorama_keeps_the_base_view_alone():
    found = layout((5000, 10), PINPOINTS, 336, 24)
    assert found.features == (72, 0)
    assert found.image_index.tolist() == [*range(1, 577)]


def test_index_is_shared_and_read_only():
    found = layout((640, 480), PINPOINTS, 336, 24)
    assert layout((640, 480), [list(p) for p in PINPOINTS], 336, 24) is found
    with pytest.raises(ValueError, match="read-only"):
        found.image_index[0] = 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 5), PINPOINTS, 336, 24), "at least 1 x 1"),
        (((5, 5), ((336, 500),), 336, 24), r"pinpoint \(336, 500\)"),
        (((5, 5), PINPOINTS, 336, 24, "nearest"), "rounding 'nearest'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        layout(*arguments)


def reference_index(model, size, tiles, patches, newline_value):
    """The reference's packing. Each feature has its own index as its value."""
    torch = pytest.importorskip("torch")
    features = torch.arange(1, 1 + tiles * patches, dtype=torch.float64).reshape(tiles, patches, 1)
    packed, _ = model.model.pack_image_features(
        [features],
        [torch.tensor(size[::-1])],
        vision_feature_select_strategy="default",
        image_newline=torch.tensor([newline_value], dtype=torch.float64),
    )
    return packed[0][:, 0].long().numpy()


def test_index_equals_reference_packing(make_reference):
    model = make_reference().model
    pinpoints = [(w, h) for h, w in model.config.image_grid_pinpoints]
    sizes = np.exp(np.random.default_rng(0).uniform(np.log(2), np.log(4000), (300, 2))).astype(int)
    for size in map(tuple, sizes.tolist()):
        found = layout(size, pinpoints, 28, 4, rounding="transformers")
        expected = reference_index(model, size, found.num_tiles, 16, 0.0)
        np.testing.assert_array_equal(found.image_index, expected, err_msg=str(size))


def test_roundings_differ_where_a_product_falls_just_below_a_whole_number():
    # 1722 * (24 / 656) is 62.99999999999999 in float64 and 63 exactly.
    assert layout((1722, 656), PINPOINTS, 336, 24).features == (62, 24)
    assert layout((1722, 656), PINPOINTS, 336, 24, "transformers").features == (64, 24)
