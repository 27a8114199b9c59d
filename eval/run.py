"""PangeaBench: 14 data sets, two score profiles, for any model.

    python eval/run.py --list
    python eval/run.py fetch --tasks=xchat,mgsm_sw --data_dir=DATA          # on a machine with a network
    python eval/run.py --tasks=xchat,mgsm_sw --model=CHECKPOINT --data_dir=DATA --output_path=OUT
    python eval/run.py --tasks=xchat,mgsm_sw --model=openai:NAME --base_url=URL --data_dir=DATA --output_path=OUT
    python eval/run.py --tasks=xchat --responses=FILE.jsonl --judge=replay:FILE.jsonl --data_dir=DATA --output_path=OUT
    python eval/run.py rescore OUT [--judge=...]                            # no model, no data
    python eval/run.py report OUT [OUT ...] --output_path=REPORT            # models side by side
    python eval/run.py compare OUT OUT                                      # paired test of two runs
    python eval/run.py --include=quiz.yaml --tasks=quiz --model=... --output_path=OUT     # a task of your own

The output folder gets responses/ (each response is appended as it arrives, and a killed run continues from there),
samples/ (each response with its scores), judge.jsonl, results.json, report.md, report.html and figures. The exit code
is 0 if every document has a score, 1 if some have none (they are listed), 2 if the command is wrong, 3 if every
document that was asked has a score, but the endpoint cannot do some tasks (they are named).
"""

import argparse
import contextlib
import math
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# The script also runs in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from eval.bench import (
    comparison,
    documents,
    inclusion,
    judge,
    models,
    report,
    rescoring,
    responses,
    results,
    scoring,
)
from eval.bench.endpoint import Endpoint
from eval.bench.responses import Failure
from eval.bench.task import OWN, PROFILES, Dataset, Task
from eval.bench.tasks import DATASETS, UnknownTaskError, included, select
from pangea_jax.figures import inert
from pangea_jax.work import mirror, paths, restart

if TYPE_CHECKING:
    from pangea_jax.generate.engine import Engine


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
    flag("folders", nargs="*", help="output folders of earlier runs")
    flag("--list", action="store_true", help="show the data sets and their tasks")
    flag(
        "--include",
        type=Path,
        action="append",
        help="YAML, Python file or folder of YAMLs with tasks of your own; may be repeated",
    )
    flag("--tasks", help="tasks, data sets, groups or lang:CODE, with commas")
    flag("--data_dir", help="folder of the documents, see eval/bench/documents.py")
    flag("--output_path", help="folder for everything that the command writes")
    flag("--model", help="folder or name of a checkpoint, see pangea_jax.load; or openai:NAME")
    flag("--base", help="if --model holds adapters: the model below, else the one they name")
    flag("--name", action="append", help="the model's name in reports; in `report` one per folder")
    flag("--base_url", help="address of the model's endpoint, https://host/v1")
    flag("--responses", help="JSONL file with task, doc_id, response")
    flag("--judge", help="replay:FILE or openai:NAME")
    flag("--judge_base_url", help="address of the judge's endpoint")
    flag("--profile", choices=PROFILES, default="fixed", help="profile of the headline score")
    flag("--limit", type=_limit, help="documents per task, or a share below 1")
    flag("--batch_size", default="auto", help="rows in a batch, for checkpoints")
    flag("--mesh", default="auto", help="devices for a checkpoint: auto (all), or data=2,tensor=4")
    flag("--weights", help="hold a checkpoint's language model in 8 or 4 bits: int8, int4 or nf4")
    flag("--gen_kwargs", default="", help="max_new_tokens=512,temperature=0.2")
    flag("--concurrency", type=_whole(1), default=8, help="number of calls to an endpoint at once")
    flag("--retries", type=_whole(0), default=6, help="number of times a failed call is repeated")
    flag("--timeout", type=_seconds, default=120.0, help="seconds until a call fails")
    return parser


