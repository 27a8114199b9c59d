"""Start-up that all launch scripts share: flags, work directory, one-sentence errors, exit codes, caches."""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from launch import attempts
from pangea_jax import typed_config
from pangea_jax.data.feed import BadRecordsError, RestartError
from pangea_jax.data.store import StoreError
from pangea_jax.experiment import Experiment
from pangea_jax.figures import inert
from pangea_jax.sample.sources import SourceError
from pangea_jax.train.guards import BadStepsError
from pangea_jax.work import atomic, distributed, paths, restart

# A run that a signal stopped exits with 128 plus the number of the signal, as in shells. A preemption notice counts
# as SIGTERM.
EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PREEMPTED = 1, 130, 143
# An error that would happen again, such as too little memory, has EXIT_ERROR.
EXIT_LOST = distributed.EXIT_LOST
EXIT_STOPPED = (EXIT_INTERRUPTED, EXIT_PREEMPTED)


class UserError(Exception):
    """A mistake that the user can correct; shown as one sentence, without a traceback."""


# The input is wrong, not the program.
ERRORS = (
    OSError,
    ValueError,
    UserError,
    restart.WorkError,
    StoreError,
    RestartError,
    BadRecordsError,
    BadStepsError,
    SourceError,
)


class Interrupted(Exception):
    """A signal asked the run to stop, and the run has saved itself."""

    def __init__(self, step: int, total: int, number: int):
        super().__init__(
            f"stopped after step {step} of {total} and saved; the same command continues from there"
        )
        self.code = 128 + number


# Keys of `--config.KEY=None`.
_SET_TO_NONE: list[str] = []


def define_config(default: str, kind: type = Experiment) -> Callable[[], Any]:
    """Defines the flag `--config=FILE[:ARGUMENTS]`; `--config.key=value` overrides one key.

    Args:
      kind: the dataclass that the file fills.

    Returns:
      A function that builds the config as `kind` once the flags are parsed.
    """
    # ml_collections reads the file and the overrides from sys.argv. It cannot read None, so these words are taken out.
    sys.argv[:] = map(_with_config_found, sys.argv, ["", *sys.argv])
    with _flag_errors():
        for word in list(sys.argv):
            if override := re.match(r"--?(?:no)?config\.([^=]+)(=None)?", word):
                key, is_none = override.groups()
                typed_config.check_key(kind, key)
                if is_none and override.end() == len(word):
                    sys.argv.remove(word)
                    _SET_TO_NONE.append(key)
        holder = config_flags.DEFINE_config_file(
            "config",
            find_config(default),
            "Config file, with :key=value,... arguments; --config.key=value overrides a key.",
            lock_config=True,
        )

    def config():
        holder.value.update_from_flattened_dict(dict.fromkeys(_SET_TO_NONE))
        return typed_config.build(kind, holder.value)

    return config


def find_config(path: str) -> str:
    """Finds the file of `--config=PATH[:ARGUMENTS]`, and keeps the arguments.

    A path that does not exist and begins with "configs/" is looked up in the installed package `configs`. If it is not
    there either, `path` is returned unchanged, and the reader of the flag reports it.
    """
    name, colon, arguments = path.partition(":")
    package = importlib.util.find_spec("configs")
    if Path(name).exists() or not name.startswith("configs/") or package is None:
        return path
    for folder in package.submodule_search_locations or ():
        installed = Path(folder, name.removeprefix("configs/"))
        if installed.is_file():
            return f"{installed}{colon}{arguments}"
    return path


def _with_config_found(word: str, before: str) -> str:
    """Applies `find_config` to one word of the command line, if it is the value of --config."""
    flag, equals, path = word.partition("=")
    if equals and flag.lstrip("-") == "config":
        return f"{flag}={find_config(path)}"
    return find_config(word) if before in ("-config", "--config") else word


