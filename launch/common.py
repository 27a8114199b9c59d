"""Process start-up that every launch script shares: flags, work directory, errors in one sentence, Ctrl-C."""

import dataclasses
import difflib
import functools
import inspect
import json
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from launch import distributed
from pangea_jax import checkpoints, sharding
from pangea_jax.checkpoints import huggingface
from pangea_jax.data.feed import BadRecordsError, Feed, RestartError
from pangea_jax.data.mixture import Mixture
from pangea_jax.data.pipeline import PipelineConfig
from pangea_jax.data.record import RecordError
from pangea_jax.data.store import RecordStore, StoreError
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.generate.engine import SAMPLE_MODEL
from pangea_jax.model import (
    AttentionImpl,
    LanguageConfig,
    Pangea,
    PangeaConfig,
    VisionConfig,
    VisionTower,
)
from pangea_jax.model import params as model_params
from pangea_jax.sample import emoji
from pangea_jax.train.flops import train_flops
from pangea_jax.train.guards import BadStepsError, GuardConfig
from pangea_jax.train.optimizer import OptimizerConfig
from pangea_jax.work import atomic

Config = ConfigDict | FrozenConfigDict
PRETRAINED = {
    "tower": ("tower.safetensors", ("vision",)),
    "stage1": ("stage1.safetensors", ("projector", "newline", "language")),
}
# By the signal that a run was asked to stop with: 128 and its number, as shells have it. A preemption notice
# counts as SIGTERM.
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED = 1, 130, 143
# A device or a host was lost: as good as a crash, and the same command may well go on. What would come again,
# no memory or a program that XLA refuses, is an error.
EXIT_LOST = 134
LOST = ("INTERNAL", "UNAVAILABLE", "ABORTED", "DATA_LOSS", "DEADLINE_EXCEEDED", "CANCELLED")
EXIT_STOPPED = (EXIT_INTERRUPTED, EXIT_PREEMPTED)


class UserError(Exception):
    """Something the user can put right; shown as one sentence, without a traceback."""


