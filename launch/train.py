"""Trains one point of an experiment, evaluates the model in each language, and draws the results.

    python launch/train.py --config=configs/ablate_en_ratio.py
    python launch/train.py --config=configs/ablate_en_ratio.py:en_ratio=0.8 --workdir=runs/en_080
    python launch/train.py --config=configs/sample.py --config.optimizer.learning_rate=1e-3

The work directory gets config.json, checkpoints/, metrics.jsonl, tensorboard/, results.json, model/, adapter/ if
adapters train, and figures as PNG and SVG: loss, and with an evaluation also languages, tasks and sheet. The same
command continues a run that was stopped. `--init_from=DIR` starts a new run from the weights of a finished one.
"""

import dataclasses
import json
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

import jax
from absl import flags, logging
from rich.console import Console

from launch import common, executable
from pangea_jax import experiment, sharding
from pangea_jax.data import batch_view, feed
from pangea_jax.experiment import Experiment
from pangea_jax.figures import inert
from pangea_jax.sample import evaluation
from pangea_jax.train import optimizer as optim
from pangea_jax.train.flops import PEAK_FLOPS
from pangea_jax.train.guards import Guard, dump_batch
from pangea_jax.train.loop import Loop
from pangea_jax.train.resume import Checkpoints
from pangea_jax.train.state import init_state
from pangea_jax.train.telemetry import (
    APPENDED,
    Profiler,
    Speed,
    StepTimer,
    Telemetry,
    gather,
    record_start,
)
from pangea_jax.work import atomic, distributed, mirror, paths

CONFIG = common.define_config("configs/ablate_en_ratio.py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for all results, also gs://...; default runs/<config and argument>."
)
APPROXIMATE = flags.DEFINE_bool(
    "approximate_restart",
    False,
    "Continue although the order of the examples has changed, for example with another number of processes. "
    "Some examples are then repeated and others left out.",
)
EXECUTABLE = flags.DEFINE_string(
    "executable", None, "File of launch/compile.py --output, to run instead of compiling the step."
)
INIT_FROM = flags.DEFINE_string(
    "init_from", "", "A finished run, a model or adapters whose weights this run starts from."
)
PROFILE = flags.DEFINE_string(
    "profile", "", "Steps to trace into <workdir>/profile, as START:STOP, such as 20:25."
)


@dataclasses.dataclass
class Run:
    """The values that all phases of a run share.

    Logs, figures and results.json are written to `files`: that is `workdir`, or a folder copied there.
    """

    exp: Experiment
    workdir: Path
    files: mirror.Mirror
    mesh: jax.sharding.Mesh
    timer: StepTimer
    profiler: Profiler
    console: Console

    @property
    def is_main(self) -> bool:
        return jax.process_index() == 0


def make_speed(run, state, started) -> Speed:
    """Measures the speed of training; without MFU on a device whose peak FLOP/s is unknown."""
    device = run.mesh.devices.flat[0]
    rows = len(experiment.batch_shapes(run.exp, run.mesh))
    peak = PEAK_FLOPS.get(device.device_kind)
    if peak is None:
        logging.info(
            "no MFU: the peak FLOP/s of a device of kind %r is unknown", device.device_kind
        )
    return Speed(
        run.timer,
        flops_per_step=experiment.step_flops(run.exp, state.params, rows)["total"],
        peak_flops=peak and peak * run.mesh.size,
        started=started,
    )


def make_step(run, graphdef, optimizer, abstract, shardings, total_steps):
    """The training step; with --executable the program in that file."""
    step = experiment.make_step(run.exp, graphdef, optimizer, shardings, run.mesh)
    if EXECUTABLE.value:
        shapes = abstract, experiment.batch_shapes(run.exp, run.mesh)
        step = executable.load(EXECUTABLE.value, step, shapes, run.mesh, run.exp, total_steps)
    return step


def make_telemetry(run, total_steps, first):
    wandb = dict(project=run.exp.wandb, name=run.workdir.name, config=common.to_json(run.exp))
    return Telemetry(
        run.files.folder,
        total_steps,
        start_step=first,
        is_main=run.is_main,
        console=run.console,
        wandb=wandb if run.exp.wandb else None,
    )


def restore(run, checkpoints, abstract, state, data, total_steps):
    """State and progress of the newest checkpoint; without one, the given `state` and None."""
    if checkpoints.latest_step is not None:
        # Memory may not hold two states.
        jax.tree.map(lambda x: x.delete(), checkpoints.saved(state))
    restored = checkpoints.restore(abstract, data, state.frozen)
    if not restored:
        return state, None
    state, progress = restored
    run.timer = StepTimer(progress["clock"])
    logging.info("resumed from step %d of %d", int(state.step), total_steps)
    return state, progress


