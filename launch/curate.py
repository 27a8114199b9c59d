"""Makes instruction data as the paper made PangeaIns, and counts and checks data sets.

python launch/curate.py translate --config=configs/curation/translate.py --out=data/translated
python launch/curate.py cultural --config=configs/curation/cultural.py --out=data/cultural
python launch/curate.py ocr --config=configs/curation/ocr.py --out=data/ocr
python launch/curate.py stats data/translated --bench=data/pangeabench

--config.key=value overrides one key of a config. --runner names an Apache Beam runner (DirectRunner, this machine, is
the default; DataflowRunner, FlinkRunner, ...); further flags are its pipeline options. After a stop, run the
same command again to go on; stored replies of models are not requested again.
"""

import argparse
import importlib
import logging as python_logging
import os
import re
import sqlite3
import sys
import types
from pathlib import Path

if not __package__:  # run as a file of a clone
    import _clone  # noqa: F401

from absl import app, flags, logging
from ml_collections import config_flags
from rich.progress import MofNCompleteColumn, Progress

from pangea_jax import typed_config
from pangea_jax.curation import reply_store, workflow
from pangea_jax.data.store import StoreError
from pangea_jax.figures import inert
from pangea_jax.work import paths
from pangea_jax.work.restart import WorkError, check_local

console = inert.console(soft_wrap=True)

# Command -> the dataclass of its config. Each command imports only its own module, pangea_jax.curation.COMMAND, so it
# does not need the packages of the others.
PIPELINES = {"translate": "TranslateConfig", "cultural": "CulturalConfig", "ocr": "OcrConfig"}
EXIT_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 1, os.EX_TEMPFAIL, 130

_CONFIG = config_flags.DEFINE_config_file("config", None, "The pipeline's config.")
_OUT = flags.DEFINE_string("out", None, "Folder of the results.")
_RUNNER = flags.DEFINE_string("runner", None, "Apache Beam runner (default: DirectRunner).")


# What flags and config files raise.
_FLAG_ERRORS = (
    *(flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError, ImportError),
)


class UsageError(Exception):
    """The command line is wrong; says how."""


def run_pipeline(command: str, arguments: list[str]) -> None:
    if arguments and _RUNNER.value is None:
        raise UsageError(f"unknown {' '.join(arguments)}; Beam's options need --runner")
    if _CONFIG.value is None or _OUT.value is None:
        raise UsageError(
            f"{command} needs --config and --out: python launch/curate.py {command} "
            f"--config=configs/curation/{command}.py --out=FOLDER"
        )
    options = [f"--runner={_RUNNER.value or 'DirectRunner'}", *arguments]
    check_local(_OUT.value, "--out")
    out = Path(_OUT.value)
    module, kind = _pipeline(command)
    report = module.run(typed_config.build(kind, _CONFIG.value), out, options)
    print((out / "report.md").read_text(encoding="utf-8"))
    print(f"{report['kept']:,} records in {out / workflow.RECORDS}")


def _pipeline(command: str) -> tuple[types.ModuleType, type]:
    """The module of a command and the dataclass of its config."""
    module = importlib.import_module(f"pangea_jax.curation.{command}")
    return module, getattr(module, PIPELINES[command])


def run_statistics(arguments: list[str]) -> None:
    from pangea_jax.curation import statistics
    from pangea_jax.curation.contamination import Benchmarks
    from pangea_jax.figures import composition

    arguments = parse_statistics(arguments)
    data = arguments.folder
    if not data.exists():
        raise UsageError(f"{data}: no such folder or file of records")
    if arguments.images is not None and not arguments.images.is_dir():
        raise UsageError(f"--images={arguments.images}: no such folder")
    check_local(_OUT.value, "--out")
    out = Path(_OUT.value or (data if data.is_dir() else data.parent) / "statistics")
    out.mkdir(parents=True, exist_ok=True)  # an error here comes before the long work
    benchmarks = None
    if arguments.bench:
        with console.status("reading benchmarks"):
            benchmarks = Benchmarks.read(arguments.bench, pictures=arguments.pictures)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar:
        task = bar.add_task("records", total=None)
        try:
            found = statistics.measure(
                data,
                benchmarks=benchmarks,
                pictures=arguments.pictures,
                images=arguments.images,
                work=out,
                workers=arguments.workers,
                progress=lambda count: bar.advance(task, count),
            )
        except StoreError as error:
            raise UsageError(str(error)) from None
    held = composition.Composition(found.index())
    composition.write_figure(held, out)
    path = statistics.write(found, composition.tables(held), out)
    console.print(f"{found.kept:,} of {found.total:,} records can be used; report: {path}")


def parse_statistics(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/curate.py stats",
        description="Counts records by language, source and kind, draws them as the paper's Figure 2, and finds "
        "those that overlap with benchmarks. Writes into statistics/ beside the records, or --out.",
    )
    add = parser.add_argument
    add("folder", type=Path, help="results of a pipeline, a release, a file of records, or a store")
    add(
        "--bench",
        type=Path,
        action="append",
        help="folder of a benchmark to compare with, e.g. eval/run.py's --data_dir; may be repeated",
    )
    add("--images", type=Path, help="folder of the pictures (default: that of the records)")
    add("--pictures", action=argparse.BooleanOptionalAction, default=True, help="compare pictures")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser.parse_args(arguments)


def main(argv: list[str]) -> None:
    command, *arguments = argv[1:] or [""]
    if command == "stats":
        run_statistics(arguments)
    elif command in PIPELINES:
        run_pipeline(command, arguments)
    else:
        raise UsageError(f"expected one of {', '.join((*PIPELINES, 'stats'))}, got {command!r}")


def _guarded(argv: list[str]) -> None:
    # Libraries may only print warnings: Beam and the HTTP client report every step and request.
    logging.set_verbosity(logging.WARNING)
    python_logging.getLogger("pangea_jax").setLevel(python_logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda r: not r.getMessage().startswith("apitools not found")
    )
    try:
        main(argv)
    except reply_store.Stop as stop:
        print(f"{stop}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (UsageError, WorkError, ImportError, OSError, sqlite3.Error, ValueError) as error:
        if "PANGEA_DEBUG" in os.environ:
            raise
        print(
            f"error: {inert.visible(paths.say(error))}\n(PANGEA_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        sys.exit(EXIT_ERROR)


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses our flags; leaves the rest: Beam's options and the arguments of `stats`."""
    try:
        command = next((word for word in argv if word in PIPELINES), None)
        for word in argv:
            key = re.match(r"--?(?:no)?config\.([^=]+)", word)
            if command and key:
                typed_config.check_key(_pipeline(command)[1], key[1])
        return flags.FLAGS(argv, known_only=True)
    except _FLAG_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    app.run(_guarded, flags_parser=_parse_flags)
