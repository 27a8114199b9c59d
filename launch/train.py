"""Trains one point of an experiment, evaluates it per language, draws what came out.

    python launch/train.py --config=configs/ablate_en_ratio.py
    python launch/train.py --config=configs/ablate_en_ratio.py:en_ratio=0.8 --workdir=runs/en_080
    python launch/train.py --config=configs/sample.py --config.optimizer.learning_rate=1e-3

Into the work directory: config.json, checkpoints/, metrics.jsonl, tensorboard/, results.json, and the figures
loss, languages and sheet as PNG and SVG. Started again with the same work directory it goes on where it was.
"""

import dataclasses
import json
import signal
import sys
from pathlib import Path

# A clone runs without being installed: configs/ and eval/ lie beside launch/, not in the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import flags, logging
from rich.console import Console

from eval import naming, report
from launch import common
from pangea_jax import sharding
from pangea_jax.checkpoints import SpecialTokens, huggingface
from pangea_jax.data import emoji, mixture, pipeline
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import params as model_params
from pangea_jax.train import optimizer as optim
from pangea_jax.train.checkpoint import Checkpoints
from pangea_jax.train.features import frozen_features
from pangea_jax.train.state import init_state
from pangea_jax.train.step import make_train_step
from pangea_jax.train.telemetry import StepTimer, Telemetry

CONFIG = common.define_config("configs/ablate_en_ratio.py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; default runs/<config and argument>."
)


@dataclasses.dataclass
class Run:
    """What the phases of a run share."""

    config: common.Config
    workdir: Path
    mesh: jax.sharding.Mesh
    timer: StepTimer
    console: Console

    @property
    def is_main(self) -> bool:
        return jax.process_index() == 0


def load_data(config):
    """Store, tokenizer, and the realised mixture."""
    store = emoji.open_store()
    store.verify()
    choice = mixture.choose(store.index, mixture.Mixture(seed=config.seed, **config.mixture))
    return store, load_tokenizer(emoji.DIRECTORY), choice


def training_views(run, model, store, artists) -> pipeline.CachedViews | pipeline.Views:
    """How training sees pictures: cached features of a frozen tower, or tiles for one that trains."""
    config = run.config
    if not config.augmented_views:
        vision = model.config.vision
        return pipeline.Views(store, config.model.pinpoints, vision.image_size, vision.grid)
    with run.timer.phase("features"):
        keys = common.picture_keys(store, config.mixture.sources)
        features = frozen_features(
            model.vision, store, keys, run.mesh, augmented=config.augmented_views, seed=config.seed
        )
    return pipeline.CachedViews(features)


def train(run, optimizer, graphdef, state, shardings, batches, total_steps):
    """The loop: draw a batch, step, log, save. Returns the final state."""
    config = run.config
    checkpoints = Checkpoints(run.workdir / "checkpoints", keep=config.checkpoint.keep)
    data = iter(batches)
    if checkpoints.latest_step is not None:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        state, clock = checkpoints.restore(abstract, data)
        run.timer = StepTimer(clock)
        logging.info("resumed from step %d of %d", int(state.step), total_steps)
    first = int(state.step)
    examples_per_step = pipeline.PipelineConfig(**config.pipeline).examples
    step_fn = make_train_step(
        graphdef, optimizer, shardings, run.mesh, max_targets=config.pipeline.max_targets
    )
    schedule = optim.make_schedule(optim.OptimizerConfig(**config.optimizer), total_steps)
    stop = common.StopSignal(signal.SIGINT, signal.SIGTERM)
    rates = common.Rates()
    with (
        Telemetry(
            run.workdir, total_steps, start_step=first, is_main=run.is_main, console=run.console
        ) as telemetry,
        stop,
    ):
        for step in range(first, total_steps):
            with run.timer.data():
                batch = sharding.to_global(next(data), run.mesh)
            with run.timer.phase("compile") if step == first else run.timer.step():
                state, metrics = step_fn(state, batch)
                rates.add(metrics)
                if step == first:
                    jax.block_until_ready(metrics)
            if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
                with run.timer.step():
                    scalars = rates.flush()
                telemetry.log(
                    step,
                    scalars
                    | {
                        "learning_rate": float(schedule(step)),
                        "examples": (step + 1) * examples_per_step,
                    },
                )
            if (
                (step + 1) % config.checkpoint.every == 0
                or step + 1 == total_steps
                or stop.requested
            ):
                with run.timer.phase("checkpoint"):
                    checkpoints.save(state, data, run.timer.seconds)
            if stop.requested and step + 1 < total_steps:
                with run.timer.phase("checkpoint"):
                    checkpoints.close()
                raise common.Interrupted(step + 1, total_steps)
    with run.timer.phase("checkpoint"):
        checkpoints.close()
    return state


