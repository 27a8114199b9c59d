"""Features of a frozen vision tower, computed once before training.

This is useful for few images that are seen often, as in the embedded sample, but not for the 784 GB
of PangeaIns.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float
from PIL import Image, ImageOps

from pangea_jax.data.reader import Geometry, ReadingPolicy, Tiles
from pangea_jax.data.store import RecordStore
from pangea_jax.model import VisionTower
from pangea_jax.model import params as model_params
from pangea_jax.model.vision import normalize
from pangea_jax.sample import augment
from pangea_jax.sharding import BATCH_SPEC
from pangea_jax.work import atomic


def frozen_features(
    tower: VisionTower,
    store: RecordStore,
    keys: Sequence[str],
    mesh: jax.sharding.Mesh,
    policy: ReadingPolicy,
    *,
    augmented: int,
    seed: int = 0,
    batch_size: int = 256,
    cache: Path | None = None,
) -> dict[str, Float[np.ndarray, "views P E"]]:
    """float16 features of every image: view 0 is the original, then `augmented` random views.

    A random view depends only on the seed, its number and the position of its key in `keys`. So the
    result is the same on every mesh and in every process. The features depend on most of the
    parameters, so they are many.

    Args:
      policy: how the model reads pictures, see `pangea_jax.data.reader`.
      cache: a folder that keeps the features. The next run with the same tower and images reads
        them from there as a memory map. It is not used with several processes, or if it cannot be
        written.
    """
    if cache is None or jax.process_count() > 1:
        values = _compute(tower, store, keys, mesh, policy, augmented, seed, batch_size)
    else:
        file = cache / f"{_digest(tower, store, keys, policy, augmented, seed)}.npy"
        if not file.exists():
            values = _compute(tower, store, keys, mesh, policy, augmented, seed, batch_size)
            try:
                _save(file, values)
            except OSError as error:
                logging.warning("cannot keep the features of images in %s: %s", cache, error)
                return dict(zip(keys, values, strict=True))
        values = np.load(file, mmap_mode="r", allow_pickle=False)
        logging.info("features of %d images, %d views each: %s", len(keys), len(values[0]), file)
    return dict(zip(keys, values, strict=True))


def _digest(tower, store, keys, policy, augmented, seed) -> str:
    """A hash of everything on which the features depend."""
    digest = hashlib.sha256(repr((tower.config, policy, augmented, seed, jax.__version__)).encode())
    for name, value in sorted(model_params.split(tower)[1].items()):
        digest.update(name.encode())
        digest.update(np.asarray(value).tobytes())
    for key in keys:
        digest.update(key.encode())
        digest.update(hashlib.sha256(store.image(key)).digest())
    return digest.hexdigest()[:24]


def _save(file: Path, values: np.ndarray) -> None:
    """Writes the file completely or not at all, even if two runs write it at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = atomic.partial_path(file)
    try:
        with partial.open("wb") as out:
            np.save(out, values, allow_pickle=False)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _compute(
    tower, store, keys, mesh, policy, augmented, seed, batch_size
) -> Float[np.ndarray, "pictures views P E"]:
    """`frozen_features` without the cache, as one array; hence the same parameters."""
    size = tower.config.image_size
    encode = _encoder(tower, mesh)
    batch_size += -batch_size % mesh.size

    def run(make_tiles):
        parts = []
        for start in range(0, len(keys), batch_size):
            # The first images fill up the last batch, so that only one shape is compiled.
            places = np.arange(start, start + batch_size) % len(keys)
            parts.append(encode(make_tiles(places)))
        return np.concatenate(parts)[: len(keys)]

    originals = Tiles(Geometry((), size, tower.config.grid), policy, store)
    views = [
        run(lambda places: np.concatenate([originals.stored(keys[i], False).cut() for i in places]))
    ]
    drawings = np.stack([_rgba(store.image(key), policy) for key in keys]) if augmented else None
    for view in range(1, augmented + 1):
        root = jax.random.fold_in(jax.random.key(seed), view)
        random_keys = jax.random.split(root, len(keys))

        def make_tiles(places, random_keys=random_keys):
            return augment.augment(drawings[places], random_keys[places], size=size)

        views.append(run(make_tiles))
    return np.stack(views, axis=1)


def _encoder(tower: VisionTower, mesh: jax.sharding.Mesh):
    """A compiled function from uint8 tiles to float16 features, with rows over the mesh."""
    graphdef, params = model_params.split(tower)
    rows, whole = NamedSharding(mesh, BATCH_SPEC), NamedSharding(mesh, P())
    params = jax.device_put(params, whole)

    @jax.jit
    def encode(params, tiles):
        features = model_params.merge(graphdef, params)(normalize(tiles)).astype("float16")
        return jax.lax.with_sharding_constraint(features, whole)

    return lambda tiles: np.asarray(encode(params, jax.device_put(tiles, rows)))


def _rgba(encoded: bytes, policy: ReadingPolicy) -> np.ndarray:
    picture = Image.open(io.BytesIO(encoded))
    if policy.orientation == "upright":
        picture = ImageOps.exif_transpose(picture)
    return np.asarray(picture.convert("RGBA"))