@contextlib.contextmanager
def _flag_errors() -> Iterator[None]:
    """Prints an error about the command line as one sentence, and exits."""
    try:
        yield
    # What flags, configs and ml_collections raise.
    except (
        flags.Error,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
        OSError,
        ImportError,
    ) as error:
        # ml_collections puts the repr of one error into the next.
        message = _sentence(error).replace("\\n", " ").replace("\\'", "'")
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _parse_flags(argv):
    with _flag_errors():
        return flags.FLAGS(argv)


def run(main: Callable[[list[str]], Any]) -> None:
    """`app.run`, with one-sentence errors and distinct exit codes."""
    logging.get_absl_handler().addFilter(_worth_showing)

    def guarded(argv):
        try:
            main(argv)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(stop.code)
        except distributed.Stopped as stop:
            print(stop, file=sys.stderr)
            _exit(stop, stop.code)
        except KeyboardInterrupt as error:
            print(
                "stopped; the same command continues from the last checkpoint, if there is one",
                file=sys.stderr,
            )
            _exit(error, EXIT_INTERRUPTED)
        except Exception as error:
            lost = distributed.is_lost(error)
            fault = paths.explain(error)
            lost |= fault is not None and fault.passes
            if (fault or isinstance(error, ERRORS)) and "PANGEA_DEBUG" not in os.environ:
                said = inert.visible(fault.sentence if fault else _sentence(error))
                print(f"error: {said}\n(PANGEA_DEBUG=1 shows where)", file=sys.stderr)
            elif lost or jax.distributed.is_initialized():
                traceback.print_exc()
            else:
                raise
            _exit(error, EXIT_LOST if lost else EXIT_ERROR)

    app.run(guarded, flags_parser=_parse_flags)


def no_arguments(argv: Sequence[str]) -> None:
    """
    Raises:
      UserError: the command line has arguments that are not flags.
    """
    if len(argv) > 1:
        raise UserError(
            f"unexpected arguments {argv[1:]}; overrides are written --config.key=value"
        )


_TOLD: set[str] = set()
_CHATTY = ("orbax", "tensorboardX", "fsspec", "gcsfs")


def _worth_showing(record) -> bool:
    # Orbax and fsspec log every file, tensorboardX every name with a special character, and JAX its search for
    # a TPU on machines without libtpu.
    if any(f"{os.sep}{name}{os.sep}" in record.pathname for name in _CHATTY):
        if record.exc_info and "PANGEA_DEBUG" not in os.environ:
            # Each of Orbax' threads logs an error that passes through it. One line tells it; `run` says what to do.
            said = str(record.exc_info[1])
            record.exc_info, known = None, said in _TOLD
            _TOLD.add(said)
            return not known
        return record.levelno >= logging.converter.STANDARD_ERROR
    return "Unable to initialize backend 'tpu'" not in record.getMessage()


def _exit(error: BaseException, code: int) -> None:
    distributed.fail(error, code)
    sys.exit(code)


