"""What a training job asks its own model at its end: PangeaBench (`launch/bench_of_a_run.py`), or the sample's
questions."""

from pathlib import Path
from typing import TYPE_CHECKING

from launch import common
from pangea_jax import experiment
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.experiment import Experiment
from pangea_jax.sample import evaluation

if TYPE_CHECKING:
    from launch.bench_of_a_run import Bench


def open_bench(exp: Experiment, tokenizer: Tokenizer, workdir: Path) -> "Bench | None":
    """What asks PangeaBench; None without `config.eval.bench.tasks`.

    Raises:
      UserError: a package is missing; and the errors of `Bench`.
    """
    bench = exp.eval and exp.eval.bench
    if not (bench and bench.tasks):
        return None
    try:
        from launch.bench_of_a_run import Bench  # the main job does without its packages
    except ImportError as error:
        raise common.UserError(
            f"config.eval.bench needs {error.name}; run: pip install -r requirements-eval.txt"
        ) from None
    return Bench(exp, tokenizer, workdir)


def evaluate(run, graphdef, params, store, tokenizer, bench: "Bench | None"):
    """The scores of each split and language, and the answers to the sample's questions.

    Both are empty without `config.eval`.
    """
    exp, splits, answers = run.exp, {}, {}
    if exp.eval and exp.eval.bench is None and exp.data.store == "emoji":
        splits, answers = evaluation.evaluate(
            graphdef,
            params,
            store,
            tokenizer,
            run.mesh,
            languages=exp.mixture.languages,
            artists=experiment.artists(exp),
            settings=exp.eval,
            policy=exp.reading,
            seed=exp.seed + 1,
            cache=common.cache_directory("features"),
        )
    if bench:
        splits |= bench.finish(params, run.console)
    return splits, answers
