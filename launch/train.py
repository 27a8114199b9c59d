"""Trains one point of an experiment, evaluates it per language, draws what came out.

    python launch/train.py --config=configs/ablate_en_ratio.py
    python launch/train.py --config=configs/ablate_en_ratio.py:en_ratio=0.8 --workdir=runs/en_080
    python launch/train.py --config=configs/sample.py --config.optimizer.learning_rate=1e-3

Into the work directory: config.json, checkpoints/, metrics.jsonl, tensorboard/, results.json, model/, and as PNG and
SVG the loss, and languages and sheet if it is evaluated. Started again with the same work directory it goes on where
it was.
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
from pangea_jax.data import batch_view, emoji, mixture, pipeline
from pangea_jax.model import VisionConfig
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


def training_views(run, model, pretrained, store) -> pipeline.CachedViews | pipeline.Views:
    """How training sees pictures: cached features of a frozen tower, or tiles for one that trains."""
    config = run.config
    if not config.augmented_views:
        return pipeline.Views(store, model.pinpoints, model.vision.image_size, model.vision.grid)
    with run.timer.phase("features"):
        features = frozen_features(
            common.frozen_tower(config, model.vision, pretrained),
            store,
            emoji.picture_keys(store, common.artists(config.mixture.sources)),
            run.mesh,
            augmented=config.augmented_views,
            seed=config.seed,
            cache=common.cache_directory("features"),
        )
    return pipeline.CachedViews(features)


def train(run, optimizer, graphdef, state, shardings, batches, total_steps, tokenizer):
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
    step_fn = make_train_step(
        graphdef, optimizer, shardings, run.mesh, **common.step_options(config)
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
                rows = next(data)
                batch = sharding.to_global(rows, run.mesh)
            if step == 0 and run.is_main:
                patches = VisionConfig(**config.model.vision).patches
                seen = batch_view.save_batch(rows, tokenizer, patches, run.workdir)
                logging.info("first batch: %s", seen)
            with run.timer.phase("compile") if step == first else run.timer.step():
                state, metrics = step_fn(state, batch)
                rates.add(metrics)
                if step == first:
                    jax.block_until_ready(metrics)
            if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
                with run.timer.step():
                    scalars = rates.flush()
                rate = {"learning_rate": float(schedule(step))}
                telemetry.log(step, scalars | rate | common.feed_metrics(data.counters.flush()))
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
    data.close()
    return state


def evaluate(run, graphdef, params, store, tokenizer):
    """Scores per split and language, and every answer; nothing without `config.eval`."""
    config = run.config
    if not config.eval:
        return {}, {}
    return naming.evaluate(
        graphdef,
        params,
        store,
        tokenizer,
        run.mesh,
        languages=config.mixture.languages,
        artists=common.artists(config.mixture.sources),
        seed=config.seed + 1,
        cache=common.cache_directory("features"),
        **config.eval,
    )


def write_report(run, results, answers, store):
    """The figures, and the tables on the console."""
    report.plot_loss(run.workdir / "metrics.jsonl", run.workdir)
    if answers:
        report.plot_languages(results, run.workdir, run.config.title)
        unseen = answers["unseen_artwork"]
        examples = naming.sheet_examples(unseen, store, count=24, seed=run.config.seed)
        title = f"{run.config.title}: drawings by an artist never trained on"
        report.answer_sheet(examples, run.workdir / "sheet", title)
        run.console.print(report.results_table(results))
    run.console.print(report.timing_table(results["timing"]))
    names = sorted(path.name for path in run.workdir.iterdir() if path.suffix != ".svg")
    run.console.print(f"Everything is in {run.workdir}/: {', '.join(names)}")


def execute(run):
    config = run.config
    store, tokenizer = common.open_data(config)
    choice = mixture.choose(store.index, mixture.Mixture(seed=config.seed, **config.mixture))
    if run.is_main:
        common.claim_workdir(run.workdir, config)
        logging.info("mixture: %s", json.dumps(choice.summary()))
    model = common.model_config(config)
    pretrained = common.load_pretrained(model, config.pretrained)
    batches = pipeline.train_dataset(
        pipeline.RowSource(store, choice.rows),
        tokenizer,
        training_views(run, model, pretrained, store),
        pipeline.PipelineConfig(**config.pipeline),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    steps = common.number_of_steps(config, batches)
    optimizer = optim.make_optimizer(optim.OptimizerConfig(**config.optimizer), steps)
    with run.timer.phase("compile"):
        graphdef, state, shardings = init_state(
            model,
            optimizer,
            run.mesh,
            seed=config.seed,
            frozen=config.frozen,
            pretrained=pretrained,
        )
    shapes = jax.eval_shape(lambda: state.params)
    table = sharding.table(shapes, sharding.param_shardings(shapes, run.mesh))
    logging.info("parameters on mesh %s\n%s", dict(run.mesh.shape), table)
    state = train(run, optimizer, graphdef, state, shardings, batches, steps, tokenizer)
    with run.timer.phase("evaluate"):
        splits, answers = evaluate(run, graphdef, state.params, store, tokenizer)
    tokens = SpecialTokens(tokenizer.image_id, tokenizer.im_end_id, tokenizer.pad_id)
    params = model_params.unflatten(state.params)
    huggingface.save(params, model, run.workdir / "model", tokens=tokens)
    if run.is_main:
        results = {
            "splits": splits,
            "mixture": choice.summary(),
            "steps": steps,
            "parameters": {"trained": _count(state.trainable), "frozen": _count(state.frozen)},
            "timing": run.timer.summary(),
        }
        common.write_json(run.workdir / "results.json", results)
        write_report(run, results, answers, store)


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
