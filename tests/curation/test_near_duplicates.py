"""Near-duplicates against all compared with all."""

import io
import itertools
import random
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")
pytest.importorskip("rensa", reason="rensa is in requirements-curation.txt")

from pangea_jax.curation import near_duplicates

from .samples import picture


def compared(items, alike):
    """What must stay, all compared with all."""
    return [not any(alike(item, other) for other in items[:n]) for n, item in enumerate(items)]


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_alike_pictures_are_found_exactly(distance):
    luck = random.Random(distance)
    hashes = [luck.getrandbits(64) for _ in range(150)]
    for _ in range(250):  # chains of neighbours, exact copies among them
        flips = luck.sample(range(64), luck.randrange(0, distance + 3))
        hashes.append(luck.choice(hashes) ^ sum(1 << bit for bit in flips))
    luck.shuffle(hashes)
    stays = near_duplicates.unlike_earlier_pictures(np.array(hashes, np.uint64), distance)
    assert stays.tolist() == compared(hashes, lambda a, b: (a ^ b).bit_count() <= distance)
    assert 150 <= stays.sum() < 400


def test_a_hundred_thousand_of_one_picture_take_no_time():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_500, dtype=np.uint64)
    hashes[500:] = hashes[0] ^ (np.uint64(1) << np.arange(100_000, dtype=np.uint64) % np.uint64(64))
    began = time.process_time()
    stays = near_duplicates.unlike_earlier_pictures(hashes)
    assert stays[:500].all() and not stays[500:].any()
    assert time.process_time() - began < 5


def test_no_items_are_no_duplicates():
    assert near_duplicates.unlike_earlier_pictures(np.zeros(0, np.uint64)).tolist() == []
    assert near_duplicates.unlike_earlier_pictures(np.array([5], np.uint64)).tolist() == [True]
    assert near_duplicates.unlike_earlier_texts([]).tolist() == []
    assert near_duplicates.unlike_earlier_texts(["", ""]).tolist() == [True, False]


def test_hashes_are_near_for_the_same_picture_and_far_for_others():
    hashes = [
        near_duplicates.perceptual_hash(Image.open(io.BytesIO(picture(seed)))) for seed in range(20)
    ]
    far = min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2))
    near = []
    for seed, hash in enumerate(hashes):
        again = Image.open(io.BytesIO(picture(seed, (500, 400), quality=40))).convert("RGB")
        near.append((near_duplicates.perceptual_hash(again) ^ hash).bit_count())
    assert max(near) <= near_duplicates.MAX_HASH_DISTANCE < 10 <= far


def jaccard(a, b):
    a, b = set(near_duplicates.shingles(a)), set(near_duplicates.shingles(b))
    return len(a & b) / len(a | b)


def test_texts_that_are_alike_are_found():
    luck = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(luck.choices(letters, k=6)) for _ in range(400)]
    texts = [" ".join(luck.sample(words, 40)) for _ in range(300)]
    same = [text.upper().replace(" ", "  ") + "!" for text in texts[:100]]
    near = [f"{text} {luck.choice(words)}" for text in texts[100:200]]
    less = [" ".join((*text.split()[:28], *luck.sample(words, 12))) for text in texts[200:]]
    assert min(jaccard(a, b) for a, b in zip(texts[100:], near, strict=False)) > 0.9
    assert max(jaccard(a, b) for a, b in zip(texts[200:], less, strict=False)) < 0.65
    assert max(jaccard(a, b) for a, b in itertools.combinations(texts[:60], 2)) < 0.4
    stays = near_duplicates.unlike_earlier_texts([*texts, *same, *near, *less])
    assert stays[:300].all() and not stays[300:500].any() and stays[500:].all()
    stays = near_duplicates.unlike_earlier_texts(["富士山と桜", "富士山と桜!", "京都の寺"])
    assert stays.tolist() == [True, False, True]