def _as_paths(args: argparse.Namespace) -> None:
    """Makes paths of the folders and files that the flags name, on a disk or in a bucket."""
    for flag in ("data_dir", "output_path", "responses"):
        if (text := getattr(args, flag)) is not None:
            try:
                setattr(args, flag, paths.path(text))
            except paths.PathError as error:
                raise UsageError(f"--{flag}: {error}") from None
    try:
        args.folders = [paths.path(text) for text in args.folders]
    except paths.PathError as error:
        raise UsageError(str(error)) from None


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


def main(argv: Sequence[str] | None = None, *, engine: "Engine | None" = None) -> int:
    """Runs a command and returns the exit code. `engine`: the checkpoint that --model names, loaded already."""
    console = inert.console(soft_wrap=True, markup=False)  # paths and names may have brackets
    parser = make_parser()
    parser.set_defaults(engine=engine)
    args = parser.parse_intermixed_args(argv)
    try:
        _as_paths(args)
        for path in args.include or ():
            restart.check_local(path, "--include")
        with included(inclusion.read(args.include or ())):
            return _run(args, parser, console)
    except (
        UsageError,
        UnknownTaskError,
        documents.DataError,
        restart.WorkError,
        ImportError,
        OSError,
    ) as error:
        return _ended(error, paths.say(error), 2)
    except Exception as error:
        fault = paths.explain(error)
        if fault is None:
            return _end_job(error)
        return _ended(error, fault.sentence, 2)


def _job():
    """`pangea_jax.work.distributed`; JAX takes a second to import, so it is not at the top."""
    from pangea_jax.work import distributed

    return distributed


def _ended(error: Exception, said: str, code: int) -> int:
    """Prints the reason; returns the exit code."""
    print(f"eval/run.py: {inert.line(said)}", file=sys.stderr)
    _job().fail(error, code)
    return code


def _end_job(error: Exception) -> int:
    """The exit code of a run that was asked to stop; ends a job in which something unexpected went wrong.

    Raises:
      Exception: `error`, if this process is alone.
    """
    job = _job()
    if isinstance(error, job.Stopped):
        return _ended(error, str(error), error.code)
    if job.is_one_of_several():
        traceback.print_exc()
        job.fail(error, job.EXIT_LOST if job.is_lost(error) else 1)
    raise error


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser, console: Console) -> int:
    if args.list:
        list_tasks(console, args.data_dir)
        return 0
    if args.command not in COMMANDS:
        raise UsageError(f"unknown command {args.command!r}; expected one of {', '.join(COMMANDS)}")
    command = COMMANDS[args.command]
    _check(args, parser, command)
    with contextlib.ExitStack() as args.held:
        _bring_near(args)
        return command.function(args, console)