def evaluate(run, graphdef, params, store, tokenizer, artists):
    """Scores per split and language, and every answer."""
    config = run.config
    model = model_params.merge(graphdef, params)
    namer = naming.Namer(
        graphdef,
        tokenizer,
        run.mesh,
        prompt_tokens=config.eval.prompt_tokens,
        max_new_tokens=config.eval.max_new_tokens,
        batch_size=config.eval.batch_size,
    )
    splits, answers = {}, {}
    languages = config.mixture.languages
    for split, shown_by in (("seen_artwork", artists), ("unseen_artwork", ("twemoji",))):
        limit = config.eval.limit or None
        items = naming.make_items(store, split, languages, shown_by, limit=limit)
        # Fresh augmentation of trained drawings; the test artist's as they are.
        fresh = int(split == "seen_artwork")
        keys = common.picture_keys(store, shown_by)
        features = frozen_features(
            model.vision, store, keys, run.mesh, augmented=fresh, seed=config.seed + 1
        )
        views = pipeline.CachedViews({key: value[fresh:] for key, value in features.items()})
        answers[split] = namer(params, items, views)
        splits[split] = naming.summarize(answers[split], languages)
    return splits, answers


def write_report(run, results, answers, store):
    """results.json, the table, and the figures."""
    report.plot_loss(run.workdir / "metrics.jsonl", run.workdir)
    report.plot_languages(results, run.workdir, run.config.title)
    examples = naming.sheet_examples(
        answers["unseen_artwork"], store, count=24, seed=run.config.seed
    )
    report.answer_sheet(
        examples,
        run.workdir / "sheet",
        f"{run.config.title}: drawings by an artist never trained on",
    )
    run.console.print(report.results_table(results))
    run.console.print(report.timing_table(results["timing"]))
    run.console.print(
        f"Everything is in {run.workdir}/: results.json, languages.png, sheet.png, loss.png, tensorboard/"
    )


def execute(run):
    config = run.config
    store, tokenizer, choice = load_data(config)
    if run.is_main:
        common.claim_workdir(run.workdir, config)
        logging.info("mixture: %s", json.dumps(choice.summary()))
    wanted = config.model.language.vocab_size
    if tokenizer.vocab_size != wanted:
        raise common.UserError(
            f"config.model.language.vocab_size is {wanted}, the tokenizer has {tokenizer.vocab_size}"
        )
    feed = pipeline.PipelineConfig(**config.pipeline)
    if feed.examples is None:
        raise common.UserError(
            'a fixed number of examples needs pipeline.packing "balanced" or "none"'
        )
    steps = len(choice.rows) // feed.examples
    optimizer = optim.make_optimizer(optim.OptimizerConfig(**config.optimizer), steps)
    with run.timer.phase("compile"):
        pretrained = common.load_pretrained(common.model_config(config), config.pretrained)
        graphdef, state, shardings = init_state(
            common.model_config(config),
            optimizer,
            run.mesh,
            seed=config.seed,
            frozen=config.frozen,
            pretrained=pretrained,
        )
    shapes = jax.eval_shape(lambda: state.params)
    logging.info(
        "parameters on mesh %s\n%s",
        dict(run.mesh.shape),
        sharding.table(shapes, sharding.param_shardings(shapes, run.mesh)),
    )
    artists = tuple(source.removeprefix("emoji/") for source in config.mixture.sources)
    views = training_views(run, model_params.merge(graphdef, state.params), store, artists)
    batches = pipeline.train_dataset(
        pipeline.RowSource(store, choice.rows),
        tokenizer,
        views,
        feed,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    state = train(run, optimizer, graphdef, state, shardings, batches, steps)
    with run.timer.phase("evaluate"):
        splits, answers = evaluate(run, graphdef, state.params, store, tokenizer, artists)
    if run.is_main:
        results = {
            "splits": splits,
            "mixture": choice.summary(),
            "steps": steps,
            "parameters": {"trained": _count(state.trainable), "frozen": _count(state.frozen)},
        }
        with run.timer.phase("report"):
            results["timing"] = run.timer.summary()
            common.write_json(run.workdir / "results.json", results)
            write_report(run, results, answers, store)
        tokens = SpecialTokens(tokenizer.image_id, tokenizer.im_end_id, tokenizer.pad_id)
        huggingface.save(
            model_params.unflatten(state.params),
            common.model_config(config),
            run.workdir / "model",
            tokens=tokens,
        )


def _count(params) -> int:
    return sum(int(np.prod(value.shape)) for value in params.values())


def main(argv):
    if len(argv) > 1:
        raise common.UserError(
            f"unexpected arguments {argv[1:]}; overrides are written --config.key=value"
        )
    config = CONFIG.value
    workdir = Path(WORKDIR.value or common.default_workdir(CONFIG))
    common.use_compile_cache()
    mesh = sharding.make_mesh(**config.mesh)
    run = Run(config, workdir, mesh, StepTimer(), Console())
    execute(run)


if __name__ == "__main__":
    common.run(main)
