"""Trains the vision tower of the sample model to recognise drawings. It takes the place of CLIP.

python launch/pretrain_tower.py --config=configs/sample_tower.py --workdir=runs/sample_tower
"""

import io
import json
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from PIL import Image

from launch import common
from pangea_jax.checkpoints import huggingface
from pangea_jax.model import PangeaConfig, VisionConfig, VisionTower
from pangea_jax.model import params as model_params
from pangea_jax.model.layers import LayerNorm, normal
from pangea_jax.model.vision import normalize
from pangea_jax.sample import augment, emoji
from pangea_jax.sample.pretraining import TowerConfig
from pangea_jax.train.telemetry import Telemetry

CONFIG = common.define_config("configs/sample_tower.py", TowerConfig)
WORKDIR = flags.DEFINE_string("workdir", "runs/sample_tower", "Folder for the results.")


class Recogniser(nnx.Module):
    """The tower, and a linear classifier of the mean of its patch features.

    The classifier reads no class token, because the language model reads only patch features, as in LLaVA.
    """

    def __init__(self, config: VisionConfig, classes: int, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config, rngs=rngs)
        self.norm = LayerNorm(config.width, config.norm_eps, jnp.float32)
        self.classifier_dv = normal(rngs, (config.width, classes), config.width**-0.5, jnp.float32)

    def __call__(self, tiles):
        """uint8 [B, H, W, 3] to logits [B, classes]."""
        return self.norm(self.vision(normalize(tiles)).mean(1)) @ self.classifier_dv[...]


def load_drawings(store, artists):
    """RGBA drawings of the artists, uint8 [n, 64, 64, 4], and their concepts, int [n]."""
    codepoints = [concept.codepoint for concept in emoji.load_concepts()]
    keys = emoji.picture_keys(store, artists)
    drawings = [Image.open(io.BytesIO(store.image(key))).convert("RGBA") for key in keys]
    labels = [codepoints.index(key.split("/")[1]) for key in keys]
    return np.stack([np.asarray(drawing) for drawing in drawings]), np.asarray(labels)


def make_step(graphdef, optimizer, drawings, labels, config):
    """The training step. It draws a random batch and augments it on the device."""

    @jax.jit
    def step(params, opt_state, key):
        choose_key, augment_key = jax.random.split(key)
        chosen = jax.random.randint(choose_key, (config.batch_size,), 0, len(drawings))
        keys = jax.random.split(augment_key, config.batch_size)
        tiles = augment.augment(drawings[chosen], keys, size=config.vision.image_size)

        def loss_fn(params):
            logits = model_params.merge(graphdef, params)(tiles)
            wanted = jax.nn.one_hot(labels[chosen], logits.shape[-1])
            smooth = optax.smooth_labels(wanted, config.label_smoothing)
            accuracy = jnp.mean(logits.argmax(-1) == labels[chosen])
            return optax.softmax_cross_entropy(logits, smooth).mean(), accuracy

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = {"loss": loss, "accuracy": accuracy, "examples": config.batch_size}
        return optax.apply_updates(params, updates), opt_state, metrics

    return step


def test(graphdef, params, store, artist, size):
    """Top-1 and top-5 accuracy on the drawings of one artist, on white and without augmentation."""
    drawings, labels = load_drawings(store, [artist])
    tiles = []
    for drawing in drawings:
        picture = Image.new("RGBA", drawing.shape[1::-1], "white")
        picture.alpha_composite(Image.fromarray(drawing))
        tiles.append(np.asarray(picture.convert("RGB").resize((size, size), Image.BICUBIC)))
    forward = jax.jit(lambda params, tiles: model_params.merge(graphdef, params)(tiles))
    ranked = np.argsort(-np.asarray(forward(params, np.stack(tiles))), axis=-1)
    hits = ranked == labels[:, None]
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits[:, :5].any(1).mean())}


def make_optimizer(config):
    schedule = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.warmup_steps, config.steps, config.learning_rate * 0.01
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay),
    )


def main(_):
    config, workdir = CONFIG(), Path(WORKDIR.value)
    common.claim_workdir(workdir, config)
    store = emoji.open_store()
    drawings, labels = load_drawings(store, config.artists)
    logging.info("%d drawings of %d concepts", len(drawings), len(set(labels)))
    vision = config.vision
    module = Recogniser(vision, int(labels.max()) + 1, rngs=nnx.Rngs(config.seed))
    graphdef, params = model_params.split(module)
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(params)
    step_fn = make_step(graphdef, optimizer, jnp.asarray(drawings), jnp.asarray(labels), config)
    root = jax.random.key(config.seed)
    with Telemetry(workdir, config.steps) as telemetry:
        for step in range(config.steps):
            params, opt_state, metrics = step_fn(params, opt_state, jax.random.fold_in(root, step))
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                telemetry.log(step, {name: float(value) for name, value in metrics.items()})
    artists = (*config.artists, config.test_artist)
    results = {a: test(graphdef, params, store, a, vision.image_size) for a in artists}
    (workdir / "results.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))
    tower = {name: value for name, value in params.items() if name.startswith("vision.")}
    huggingface.save(
        model_params.unflatten(tower),
        PangeaConfig(vision=vision, pinpoints=()),
        workdir / "tower",
        only=("vision",),
        dtype=np.dtype("float16"),
    )


if __name__ == "__main__":
    common.run(main)