def list_tasks(console: Console, data_dir: Path | None) -> None:
    """Prints the data sets, their languages and sizes, and the names of all tasks.

    With a data folder, also the number of documents in it.
    """
    table = Table(title="PangeaBench")
    for name in ("data set", "version", "scored by", "languages", "tasks", "documents"):
        right = name in ("version", "tasks", "documents")
        table.add_column(name, justify="right" if right else "left")
    if data_dir:
        table.add_column("here", justify="right")
    for dataset in DATASETS.values():
        subsets = dataset.subsets
        files = [documents.task_file(Task(dataset, subset), data_dir) for subset in subsets]
        here = sum(map(documents.count, files))
        known = [subset.size for subset in subsets]
        size = (
            f"≈{dataset.about:,}" if dataset.about else f"{here if None in known else sum(known):,}"
        )
        row = [dataset.name, str(dataset.version), dataset.metric, _languages(dataset)]
        row += [str(len(subsets)), size]
        if data_dir:
            row.append(f"{here:,}")
        table.add_row(*row)
    console.print(table)
    console.print(
        "Groups: pangeabench, pangeabench_multimodal, pangeabench_text, cvqa_local, cvqa_translated, lang:CODE\n"
        "and own for the tasks of --include"
    )
    console.print("Tasks:")
    for dataset in DATASETS.values():
        names = " ".join(f"{dataset.name}_{subset.name}" for subset in dataset.subsets)
        # A name is never cut: a line breaks between two names.
        console.print(
            textwrap.fill(
                names,
                100,
                initial_indent="  ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
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
    tasks = _select(args)
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
    crew = _crew(args)
    console.quiet = crew.index > 0
    left_out = models.left_out(model, requests)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {inert.line(reason)}")
    tasks = [task for task in tasks if task.name not in left_out]
    requests = [request for request in requests if request.task.name not in left_out]
    failures = [failure for failure in failures if failure.task not in left_out]
    log = responses.ResponseLog(args.output_path, crew.part)
    failures += responses.run(model, requests, log, console=console, crew=crew)
    if crew.index:
        return crew.gather(None)[0]
    records = {task.name: log.answers(task.name, requests) for task in tasks}
    if isinstance(model, models.ResponseFile) and model.unused:
        task, doc_id = model.unused[0]
        console.print(
            f"{len(model.unused)} responses in {args.responses} were not used; the first is for {task:.80} "
            f"{doc_id!r:.80}"
        )
    names = ("tasks", "profile", "limit", "gen_kwargs", "judge", "judge_base_url", "base")
    config = {"model": model.name} | {name: getattr(args, name) for name in names}
    config |= {"include": [str(path) for path in args.include or ()], "left_out": left_out}
    config |= {
        "name": args.name[0] if args.name else None,
        **results.departures(
            tasks, args.data_dir, limit=args.limit, overrides=_parse_settings(args.gen_kwargs)
        ),
    }
    code = results.write(args.output_path, config, records, failures, referee, console)
    return crew.gather(code)[0]


def _crew(args: argparse.Namespace) -> responses.Crew:
    """The processes that ask a checkpoint together."""
    if args.responses or _endpoint(args):
        return responses.ALONE
    from eval.bench import checkpoint_model

    return checkpoint_model.crew(args.sync)


def _select(args: argparse.Namespace) -> list[Task]:
    """The tasks of a command, if it has what they need."""
    tasks = select(args.tasks.split(","))
    if args.data_dir is None and (others := [t for t in tasks if t.dataset.group != OWN]):
        raise UsageError(f"{args.command} needs --data_dir for {others[0].name}")
    for task in tasks:
        if args.profile not in task.dataset.profiles:
            raise UsageError(
                f"{task.name} has no {args.profile} scores, because the paper did not score it; leave out --profile"
            )
    return tasks


def rescore_command(args: argparse.Namespace, console: Console) -> int:
    """Scores the responses of an earlier run again, without the model and the data folder."""
    (folder,) = args.folders
    before = report.read_results(folder)
    config = before["config"]
    args.output_path = folder
    if args.judge is None:
        args.judge = config["judge"]
        args.judge_base_url = args.judge_base_url or config["judge_base_url"]
    # samples/ has the responses of the last run only; responses/ may also have those of other settings.
    records = {name: scoring.read_records(folder, name) for name in before["documents"]}
    old = [Failure(**f) for f in before["failures"]]
    unanswered = [f for f in old if f.stage != "score"]
    config = config | {"judge": args.judge, "judge_base_url": args.judge_base_url}
    scores = rescoring.snapshot(folder, before["documents"])
    code = results.write(folder, config, records, unanswered, _open_judge(args), console)
    rescoring.write(folder, scores, before, report.read_results(folder), console)
    return code


def report_command(args: argparse.Namespace, console: Console) -> int:
    """Writes one report of several runs."""
    runs = [report.read_results(folder) for folder in args.folders]
    if args.name and len(args.name) != len(runs):
        raise UsageError(
            f"report got {len(args.name)} --name for {len(runs)} folders; give one for each, in their order"
        )
    names = args.name or report.distinct_names(runs, args.folders)
    args.output_path.mkdir(parents=True, exist_ok=True)
    report.write(
        args.output_path, [run | {"name": name} for run, name in zip(runs, names, strict=True)]
    )
    console.print(f"report: {args.output_path / 'report.html'}")
    return 0


def compare_command(args: argparse.Namespace, console: Console) -> int:
    """Prints a paired test of two runs on the documents that both have scored."""
    first, second = args.folders
    table = comparison.table_of(first, second, args.profile)
    if not table.row_count:
        raise UsageError(f"{first} and {second} have no scored document in common")
    console.print(table)
    for note in comparison.notes(first, second, args.profile):
        console.print(note)
    return 0


def fetch_command(args: argparse.Namespace, console: Console) -> int:
    """Downloads documents from the hub into the layout of eval/bench/documents.py."""
    from eval.bench import fetch

    tasks = _select(args)
    return fetch.fetch(tasks, args.data_dir, limit=args.limit, console=console)


def _open_model(args: argparse.Namespace) -> models.Model:
    if bool(args.model) == bool(args.responses):
        raise UsageError("give either --model or --responses")
    if args.responses:
        return models.ResponseFile(args.responses)
    if name := _endpoint(args):
        return models.EndpointModel(Endpoint(name, args.base_url, **_call_settings(args)))
    # JAX is imported only for our own checkpoints.
    from eval.bench import checkpoint_model

    _job().initialize()
    args.held.enter_context(_job().stoppable())
    try:
        return checkpoint_model.open_checkpoint(
            args.model,
            base=args.base,
            batch_size=args.batch_size,
            profile=args.profile,
            mesh=args.mesh,
            weights=args.weights,
            engine=args.engine,
        )
    except ValueError as error:
        raise UsageError(f"--model={args.model}: {error}") from None


def _endpoint(args: argparse.Namespace) -> str:
    """The name of the model behind an endpoint; "" for a checkpoint."""
    kind, _, name = (args.model or "").partition(":")
    return name if kind == "openai" else ""


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
    name, known = args.command, ("command", "folders", "include", *command.needs, *command.takes)
    for flag, value in vars(args).items():
        if flag not in known and value != parser.get_default(flag):
            raise UsageError(f"{name} does not take --{flag}")
    if missing := [f"--{flag}" for flag in command.needs if getattr(args, flag) is None]:
        raise UsageError(f"{name} needs {', '.join(missing)}")
    if args.name and len(args.name) > 1 and name != "report":
        raise UsageError(f"{name} takes one --name, got {len(args.name)}")
    least, most = command.folders
    if most == 0 and args.folders:
        raise UsageError(f"{name} does not take a folder, but got {args.folders[0]}")
    if not least <= len(args.folders) <= most:
        plural = "s" if least > 1 else ""
        raise UsageError(f"{name} needs {least} output folder{plural}, got {len(args.folders)}")


def _bring_near(args: argparse.Namespace) -> None:
    """Replaces folders in buckets by copies on the disk, until `args.held` ends. What is written there is copied back;
    `args.sync` copies it at once."""

    def near(folder: Path) -> mirror.Mirror:
        return args.held.enter_context(mirror.mirrored(folder, bring=None))

    args.folders = [near(folder).folder for folder in args.folders]
    if args.data_dir:
        args.data_dir = near(args.data_dir).folder
    if args.output_path:
        output = near(args.output_path)
        args.output_path, args.sync = output.folder, output.sync
    if args.responses:
        args.responses = args.held.enter_context(paths.nearby(args.responses))


class Command(NamedTuple):
    """A command, the flags that it needs, the flags that it also takes, and the smallest and largest number of folders.
    All other flags are an error."""

    function: Callable[[argparse.Namespace, Console], int]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    folders: tuple[float, float] = (0, 0)


_CALLS = ("concurrency", "retries", "timeout")
_ASKING = ("model", "base", "weights", "base_url", "responses", "gen_kwargs", "batch_size", "mesh")
_JUDGING = ("judge", "judge_base_url", *_CALLS)
COMMANDS = {
    "run": Command(
        run_command,
        needs=("tasks", "output_path"),
        takes=("data_dir", "profile", "limit", "name", *_ASKING, *_JUDGING),
    ),
    "rescore": Command(rescore_command, takes=_JUDGING, folders=(1, 1)),
    "report": Command(
        report_command, needs=("output_path",), takes=("name",), folders=(1, math.inf)
    ),
    "compare": Command(compare_command, takes=("profile",), folders=(2, 2)),
    "fetch": Command(fetch_command, needs=("tasks",), takes=("data_dir", "limit")),
}

if __name__ == "__main__":
    sys.exit(main())