def _sentence(error: Exception) -> str:
    """The message of an error on one line. If it holds a library's traceback, only the last line of that counts."""
    lines = [line.strip() for line in str(error).strip("'\" \n").splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def overrides() -> dict[str, Any]:
    """The values of all `--config.key=value`, by key."""
    return config_flags.get_override_values(flags.FLAGS["config"]) | dict.fromkeys(_SET_TO_NONE)


def default_workdir() -> str:
    """runs/<config file>[_<argument>][_<overridden key>=<value>...]."""
    flag = flags.FLAGS["config"]
    path, _, arg = config_flags.get_config_filename(flag).partition(":")
    name = Path(path).stem + (f"_{arg}" if arg else "")
    name += "".join(f"_{key}={value}" for key, value in sorted(overrides().items()))
    return str(Path("runs") / re.sub(r"[^\w=.\-]+", "_", name)[:120])


# Keys that may change when a run continues. They change the result of a step only by rounding.
_FREE = re.compile(
    r"(mesh|checkpoint|guards|attention|pipeline\.(threads|workers|max_bad_fraction))\b.*"
    r"|keep|accumulation|log_every|wandb|data\.verify"
)


def local_folder(name: str, flag: str) -> Path:
    """The folder that a flag names, which must be on a disk.

    Raises:
      WorkError: it is an address such as gs://bucket/run.
    """
    restart.check_local(name, flag)
    return Path(name)


def folder(name: str, flag: str) -> Path:
    """The folder that a flag names, on a disk or in a bucket.

    Raises:
      UserError: it is an address that cannot be used.
    """
    try:
        return paths.expand(paths.path(name))
    except paths.PathError as error:
        raise UserError(f"{flag}: {error}") from None


def to_json(config: Any) -> dict[str, Any]:
    """A config's dataclass, in the types of JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


LOCK, COMPILED = "lock", "compiled"


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a work directory, until the process ends or is killed, see `restart.claim`.

    Only the main process of a job holds the lock.

    Raises:
      UserError: the directory cannot be written.
      WorkError: another run works there.
    """
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                held.enter_context(restart.claim(workdir / LOCK))
                held.enter_context(attempts.recorded(workdir, _lasting))
            except OSError as error:
                if paths.explain(error):
                    raise
                raise _unwritable(workdir, error) from None
        yield


def _lasting(error: BaseException) -> str:
    """The sentence of an error that would come again; "" for a stop, and where a device or the bucket was lost."""
    fault = paths.explain(error) if isinstance(error, Exception) else None
    stopped = not isinstance(error, Exception) or isinstance(
        error, Interrupted | distributed.Stopped
    )
    if stopped or distributed.is_lost(error) or (fault and fault.passes):
        return ""
    return fault.sentence if fault else _sentence(error) or type(error).__name__


def _unwritable(workdir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {workdir} ({error.strerror}); give a --workdir you may write to"
    )


def claim_workdir(workdir: Path, config: Any) -> None:
    """Makes the work directory and writes the config, a dataclass, there as config.json.

    Raises:
      UserError: the directory cannot be written.
      WorkError: a run of another config has begun there.
    """
    path = workdir / "config.json"
    mine = to_json(config)
    try:
        paths.make_folder(workdir)
        # A run whose config was refused leaves only config.json; launch/sweep.py writes log.txt.
        there = paths.children(workdir)
        begun = there - {path.name, "log.txt", LOCK, COMPILED, attempts.FILE}
        if path.name in there and begun:
            holds = "a run of another config"
            more = ""
            if "init_from" in flags.FLAGS:  # only launch/train.py has this flag
                more = f"to go on from its weights, start a new one with --init_from={workdir}"
            found = restart.compare(
                atomic.read_json(path),
                mine,
                workdir,
                holds=holds,
                flag="--workdir",
                free=_FREE,
                more=more,
            )
            if found:
                changed = "; ".join(restart.clauses(found))
                logging.info("the run continues with another config: %s", changed)
        atomic.write_json(path, mine, ensure_ascii=False)
    except OSError as error:
        if paths.explain(error):
            raise
        raise _unwritable(workdir, error) from None
    except json.JSONDecodeError:
        raise UserError(
            f"{path} is not JSON, so this project did not write {workdir}; give another --workdir"
        ) from None


def cache_directory(name: str) -> Path | None:
    """A folder below the user's cache folder; None, with a warning, if it cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pangea_jax" / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("no results are cached: cannot write %s (%s)", cache, error.strerror)
        return None
    return cache


def use_compile_cache(workdir: Path | None = None) -> None:
    """Keeps compiled programs across runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder.

    A run in a bucket keeps them in its work directory, because the next machine of a pod begins with an empty disk.
    """
    if not jax.config.jax_compilation_cache_dir:
        remote = workdir is not None and paths.is_remote(workdir)
        cache = workdir / COMPILED if remote else cache_directory("xla")
        if cache is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks for the next allocation. Call it before JAX starts its threads.

    By default they go back to the kernel, which must clear them again in every step. On CPUs this took a third of the
    time of a small model's step. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(option, value)