def train(run, step, state, abstract, batches, total_steps, reader, validator, bench):
    """Trains from the newest checkpoint, or from the beginning.

    Returns:
      The state after the last step, and the number of examples seen per language.

    Raises:
      Interrupted: a signal stopped the run, and the run has saved itself.
    """
    exp, data = run.exp, iter(batches)
    kept = {n: getattr(exp.checkpoint, n) for n in ("keep", "keep_every", "base")}
    checkpoints = Checkpoints(run.workdir / "checkpoints", **kept, before_save=run.files.sync)
    state, progress = restore(run, checkpoints, abstract, state, data, total_steps)
    first = int(state.step)
    started = record_start(run.files.folder, first) if run.is_main else None
    schedule = optim.make_schedule(exp.optimizer, total_steps)
    shown = reader.tokenizer, reader.pictures.patches, run.files.folder

    def extra(step, digest):
        own = feed.metrics(data.counters.flush()) | {"data/digest": digest}
        return {"learning_rate": float(schedule(step))} | gather(own, mean=feed.SHARES)

    def show(rows):
        if run.is_main:
            logging.info("first batch: %s", batch_view.save_batch(rows, *shown))

    with make_telemetry(run, total_steps, first) as telemetry, distributed.StopSignal() as stop:
        loop = Loop(
            step,
            run.mesh,
            total_steps,
            log_every=exp.log_every,
            save_every=exp.checkpoint.every,
            checkpoints=checkpoints,
            telemetry=telemetry,
            timer=run.timer,
            speed=make_speed(run, state, started),
            guard=Guard(exp.guards, lambda step, rows: dump_batch(rows, step, *shown)),
            extra=extra,
            on_first_batch=show,
            stop=stop.reached,
            profiler=run.profiler,
            validator=validator,
            bench=bench,
        )
        if progress is not None:
            loop.set_progress(progress)
        state = loop.run(state, data)
    data.close()
    if loop.stopped:
        raise common.Interrupted(int(state.step), total_steps, stop.number)
    seen = {code: int(n) for code, n in gather(data.counters.seen()).items()}
    return state, {"num_examples": sum(seen.values()), "examples_per_language": seen}


def write_report(run, results, answers, store):
    """Draws the figures and prints the tables."""
    from pangea_jax.sample import run_report  # takes a second to import

    exp, examples = run.exp, []
    if answers:
        unseen, chosen = answers["unseen_artwork"], dict(count=24, seed=exp.seed)
        examples = evaluation.sheet_examples(unseen, store, exp.reading, **chosen)
    shown = results | {"splits": {name: results["splits"][name] for name in answers}}
    run_report.write(run.files.folder, shown, examples, exp.title, run.console)
    run.files.sync()
    there = paths.children(run.workdir) - {common.LOCK}
    names = sorted(name for name in there if not name.endswith(".svg"))
    run.console.print(f"All results are in {run.workdir}/: {', '.join(names)}")


def execute(run):
    from launch import self_evaluation  # takes a second to import

    exp = run.exp
    store, tokenizer = experiment.open_data(exp)
    choice = experiment.choose_records(exp, store)
    bench = self_evaluation.open_bench(exp, tokenizer, run.workdir)
    if run.is_main:
        common.claim_workdir(run.workdir, exp)
        logging.info("mixture: %s", json.dumps(choice.summary()))
    pretrained = experiment.load_initial(exp, run.mesh)
    features = None
    if exp.augmented_views:
        with run.timer.phase("features"):
            cache = common.cache_directory("features")
            features = experiment.cached_features(exp, pretrained, store, run.mesh, cache)
    reader = experiment.make_reader(exp, store, tokenizer, features)
    batches = experiment.make_feed(
        exp, store, choice, reader, approximate_restart=APPROXIMATE.value
    )
    steps = experiment.number_of_steps(exp, batches)
    optimizer = optim.make_optimizer(exp.optimizer, steps)
    with run.timer.phase("compile"):
        options = dict(seed=exp.seed, frozen=exp.frozen, pretrained=pretrained)
        graphdef, state, shardings = init_state(exp.model, optimizer, run.mesh, **options)
    del pretrained, options  # as large as the model
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    table = sharding.table(dict(sorted(abstract.params.items())), shardings.params)
    logging.info("parameters on mesh %s\n%s", dict(run.mesh.shape), table)
    step = make_step(run, graphdef, optimizer, abstract, shardings, steps)
    parts = graphdef, shardings, run.mesh, steps
    validator = experiment.make_validator(exp, store, choice, reader, *parts)
    state, seen = train(run, step, state, abstract, batches, steps, reader, validator, bench)
    experiment.save_model(exp, state.params, tokenizer, run.workdir)
    with run.timer.phase("evaluate"):
        asked = graphdef, state.params, store, tokenizer, bench
        splits, answers = self_evaluation.evaluate(run, *asked)
    if run.is_main:
        results = {
            "splits": splits,
            "mixture": choice.summary(),
            "seen": seen,
            "steps": steps,
            **({"validation": validator.results()} if validator else {}),
            "parameters": {"trained": _count(state.trainable), "frozen": _count(state.frozen)},
            "timing": run.timer.summary(),
        }
        atomic.write_json(run.files.folder / "results.json", results, ensure_ascii=False)
        write_report(run, results, answers, store)
        if advice := validator and validator.advice(run.workdir, exp.model.language.lora.rank > 0):
            run.console.print(advice)


def _count(params) -> int:
    return sum(value.size for value in params.values())


def main(argv):
    common.no_arguments(argv)
    exp = CONFIG()
    exp = experiment.on_base(dataclasses.replace(exp, init_from=INIT_FROM.value or exp.init_from))
    workdir = common.folder(WORKDIR.value or common.default_workdir(), "--workdir")
    distributed.initialize()
    common.use_compile_cache(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(exp.mesh))
    with common.only_run(workdir), mirror.mirrored(workdir, bring=APPENDED) as files:
        profiler = Profiler(PROFILE.value, files.folder / "profile")
        execute(Run(exp, workdir, files, mesh, StepTimer(), profiler, inert.console()))


def cli():
    common.run(main)


if __name__ == "__main__":
    cli()
