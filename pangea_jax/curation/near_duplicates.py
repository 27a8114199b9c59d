"""Finds pictures and texts that resemble an earlier one, among millions: perceptual hashes and MinHash."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int64, UInt32, UInt64
from PIL import Image

from pangea_jax.curation.filters import words

try:
    import imagehash
    import rensa
except ImportError as error:
    raise ImportError(
        f"{error.name} is missing; run: pip install -r requirements-curation.txt"
    ) from None

Item = TypeVar("Item")
MAX_HASH_DISTANCE, MIN_TEXT_SIMILARITY = 4, 0.8

_SHINGLE, _PERMUTATIONS, _TEXT_BANDS, _SEED = 4, 96, 16, 0
_SKETCHED_AT_ONCE, _COMPARED_AT_ONCE = 4096, 65_536


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit DCT hash of imagehash (`phash`). Pictures that look the same have similar hashes."""
    bits = imagehash.phash(picture).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def unlike_earlier_pictures(
    hashes: UInt64[np.ndarray, " n"], max_distance: int = MAX_HASH_DISTANCE
) -> Bool[np.ndarray, " n"]:
    """Whether each picture differs from all earlier ones in more than `max_distance` bits. The result is exact.

    Hashes that differ in d bits agree in at least one of d + 1 groups of bits. So only hashes that agree in one group
    are compared. This needs about 100 bytes of memory for each picture.
    """
    bands = max_distance + 1
    # Every d-th bit, since neighbouring bits have similar frequencies, and some of them hardly vary.
    masks = [np.uint64(sum(1 << bit for bit in range(b, 64, bands))) for b in range(bands)]

    def alike(earlier, later):
        return np.bitwise_count(hashes[earlier] ^ hashes[later]) <= max_distance

    return _unlike_earlier(len(hashes), (hashes & mask for mask in masks), alike)


def unlike_earlier_texts(
    texts: Iterable[str], min_similarity: float = MIN_TEXT_SIMILARITY
) -> Bool[np.ndarray, " n"]:
    """Whether each text differs from all earlier ones, by MinHash of their character 4-grams (rensa).

    It finds 99 % of the pairs at the threshold (Jaccard 0.8); the error of the estimated similarity is 0.04. It needs
    about 0.8 kB of memory for each text, less than half of rensa's own index and a fifth of datasketch's
    (benchmarks/curation.py).
    """
    sketches = _sketches(texts)
    rows = _PERMUTATIONS // _TEXT_BANDS
    bands = (
        _hash_rows(sketches[:, first : first + rows]) for first in range(0, _PERMUTATIONS, rows)
    )

    def alike(earlier, later):
        found = np.empty(len(later), bool)
        for first in range(0, len(later), _COMPARED_AT_ONCE):
            some = slice(first, first + _COMPARED_AT_ONCE)
            same = (sketches[earlier[some]] == sketches[later[some]]).mean(1)
            found[some] = same >= min_similarity
        return found

    return _unlike_earlier(len(sketches), bands, alike)


def _unlike_earlier(
    count: int,
    bands: Iterable[UInt64[np.ndarray, " n"]],
    alike: Callable[[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]], Bool[np.ndarray, " m"]],
) -> Bool[np.ndarray, " n"]:
    """Whether each item differs from all earlier ones; only items with the same key in a band are compared."""
    stays = np.ones(count, bool)
    for keys in bands:
        order = np.argsort(keys, kind="stable")  # within a group the earliest comes first
        keys = keys[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        start = np.repeat(first, np.diff(np.append(first, count)))
        places = np.arange(count)
        later, step = places[(places > start) & stays[order]], 0
        # A large group of similar items costs little: all leave when they are compared with the first one.
        while len(later):
            found = alike(order[start[later] + step], order[later])
            stays[order[later[found]]] = False
            later, step = later[~found], step + 1
            later = later[start[later] + step < later]
    return stays


def _sketches(texts: Iterable[str]) -> UInt32[np.ndarray, "n permutations"]:
    parts = [np.zeros((0, _PERMUTATIONS), np.uint32)]
    for some in batched(map(shingles, texts), _SKETCHED_AT_ONCE):
        found = rensa.RMinHash.digest_matrix_from_token_sets(some, _PERMUTATIONS, _SEED)
        parts.append(np.array(found.to_rows(), np.uint32))
    return np.concatenate(parts)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`; the last may be shorter. itertools has it from Python 3.12 on."""
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some


def _hash_rows(rows: UInt32[np.ndarray, "n r"]) -> UInt64[np.ndarray, " n"]:
    hashes = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def shingles(text: str) -> list[str]:
    """The runs of four characters, without case and punctuation; a shorter text is one run."""
    plain = " ".join(words(text)) or text
    return list({plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1))})