# What is wrong with the input rather than with the program.
ERRORS = (UserError, StoreError, RecordError, RestartError, BadRecordsError, BadStepsError)


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved itself."""

    def __init__(self, step: int, total: int, number: int):
        super().__init__(
            f"stopped after step {step} of {total} and saved; the same command goes on from there"
        )
        self.code = 128 + number


def define_config(default: str) -> flags.FlagHolder:
    """The `--config=FILE[:ARG]` flag; `--config.key=value` overrides one leaf."""
    try:  # the default one is read here, overrides included
        return config_flags.DEFINE_config_file(
            "config",
            default,
            "Config file, with :key=value,... arguments; --config.key=value overrides a leaf.",
            lock_config=True,
        )
    except _FLAG_ERRORS as error:
        _refuse_flags(error)


def run(main: Callable[[list[str]], Any]) -> None:
    """`app.run`, with user errors as one sentence and distinct exit codes."""
    logging.get_absl_handler().addFilter(_worth_showing)

    def guarded(argv):
        try:
            main(argv)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(stop.code)
        except KeyboardInterrupt as error:
            print(
                "stopped; the same command goes on from what was saved, or starts anew",
                file=sys.stderr,
            )
            _exit(error, EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(LOST):
                traceback.print_exc()
                _exit(error, EXIT_LOST)
            if "PANGEA_DEBUG" in os.environ or not isinstance(
                error, (*ERRORS, OSError, ValueError)
            ):
                if not distributed.is_initialized():
                    raise
                traceback.print_exc()
            else:
                print(f"error: {_sentence(error)}\n(PANGEA_DEBUG=1 shows where)", file=sys.stderr)
            _exit(error, EXIT_ERROR)

    app.run(guarded, flags_parser=_parse_flags)


def no_arguments(argv: Sequence[str]) -> None:
    """
    Raises:
      UserError: there is something beside the flags.
    """
    if len(argv) > 1:
        raise UserError(
            f"unexpected arguments {argv[1:]}; overrides are written --config.key=value"
        )


def _worth_showing(record) -> bool:
    # Orbax tells of every file it writes, tensorboardX of every name with a sign in it, and JAX looks for a TPU
    # wherever libtpu is not installed.
    chatty = any(f"{os.sep}{name}{os.sep}" in record.pathname for name in ("orbax", "tensorboardX"))
    if chatty and record.levelno < logging.converter.STANDARD_ERROR:
        return False
    return "Unable to initialize backend 'tpu'" not in record.getMessage()


def _exit(error: BaseException, code: int) -> None:
    if distributed.is_initialized():
        distributed.fail(error, code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    """An error's message on one line; of a traceback that a library put into it, what was raised."""
    lines = [line.strip() for line in str(error).strip("'\" \n").splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


# What flags and configs raise about a command line.
_FLAG_ERRORS = (
    flags.Error,
    AttributeError,
    KeyError,
    ValueError,
    TypeError,
    OSError,
    ImportError,
)


def _parse_flags(argv):
    """Parses flags; an unknown config key or argument becomes one sentence with the nearest name."""
    try:
        return flags.FLAGS(argv)
    except _FLAG_ERRORS as error:
        _refuse_flags(error)


def _refuse_flags(error: Exception):
    known = [name for name in flags.FLAGS if name.startswith(("config", "workdir"))]
    # ml_collections puts one error's repr into the next.
    message = _sentence(error).replace("\\n", " ").replace("\\'", "'")
    unknown = re.search(r"Unknown command line flag '([^']+)'", message)
    key = re.fullmatch(r"\W*(\w+)\W*(Did you mean .*)?", message)
    if unknown:
        near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
        message += f"; did you mean --{near[0]}?" if near and "Did you mean" not in message else ""
    elif key:
        given = (word.partition("=")[0] for word in sys.argv)
        flag = next((word for word in given if key[1] in word.split(".")), key[1])
        message = f"{flag}: the config has no key {key[1]!r}. {key[2] or ''}".strip()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


# Every key that a config of launch/train.py may have, and those of its parts.
KEYS = {
    "": (
        *("title", "seed", "data", "mixture", "augmented_views", "pipeline", "steps"),
        *("model", "pretrained", "frozen", "optimizer", "attention", "keep", "accumulation"),
        *("mesh", "log_every", "checkpoint", "guards", "wandb", "eval"),
    ),
    "data": ("store", "tokenizer", "image_id", "verify"),
    "mixture": _fields(Mixture),
    "pipeline": _fields(PipelineConfig),
    "model": _fields(PangeaConfig),
    "optimizer": _fields(OptimizerConfig),
    "attention": _fields(AttentionImpl),
    "mesh": sharding.AXES,
    "checkpoint": ("every", "keep", "keep_every"),
    "guards": _fields(GuardConfig),
}

# Of these none is never, and not without end.
_COUNTS = ("steps", "log_every", "accumulation", "checkpoint.every", "checkpoint.keep")


def check_keys(config: Config, *, evaluation: Callable) -> None:
    """Finds keys that nothing reads, which a config file may have and a command line cannot, and counts below 1.

    Args:
      evaluation: what is called with `config.eval`.

    Raises:
      UserError: names the first key that is not known, and the nearest that is; or the count.
    """
    known = KEYS | {"eval": tuple(inspect.signature(evaluation).parameters)}
    for part, names in known.items():
        for key in config[part] if part else config:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"config.{f'{part}.{key}'.lstrip('.')} is read by nothing{hint}")
    for name in _COUNTS:
        count = functools.reduce(operator.getitem, name.split("."), config)
        if count is not None and count < 1:
            raise UserError(f"config.{name} is {count}; expected a number of 1 or more")


def model_config(config: Config) -> PangeaConfig:
    """The model that `config.model` describes; unknown keys are errors."""
    parts = dict(config.model)
    vision, language = VisionConfig(**parts.pop("vision")), LanguageConfig(**parts.pop("language"))
    return PangeaConfig(vision=vision, language=language, **parts)


