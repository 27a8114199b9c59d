"""Process start-up that every launch script shares: flags, work directory, errors in one sentence, Ctrl-C."""

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from launch import _configs, distributed
from pangea_jax import typed_config
from pangea_jax.data.feed import BadRecordsError, RestartError
from pangea_jax.data.record import RecordError
from pangea_jax.data.store import StoreError
from pangea_jax.experiment import Experiment
from pangea_jax.train.guards import BadStepsError
from pangea_jax.work import atomic, restart

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
ERRORS = (
    UserError,
    restart.WorkError,
    StoreError,
    RecordError,
    RestartError,
    BadRecordsError,
    BadStepsError,
)


class Interrupted(Exception):
    """The run was asked to stop by a signal and has saved itself."""

    def __init__(self, step: int, total: int, number: int):
        super().__init__(
            f"stopped after step {step} of {total} and saved; the same command goes on from there"
        )
        self.code = 128 + number


def define_config(default: str, kind: type = Experiment) -> Callable[[], Any]:
    """Defines the flag `--config=FILE[:ARG]`; `--config.key=value` overrides one key.

    Args:
      kind: the dataclass that the file fills.

    Returns:
      A function that gives the config as `kind` after the flags are parsed, with its errors.
    """
    # ml_collections reads the file that is named there, overrides included.
    sys.argv[:] = map(_installed, sys.argv, ["", *sys.argv])
    try:
        for key in filter(None, map(_override, sys.argv)):
            typed_config.check_key(kind, key)
        holder = config_flags.DEFINE_config_file(
            "config",
            _configs.find(default),
            "Config file, with :key=value,... arguments; --config.key=value overrides a key.",
            lock_config=True,
        )
    except _FLAG_ERRORS as error:
        _refuse_flags(error)
    return lambda: typed_config.build(kind, holder.value)


def _installed(word: str, before: str) -> str:
    """A word of the command line; configs/NAME.py becomes the installed package's where there is no clone."""
    flag, equals, path = word.partition("=")
    if equals and flag.lstrip("-") == "config":
        return f"{flag}={_configs.find(path)}"
    return _configs.find(word) if before in ("-config", "--config") else word


def _override(word: str) -> str | None:
    """The key that `--config.KEY=VALUE` or `--noconfig.KEY` sets."""
    found = re.match(r"--?(?:no)?config\.([^=]+)", word)
    return found and found[1]


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
    """Parses flags; what is wrong with them becomes one sentence."""
    try:
        return flags.FLAGS(argv)
    except _FLAG_ERRORS as error:
        _refuse_flags(error)


def _refuse_flags(error: Exception):
    # ml_collections puts one error's repr into the next.
    message = _sentence(error).replace("\\n", " ").replace("\\'", "'")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def default_workdir() -> str:
    """runs/<config file>[_<argument>], and the keys that flags override."""
    flag = flags.FLAGS["config"]
    path, _, arg = config_flags.get_config_filename(flag).partition(":")
    name = Path(path).stem + (f"_{arg}" if arg else "")
    overrides = config_flags.get_override_values(flag)
    name += "".join(f"_{key}={value}" for key, value in sorted(overrides.items()))
    return str(Path("runs") / re.sub(r"[^\w=.\-]+", "_", name)[:120])


# Keys that may change when a run goes on: they change no step, except by rounding.
_FREE = re.compile(
    r"(mesh|checkpoint|guards|attention|pipeline\.(threads|workers|max_bad_fraction))\b.*"
    r"|keep|accumulation|log_every|wandb|data\.verify"
)


def to_json(config: Any) -> dict[str, Any]:
    """A config's dataclass as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def claim_workdir(workdir: Path, config: Any) -> None:
    """Makes the work directory this config's own.

    Args:
      config: a dataclass, written as config.json.

    Raises:
      UserError: it cannot be written.
      WorkError: a run of another config has begun there.
    """
    path = workdir / "config.json"
    mine = to_json(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A config that was refused has left nothing else; log.txt is of launch/sweep.py.
        begun = {file.name for file in workdir.iterdir()} - {path.name, "log.txt"}
        if path.exists() and begun:
            holds = "a run of another config"
            found = restart.compare(
                atomic.read_json(path), mine, workdir, holds=holds, flag="--workdir", free=_FREE
            )
            if found:
                changed = "; ".join(restart.clauses(found))
                logging.info("the run goes on with another config: %s", changed)
        atomic.write_json(path, mine, ensure_ascii=False)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir} ({error.strerror}); give a --workdir you may write to"
        ) from None
    except json.JSONDecodeError:
        raise UserError(
            f"{path} is not JSON, so {workdir} is no work directory of ours; give another --workdir"
        ) from None


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
