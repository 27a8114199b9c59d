"""Trains the vision tower of the sample model to recognise drawings. It takes the place of CLIP.

python launch/pretrain_tower.py --config=configs/sample_tower.py --workdir=runs/sample_tower
python launch/pretrain_tower.py --packages=/data/npm    # archives that are already downloaded
"""

import functools
import io
import json
import tempfile
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import nnx
from PIL import Image

from launch import common
from pangea_jax.checkpoints import huggingface
from pangea_jax.model import PangeaConfig
from pangea_jax.model import params as model_params
from pangea_jax.sample import augment, drawings, emoji, recogniser, sources
from pangea_jax.sample.drawings import Drawings
from pangea_jax.sample.pretraining import TowerConfig, TowerPhase
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.train.optimizer import make_optimizer
from pangea_jax.train.telemetry import Speed, StepTimer, Telemetry

CONFIG = common.define_config("configs/sample_tower.py", TowerConfig)
WORKDIR = flags.DEFINE_string("workdir", "runs/sample_tower", "Folder for the results.")
PACKAGES = flags.DEFINE_string(
    "packages", None, "Folder of downloaded npm archives (.tgz); default: download with npm pack."
)

SCALE_VIEWS = 2048
"""Views on which the features get unit scale."""

SPEED = ("seconds_per_step", "examples_per_second")
"""What is logged of the speed."""


def load_drawings(config: TowerConfig, concepts: list[str]) -> Drawings:
    """The drawings of the config's artists.

    Raises:
      UserError: the config names an unknown artist.
      SourceError: see `drawings.load`.
    """
    known = {artist.id: artist for artist in sources.TOWER_ARTISTS}
    if unknown := set(config.artists) - known.keys():
        raise common.UserError(
            f"config.artists: {', '.join(sorted(unknown))} is not one of {', '.join(known)}"
        )
    artists = [known[artist] for artist in config.artists]
    with tempfile.TemporaryDirectory(prefix="emoji-packages-") as scratch:
        packages = Path(PACKAGES.value or scratch)
        if PACKAGES.value is None:
            logging.info("downloading %d packages with npm pack", len(artists))
            sources.fetch(packages, [(artist.package, artist.version) for artist in artists])
        return drawings.load(packages, artists, concepts)


def load_test(artist: str, classes: tuple[str, ...]) -> Drawings:
    """The drawings of an artist of the sample."""
    store = SampleStore()
    keys = emoji.picture_keys(store, [artist])
    pictures = [Image.open(io.BytesIO(store.image(key))).convert("RGBA") for key in keys]
    labels = drawings.class_places(classes, [key.split("/")[1] for key in keys])
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return Drawings(classes, pixels, np.asarray(labels), (artist,) * len(keys))


def random_views(chosen: Drawings, key, number: int, size: int, how: augment.Views):
    """(views, labels) of `number` drawings, drawn at random."""
    choose_key, view_key = jax.random.split(key)
    places = np.asarray(jax.random.randint(choose_key, (number,), 0, len(chosen.labels)))
    keys = jax.random.split(view_key, number)
    views = augment.augment(chosen.pixels[places], keys, size=size, how=how)
    return views, chosen.labels[places]


def make_step(graphdef, optimizer, candidates, phase: TowerPhase, label_smoothing: float):
    """The training step of a phase."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tiles, labels):
        def loss_fn(params):
            return recogniser.loss_and_accuracy(
                model_params.merge(graphdef, params),
                tiles,
                labels,
                candidates,
                phase.patch_loss,
                label_smoothing,
            )

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = {"loss": loss, "accuracy": accuracy}
        return optax.apply_updates(params, updates), opt_state, metrics

    return step


def train(config: TowerConfig, everything: Drawings, sample: Drawings, places, workdir: Path):
    """Both phases; returns the graph and the trained parameters.

    Args:
      sample: the drawings of the sample's concepts among `everything`.
      places: these concepts, as places among the classes.
    """
    size, classes = config.vision.image_size, len(everything.classes)
    root = jax.random.key(config.seed)
    module = recogniser.Recogniser(config.vision, classes, rngs=nnx.Rngs(config.seed))
    graphdef, params = model_params.split(module)
    optimizer = make_optimizer(config.optimizer, config.steps)
    opt_state = optimizer.init(params)
    timer, first_step = StepTimer(), 0
    with Telemetry(workdir, config.steps) as telemetry:
        for phase in (config.first, config.last):
            chosen = sample if phase.only_sample else everything
            candidates = np.zeros(classes, np.float32)
            candidates[places if phase.only_sample else slice(None)] = 1
            step_fn = make_step(graphdef, optimizer, candidates, phase, config.label_smoothing)
            speed = Speed(timer)
            for step in range(first_step, first_step + phase.steps):
                with timer.step():
                    key = jax.random.fold_in(root, step + 1)
                    batch = random_views(chosen, key, config.batch_size, size, phase.views)
                    params, opt_state, metrics = step_fn(params, opt_state, *batch)
                    metrics = {name: float(value) for name, value in metrics.items()}
                if step > first_step:  # the first step of a phase waits for the compiler
                    speed.add({"tokens": 0, "examples": config.batch_size})
                if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                    measured = {k: v for k, v in speed.flush().items() if k in SPEED}
                    telemetry.log(step, metrics | measured)
            first_step += phase.steps
    return graphdef, params


def measure(config, encode, sample: Drawings, test: Drawings, places) -> dict[str, object]:
    """Accuracy by artist, and what a linear probe reads from the features."""
    size = config.vision.image_size
    by_artist = {artist: sample.by(artist) for artist in config.artists}
    by_artist[config.test_artist] = test
    scores = {
        artist: recogniser.accuracies(encode, drawn, places, size)
        for artist, drawn in by_artist.items()
    }
    return {"artists": scores, "probe": recogniser.probe(encode, sample, test, size)}


def main(argv):
    common.no_arguments(argv)
    common.keep_freed_memory()
    workdir = common.local_folder(WORKDIR.value, "--workdir")
    with common.only_run(workdir):
        pretrain(CONFIG(), workdir)


def pretrain(config: TowerConfig, workdir: Path) -> None:
    """Trains the tower, measures it, and writes it into the work directory."""
    common.claim_workdir(workdir, config)
    common.use_compile_cache()
    concepts = [concept.codepoint for concept in emoji.load_concepts()]
    everything = load_drawings(config, concepts)
    sample = everything.of(concepts)
    logging.info(
        "%d drawings of %d emoji; %d drawings of the %d in the sample",
        *(len(everything.labels), len(everything.classes), len(sample.labels), len(concepts)),
    )
    places = drawings.class_places(everything.classes, concepts)
    graphdef, params = train(config, everything, sample, places, workdir)
    views, _ = random_views(
        sample, jax.random.key(0), SCALE_VIEWS, config.vision.image_size, augment.MILD
    )
    features, _ = recogniser.Encoder(graphdef, params)(np.asarray(views))
    params = recogniser.scale_features(params, 1 / recogniser.root_mean_square(features))
    encode = recogniser.Encoder(graphdef, params)
    test = load_test(config.test_artist, everything.classes)
    results = measure(config, encode, sample, test, places)
    (workdir / "results.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))
    tower = {name: value for name, value in params.items() if name.startswith("vision.")}
    huggingface.save(
        model_params.unflatten(tower),
        PangeaConfig(vision=config.vision, pinpoints=()),
        workdir / "tower",
        only=("vision",),
        dtype=np.dtype("float16"),
    )


if __name__ == "__main__":
    common.run(main)