def open_data(config: Config) -> tuple[RecordStore, Tokenizer]:
    """`config.data`: the store of records and the folder with the tokenizer; "emoji" is the embedded sample.
    `image_id` is that of `<image>` where the tokenizer has no such token.

    Raises:
      UserError: the vocabulary is not the model's.
    """
    store = emoji.open_store() if config.data.store == "emoji" else RecordStore(config.data.store)
    if config.data.verify:
        store.verify()
    folder = config.data.tokenizer
    path = emoji.DIRECTORY if folder == "emoji" else Path(folder)
    tokenizer = load_tokenizer(path, config.data.get("image_id"))
    wanted = config.model.language.vocab_size
    if tokenizer.vocab_size > wanted:
        raise UserError(
            f"config.model.language.vocab_size is {wanted}, the tokenizer in {folder} has "
            f"{tokenizer.vocab_size} tokens"
        )
    return store, tokenizer


def artists(sources: Sequence[str]) -> tuple[str, ...]:
    """The artists among the embedded sample's sources, such as "emoji/noto"."""
    return tuple(source.removeprefix("emoji/") for source in sources)


def load_pretrained(
    config: PangeaConfig, names: Sequence[str], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Parameters that training starts from, by name, each where it will train. Pangea starts from CLIP
    and Qwen2, the sample model from what it ships with.

    Args:
      names: of `PRETRAINED`, or whatever `checkpoints.resolve` takes; "NAME:vision+language" takes
        parts.
    """
    shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))[1]
    shardings = model_params.unflatten(sharding.param_shardings(shapes, mesh))
    params, config = {}, huggingface.without_adapters(config)
    for name in names:
        if name in PRETRAINED:
            file, parts = PRETRAINED[name]
            path = SAMPLE_MODEL / file
        else:
            folder, _, chosen = name.partition(":")
            path, parts = checkpoints.resolve(folder), chosen.split("+") if chosen else None
        loaded = checkpoints.load(path, config, only=parts, shardings=shardings)
        params |= model_params.flatten(loaded)
    return params


def frozen_tower(
    config: Config, vision: VisionConfig, pretrained: Mapping[str, jax.Array]
) -> VisionTower:
    """The tower whose features can be computed once and kept.

    Raises:
      UserError: it is not pretrained, or not frozen.
    """
    graphdef, shapes = model_params.abstract(lambda: VisionTower(vision, rngs=nnx.Rngs(0)))
    names = {name: f"vision.{name}" for name in shapes}
    missing = set(names.values()) - set(pretrained)
    if missing or set(names.values()) - model_params.select(names.values(), config.frozen):
        raise UserError(
            "config.augmented_views keeps features of a frozen, pretrained tower: add the tower to "
            'config.pretrained and "vision\\..*" to config.frozen, or set augmented_views=0'
        )
    params = {name: pretrained[full].astype(jnp.float32) for name, full in names.items()}
    return model_params.merge(graphdef, params)


def step_options(config: Config) -> dict[str, Any]:
    """Arguments of `make_train_step` that the config sets."""
    return {
        "max_targets": config.pipeline.get("max_targets"),
        "keep": config.keep,
        "impl": AttentionImpl(**config.attention),
        "accumulation": config.accumulation,
    }


def number_of_steps(config: Config, batches: Feed) -> int:
    """Steps of the run: `config.steps`, or the whole epoch.

    Raises:
      UserError: the epoch's length is not known, too short, or nothing.
    """
    wanted, there = config.get("steps"), batches.num_batches
    if there is None and not wanted:
        raise UserError(
            f'packing "{config.pipeline.packing}" does not know its number of steps; set config.steps, '
            'or pipeline.packing to "planned", "balanced" or "none"'
        )
    if there is not None and (wanted or 1) > there:
        raise UserError(
            f"the examples chosen make {there} steps of {config.pipeline.rows} rows, "
            f"not {wanted or 1}; lower config.steps or pipeline.rows, or raise mixture.num_examples"
        )
    return wanted or there


# Of the metrics below those that are shares, not numbers.
FEED_SHARES = ("data/padding", "data/tile_fill")


def feed_metrics(counts: Mapping[str, Any]) -> dict[str, float]:
    """The data pipeline's counters as metrics: one number a language and source."""
    metrics = {"examples": counts["total_examples"]}
    for name in ("padding", "tile_fill", "cut", "dropped"):
        metrics[f"data/{name}"] = counts[name]
    for group in (
        "examples_per_language",
        "tokens_per_language",
        "examples_per_source",
        "bad_records",
    ):
        metrics |= {f"data/{group}/{label}": n for label, n in counts[group].items()}
    return metrics


def step_flops(
    config: Config, model: PangeaConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], rows: int
) -> dict[str, float]:
    """Model FLOPs of a step on `rows` rows, padding included, see `train_flops`.

    Args:
      shapes: of all parameters by name.
    """
    pipeline = config.pipeline
    return train_flops(
        model,
        shapes,
        tokens=rows * pipeline.row_tokens,
        row_tokens=pipeline.row_tokens,
        tiles=0 if config.augmented_views else rows * pipeline.row_tiles,
        targets=rows * (pipeline.get("max_targets") or pipeline.row_tokens),
        frozen=config.frozen,
    )


