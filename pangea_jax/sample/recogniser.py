"""The classifier with which the vision tower of the sample learns to see, and what its features are worth."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from pangea_jax.model import VisionConfig, VisionTower
from pangea_jax.model import params as model_params
from pangea_jax.model.layers import LayerNorm, normal
from pangea_jax.model.vision import normalize
from pangea_jax.sample import augment
from pangea_jax.sample.drawings import Drawings

PROBE_VIEWS = 4
"""Random views of each drawing from which the probe learns; it is scored on one more."""


class Recogniser(nnx.Module):
    """The tower and two linear classifiers of its patch features.

    One reads all patches side by side. It learns fastest, but it allows features to mean something else at each place,
    and the decoder cannot read those. The other reads their mean, so a feature means the same everywhere. Neither
    reads the class token, because the language model reads only patch features, as in LLaVA.
    """

    def __init__(self, config: VisionConfig, classes: int, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config, rngs=rngs)
        width, patches = config.width, config.patches
        self.mean_norm = LayerNorm(width, config.norm_eps, jnp.float32)
        self.patch_norm = LayerNorm(width, config.norm_eps, jnp.float32)
        self.mean_head_dv = normal(rngs, (width, classes), width**-0.5, jnp.float32)
        inputs = patches * width
        self.patch_head_dv = normal(rngs, (inputs, classes), inputs**-0.5, jnp.float32)

    def features(self, tiles: UInt8[Array, "B H W 3"]) -> Float[Array, "B P E"]:
        return self.vision(normalize(tiles))

    def by_mean(self, features: Float[Array, "B P E"]) -> Float[Array, "B V"]:
        return self.mean_norm(features.mean(1)) @ self.mean_head_dv[...]

    def by_patches(self, features: Float[Array, "B P E"]) -> Float[Array, "B V"]:
        rows = self.patch_norm(features)
        return rows.reshape(len(rows), -1) @ self.patch_head_dv[...]


def loss_and_accuracy(
    recogniser: Recogniser,
    tiles: UInt8[Array, "B H W 3"],
    labels: Int[Array, " B"],
    candidates: Float[Array, " V"],
    patch_loss: float,
    label_smoothing: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean loss of both classifiers, weighted, and the accuracy of the classifier of the mean.

    Args:
      candidates: 1 for the classes among which is chosen, else 0.
      patch_loss: the weight of the classifier of all patches, 0 to 1.
    """
    wanted = jax.nn.one_hot(labels, len(candidates)) * (1 - label_smoothing)
    wanted += label_smoothing * candidates / candidates.sum()

    def loss(logits):
        return optax.softmax_cross_entropy(jnp.where(candidates > 0, logits, -1e9), wanted).mean()

    features = recogniser.features(tiles)
    by_mean = recogniser.by_mean(features)
    total = (1 - patch_loss) * loss(by_mean)
    if patch_loss:
        total += patch_loss * loss(recogniser.by_patches(features))
    found = jnp.where(candidates > 0, by_mean, -jnp.inf).argmax(-1)
    return total, jnp.mean(found == labels)


def scale_features(params: dict[str, Array], factor: float) -> dict[str, Array]:
    """The parameters of a tower whose features are `factor` times as large, and else the same.

    A feature is a sum: the normalised input of the first block, and the output of each branch. All of them are scaled.
    The norms inside the branches undo it, apart from their epsilon.
    """
    scaled = re.compile(r"vision\.(pre_norm\.\w+|blocks\.(o|down)_(kernel|bias)_\w+)")
    return {n: factor * x if scaled.fullmatch(n) else x for n, x in params.items()}


def root_mean_square(features: Float[Array, "B P E"]) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(features))))


class Encoder:
    """Features and logits of many pictures, in batches of one size, so that one program serves all."""

    def __init__(self, graphdef, params, batch_size: int = 256):
        self._params, self._batch_size = params, batch_size

        @jax.jit
        def run(params, tiles):
            recogniser = model_params.merge(graphdef, params)
            features = recogniser.features(tiles)
            return features, recogniser.by_mean(features)

        self._run = run

    def __call__(self, tiles: UInt8[np.ndarray, "N H W 3"]):
        """(features [N, P, E], logits [N, V]) as NumPy arrays."""
        parts = []
        for first in range(0, len(tiles), self._batch_size):
            places = np.arange(first, first + self._batch_size) % len(tiles)
            parts.append(jax.device_get(self._run(self._params, tiles[places])))
        return tuple(np.concatenate(part)[: len(tiles)] for part in zip(*parts, strict=True))


def on_white(pixels: UInt8[np.ndarray, "N H W 4"], size: int) -> UInt8[np.ndarray, "N s s 3"]:
    """The drawings as they are, on white."""
    tiles = []
    for drawing in pixels:
        picture = Image.new("RGBA", drawing.shape[1::-1], "white")
        picture.alpha_composite(Image.fromarray(drawing))
        tiles.append(np.asarray(picture.convert("RGB").resize((size, size), Image.BICUBIC)))
    return np.stack(tiles)


def accuracies(
    encode: Encoder, drawings: Drawings, places: Sequence[int], size: int
) -> dict[str, float]:
    """Share of drawings, on white, whose class is the first or among the first five.

    Args:
      places: the classes among which is chosen, as places among `drawings.classes`.
    """
    _, logits = encode(on_white(drawings.pixels, size))
    ranked = np.asarray(places)[np.argsort(-logits[:, np.asarray(places)], axis=-1)]
    hits = ranked[:, :5] == drawings.labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(1).mean())}


def probe(encode: Encoder, drawings: Drawings, test: Drawings, size: int) -> dict[str, float]:
    """Accuracy of a linear probe of the mean of the patch features: what the decoder can read from them.

    The probe is linear discriminant analysis. It learns from `PROBE_VIEWS` mild views of each drawing.

    Returns:
      `views`: on other views of the same drawings; `test`: on the drawings of `test`, on white.
    """

    def means(number):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), len(drawings.labels))
        return encode(np.asarray(augment.augment(drawings.pixels, keys, size=size)))[0].mean(1)

    known = np.concatenate([means(number) for number in range(PROBE_VIEWS)])
    classes, labels = np.unique(np.tile(drawings.labels, PROBE_VIEWS), return_inverse=True)
    centres = np.stack([known[labels == place].mean(0) for place in range(len(classes))])
    spread = np.cov((known - centres[labels]).T)
    spread += 1e-4 * np.trace(spread) / len(spread) * np.eye(len(spread))
    weights = np.linalg.solve(spread, centres.T)
    offsets = -0.5 * (centres.T * weights).sum(0)

    def accuracy(features, labels):
        return float((classes[np.argmax(features @ weights + offsets, axis=-1)] == labels).mean())

    on_test = encode(on_white(test.pixels, size))[0].mean(1)
    return {
        "views": accuracy(means(PROBE_VIEWS), drawings.labels),
        "test": accuracy(on_test, test.labels),
    }
