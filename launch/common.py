"""Process start-up that every launch script shares: flags, work directory, errors in one sentence, Ctrl-C."""

import difflib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from pangea_jax import checkpoints
from pangea_jax.data import emoji
from pangea_jax.data.feed import BadRecordsError, Feed, RestartError
from pangea_jax.data.record import RecordError
from pangea_jax.data.store import RecordStore, StoreError
from pangea_jax.data.tokenizer import Tokenizer, load_tokenizer
from pangea_jax.generate.engine import SAMPLE_MODEL
from pangea_jax.model import (
    AttentionImpl,
    LanguageConfig,
    PangeaConfig,
    VisionConfig,
    VisionTower,
)
from pangea_jax.model import params as model_params

Config = ConfigDict | FrozenConfigDict
PRETRAINED = {
    "tower": ("tower.safetensors", ("vision",)),
    "stage1": ("stage1.safetensors", ("projector", "newline", "language")),
}
EXIT_ERROR, EXIT_INTERRUPTED = 1, 130


class UserError(Exception):
    """Something the user can put right; shown as one sentence, without a traceback."""


# What is wrong with the input rather than with the program.
ERRORS = (UserError, StoreError, RecordError, RestartError, BadRecordsError)


class Interrupted(Exception):
    """The run was asked to stop and has saved itself."""

    def __init__(self, step: int, total: int):
        super().__init__(
            f"stopped after step {step} of {total} and saved; the same command goes on from there"
        )


def define_config(default: str) -> flags.FlagHolder:
    """The `--config=FILE[:ARG]` flag; `--config.key=value` overrides one leaf."""
    return config_flags.DEFINE_config_file(
        "config",
        default,
        "Config file, with :key=value,... arguments; --config.key=value overrides a leaf.",
        lock_config=True,
    )


def run(main: Callable[[list[str]], Any]) -> None:
    """`app.run`, with user errors as one sentence and distinct exit codes."""
    # JAX looks for a TPU wherever libtpu is not installed and says so at every start.
    logging.get_absl_handler().addFilter(
        lambda r: "Unable to initialize backend 'tpu'" not in r.getMessage()
    )

    def guarded(argv):
        try:
            main(argv)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            print(
                "stopped; nothing was trained since the last checkpoint, the same command goes on from it",
                file=sys.stderr,
            )
            sys.exit(EXIT_INTERRUPTED)
        except (*ERRORS, OSError, ValueError) as error:
            if "PANGEA_DEBUG" in os.environ:
                raise
            print(f"error: {_sentence(error)}\n(PANGEA_DEBUG=1 shows where)", file=sys.stderr)
            sys.exit(EXIT_ERROR)

    app.run(guarded, flags_parser=_parse_flags)


def _sentence(error: Exception) -> str:
    """An error's message on one line; of a traceback that a library put into it, what was raised."""
    lines = [line.strip() for line in str(error).strip("'\" \n").splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def _parse_flags(argv):
    """Parses flags; an unknown config key or argument becomes one sentence with the nearest name."""
    try:
        return flags.FLAGS(argv)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
        OSError,
        ImportError,
    ) as error:
        known = [name for name in flags.FLAGS if name.startswith(("config", "workdir"))]
        message = _sentence(error)
        unknown = re.search(r"Unknown command line flag '([^']+)'", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.5)
            message += (
                f"; did you mean --{near[0]}?" if near and "Did you mean" not in message else ""
            )
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


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


def load_pretrained(config: PangeaConfig, names: Sequence[str]) -> dict[str, jax.Array]:
    """Parameters that training starts from, by name. Pangea starts from CLIP and Qwen2, the sample
    model from what it ships with.

    Args:
      names: of `PRETRAINED`, or whatever `checkpoints.resolve` takes; "NAME:vision+language" takes
        parts.
    """
    params = {}
    for name in names:
        if name in PRETRAINED:
            file, parts = PRETRAINED[name]
            path = SAMPLE_MODEL / file
        else:
            folder, _, chosen = name.partition(":")
            path, parts = checkpoints.resolve(folder), chosen.split("+") if chosen else None
        params |= model_params.flatten(checkpoints.load(path, config, only=parts))
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
        "remat": config.remat,
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


def feed_metrics(counts: Mapping[str, Any]) -> dict[str, float]:
    """The data pipeline's counters as metrics: one number a language and source."""
    metrics = {"examples": counts["total_examples"]}
    for name in ("padding", "tile_fill", "cut", "dropped"):
        metrics[f"data/{name}"] = counts[name]
    for group in ("examples_per_language", "examples_per_source", "bad_records"):
        metrics |= {f"data/{group}/{label}": n for label, n in counts[group].items()}
    return metrics


def default_workdir(holder: flags.FlagHolder) -> str:
    """runs/<config file>[_<argument>], and a mark if leaves were overridden."""
    flag = flags.FLAGS[holder.name]
    path, _, arg = config_flags.get_config_filename(flag).partition(":")
    name = Path(path).stem + (f"_{arg}" if arg else "")
    overrides = config_flags.get_override_values(flag)
    name += "".join(f"_{key}={value}" for key, value in sorted(overrides.items()))
    return str(Path("runs") / re.sub(r"[^\w=.\-]+", "_", name)[:120])


def claim_workdir(workdir: Path, config: Config) -> None:
    """Makes the work directory this config's own.

    Raises:
      UserError: it cannot be written, or belongs to another config.
    """
    path = workdir / "config.json"
    mine = json.loads(config.to_json())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            differing = _differences(theirs, mine)
            if differing:
                raise UserError(
                    f"{workdir} holds a run of another config ({'; '.join(differing[:4])}); "
                    "give another --workdir, or remove that one"
                )
        write_json(path, mine)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}); give a --workdir you may write to"
        ) from None
    except json.JSONDecodeError:
        raise UserError(
            f"{path} is not JSON, so {workdir} is no work directory of ours; give another --workdir"
        ) from None


def _differences(theirs: Any, mine: Any, key: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for name in sorted(theirs.keys() | mine.keys())
            for line in _differences(theirs.get(name), mine.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if theirs == mine else [f"{key} is {theirs!r} there and {mine!r} here"]


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


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


class StopSignal:
    """While in its `with`, a signal asks for a stop at the end of the step; a second one stops at once."""

    def __init__(self, *signals: signal.Signals):
        self.requested = False
        self._signals, self._before = signals, {}

    def __enter__(self):
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(
            "\nstopping: finishing this step and saving (once more to stop at once)",
            file=sys.stderr,
        )


class Rates:
    """Averages metrics between two log lines without waiting for the device at every step."""

    def __init__(self):
        self._pending: list[Mapping[str, jax.Array]] = []
        self._since = time.perf_counter()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        self._pending.append(metrics)

    def flush(self) -> dict[str, float]:
        """Means since the last call (the loss per trained token), and rates a second."""
        metrics = jax.device_get(self._pending)
        seconds = time.perf_counter() - self._since
        self._pending, self._since = [], time.perf_counter()
        weights = [float(m["target_tokens"]) for m in metrics]
        weighted = {
            name: sum(float(m[name]) * w for m, w in zip(metrics, weights, strict=True))
            / max(sum(weights), 1)
            for name in ("loss", "accuracy")
        }
        return weighted | {
            "grad_norm": sum(float(m["grad_norm"]) for m in metrics) / len(metrics),
            "tokens_per_second": sum(float(m["tokens"]) for m in metrics) / seconds,
            "examples_per_second": sum(float(m["examples"]) for m in metrics) / seconds,
        }