def batch_shapes(
    config: Config, model: PangeaConfig, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a step is given: a batch of the data pipeline, its rows filled up to the devices."""
    pipeline, shards = config.pipeline, sharding.row_shards(mesh)
    rows = -(-pipeline.rows // shards) * shards
    placed = jax.sharding.NamedSharding(mesh, sharding.BATCH_SPEC)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=placed)
    row = (rows, pipeline.row_tokens)
    names = ("tokens", "targets", "positions", "segment_ids", "image_index")
    batch = {name: array(row, jnp.int32) for name in names}
    batch["weights"] = array(row, jnp.float32)
    vision = model.vision
    if config.augmented_views:
        features = (rows, pipeline.row_tiles, vision.patches, vision.width)
        return batch | {"features": array(features, model.dtype)}
    tiles = (rows, pipeline.row_tiles, vision.image_size, vision.image_size, 3)
    return batch | {"tiles": array(tiles, jnp.uint8)}


def default_workdir(holder: flags.FlagHolder) -> str:
    """runs/<config file>[_<argument>], and a mark if leaves were overridden."""
    flag = flags.FLAGS[holder.name]
    path, _, arg = config_flags.get_config_filename(flag).partition(":")
    name = Path(path).stem + (f"_{arg}" if arg else "")
    overrides = config_flags.get_override_values(flag)
    name += "".join(f"_{key}={value}" for key, value in sorted(overrides.items()))
    return str(Path("runs") / re.sub(r"[^\w=.\-]+", "_", name)[:120])


# What a run may go on with otherwise: it changes no step, or by rounding alone.
_FREE = re.compile(
    r"(mesh|checkpoint|guards|attention|pipeline\.(threads|workers|max_bad_fraction))\b.*"
    r"|keep|accumulation|log_every|wandb|data\.verify"
)


def claim_workdir(workdir: Path, config: Config) -> None:
    """Makes the work directory this config's own.

    Raises:
      UserError: it cannot be written, or a run of another config has begun there.
    """
    path = workdir / "config.json"
    mine = json.loads(config.to_json())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A config that was refused has left nothing else; log.txt is of launch/sweep.py.
        begun = {file.name for file in workdir.iterdir()} - {path.name, "log.txt"}
        if path.exists() and begun:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            found = atomic.differences(theirs, mine)
            differing = clauses({k: v for k, v in found.items() if not _FREE.fullmatch(k)})
            if differing:
                raise UserError(
                    f"{workdir} holds a run of another config ({'; '.join(differing[:4])}); "
                    "give another --workdir, or remove that one"
                )
            if found:
                logging.info("the run goes on otherwise: %s", "; ".join(clauses(found)))
        atomic.write_json(path, mine, ensure_ascii=False)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}); give a --workdir you may write to"
        ) from None
    except json.JSONDecodeError:
        raise UserError(
            f"{path} is not JSON, so {workdir} is no work directory of ours; give another --workdir"
        ) from None


def clauses(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """What `atomic.differences` found, one clause a key."""
    return [
        f"{key} is {theirs!r} there and {mine!r} here" for key, (theirs, mine) in differing.items()
    ]


def cache_directory(name: str) -> Path | None:
    """A folder of the user's cache for what the next run need not do again; None if unwritable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pangea_jax" / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("nothing is cached: cannot write %s (%s)", cache, error.strerror)
        return None
    return cache


def use_compile_cache() -> None:
    """Keeps compiled programs across runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if not jax.config.jax_compilation_cache_dir:
        cache = cache_directory("xla")
        if cache is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
