"""Trains stage 1 of the sample model: questions in words in every language, and about pictures in English.

python launch/pretrain_sample.py --config=configs/sample_stage1.py --workdir=runs/sample_stage1
"""

import dataclasses

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import jax
import numpy as np
from absl import flags, logging

from launch import common
from pangea_jax import assets, experiment, sharding
from pangea_jax.checkpoints import SpecialTokens, huggingface
from pangea_jax.data import mixture, pipeline
from pangea_jax.data.reader import CachedFeatures, Reader
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.sample.conversations import TextLessons
from pangea_jax.sample.features import frozen_features
from pangea_jax.sample.pretraining import Stage1Config
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step
from pangea_jax.train.telemetry import Speed, StepTimer, Telemetry, Window

CONFIG = common.define_config("configs/sample_stage1.py", Stage1Config)
WORKDIR = flags.DEFINE_string("workdir", "runs/sample_stage1", "Folder for the results.")


class Lessons:
    """A data source for Grain: text lessons, then English conversations about pictures, as often as the config says."""

    def __init__(self, store, config):
        texts = TextLessons(config.languages, config.text_plan)
        pictures = mixture.choose(
            store.index,
            mixture.Mixture(
                num_examples=config.picture_passes * len(emoji.picture_keys(store, config.artists)),
                languages=("en",),
                sources=config.sources,
            ),
            config.seed,
        )
        self._parts = (texts, pipeline.RowSource(store, pictures.rows))
        self._texts = config.text_passes * len(texts)

    def __len__(self) -> int:
        return self._texts + len(self._parts[1])

    def __getitem__(self, i):
        if i < self._texts:
            return self._parts[0][i % len(self._parts[0])]
        return self._parts[1][i - self._texts]

    def __repr__(self) -> str:
        return f"Lessons(len={len(self)})"


def train(config, workdir, mesh, state, step_fn, dataset, steps):
    """Runs and logs a step for every batch; returns the last state."""
    timer, window = StepTimer(), Window()
    speed = Speed(timer)
    with Telemetry(workdir, steps, is_main=jax.process_index() == 0) as telemetry:
        for step, batch in enumerate(dataset, start=1):
            with timer.step():
                state, metrics = step_fn(state, batch.place(mesh))
                metrics = jax.device_get(metrics)
            window.add(metrics)
            speed.add(metrics)
            if step % config.log_every == 0 or step == steps:
                telemetry.log(step - 1, window.flush() | speed.flush())
    return state


def main(argv):
    common.no_arguments(argv)
    workdir = common.local_folder(WORKDIR.value, "--workdir")
    with common.only_run(workdir):
        pretrain(CONFIG(), workdir)


def pretrain(config, workdir):
    common.claim_workdir(workdir, config)
    common.use_compile_cache()
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    model, feed = config.model, config.pipeline
    store, tokenizer = SampleStore(config.plan), load_tokenizer(assets.EMOJI)
    lessons = Lessons(store, config)
    steps = len(lessons) // feed.examples
    logging.info("%d examples, %d steps", len(lessons), steps)
    optimizer = optim.make_optimizer(config.optimizer, steps)
    graphdef, state, shardings = init_state(
        model,
        optimizer,
        mesh,
        seed=config.seed,
        frozen=config.frozen,
        pretrained=experiment.load_pretrained(model, ("tower",), mesh),
    )
    features = frozen_features(
        model_params.merge(graphdef, state.params).vision,
        store,
        emoji.picture_keys(store, config.artists),
        mesh,
        config.reading,
        augmented=config.augmented_views,
        seed=config.seed,
        cache=common.cache_directory("features"),
    )
    reader = Reader(tokenizer, CachedFeatures(features, config.reading, newline=model.newline))
    dataset = pipeline.train_dataset(lessons, reader, feed, seed=config.seed)
    step_fn = make_train_step(graphdef, optimizer, shardings, mesh, max_targets=feed.max_targets)
    state = train(config, workdir, mesh, state, step_fn, dataset, steps)
    tokens = SpecialTokens.of(tokenizer)
    huggingface.save(
        model_params.unflatten(state.params),
        model,
        workdir / "stage1",
        only=("projector", "newline", "language"),
        dtype=np.dtype("float16"),
        tokens=tokens,
    )


if __name__ == "__main__":
    common.run(main)
