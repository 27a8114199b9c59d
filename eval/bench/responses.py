"""Asks a model about the documents of tasks and stores every response as it arrives.

Responses are appended to `<output>/responses/<task>.jsonl`. A killed run continues from there: a request is known by
the hashes of its document, prompt and generation settings, and is not asked again. Responses from a file
(`ResponseFile`) are always read again.

Several processes share the questions (`Crew`). Which are asked together (`parcels`) does not depend on their number, so
neither do the responses. Each process appends to files of its own, `<output>/responses/process_<i>/`. At the end the
first one puts all responses together.
"""

import dataclasses
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from eval.bench import documents
from eval.bench.models import Model, Request, ResponseFile
from eval.bench.task import Failed, Profile, Prompt, Task, digest
from pangea_jax.figures import inert
from pangea_jax.work import atomic

# A group of requests is cut into so many parcels, if each then has at least so many requests. With fewer parcels some
# processes would have nothing to do at the end; at the end of a parcel, some rows of a batch have nothing to do.
_PARCELS, _LEAST = 32, 128


@dataclasses.dataclass(frozen=True)
class Crew:
    """The processes that share the questions; by default one.

    Attributes:
      index, count: the number of this process, and how many there are.
      gather: gives the values of all processes (of JSON's types), in their order. All must call it.
      sync: brings what this process has written to where the other processes can read it.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Any], list] = lambda value: [value]
    sync: Callable[[], Any] = lambda: None

    @property
    def part(self) -> str:
        """The folder for this process's own responses, see `ResponseLog`; "" if it is alone."""
        return f"process_{self.index}" if self.count > 1 else ""


ALONE = Crew()


@dataclasses.dataclass(frozen=True)
class Failure:
    """A document without a score: its task, the stage that failed (data, response or score), and the reason."""

    task: str
    doc_id: str
    stage: str
    reason: str


def make_requests(
    tasks: Sequence[Task],
    data_dir: Path | None,
    *,
    profile: Profile,
    limit: float | None = None,
    overrides: dict[str, Any] | None = None,
) -> tuple[list[Request], list[Failure]]:
    """The requests of all tasks, and a failure for each document without one (a missing picture, for example)."""
    requests, failures = [], []
    for task in tasks:
        folder = documents.task_file(task, data_dir).parent
        generation = dataclasses.replace(task.generation, **(overrides or {}))
        for document in documents.load(task, data_dir, limit=limit):
            try:
                asked = task.dataset.prompt, document, task.subset, profile
                prompt = documents.call(task.dataset, Prompt, *asked)
                images = tuple(folder / name for name in prompt.images)
                for path in images:
                    if not path.is_file():
                        raise ValueError(f"picture {path} does not exist")
            except documents.DataError:
                raise
            except ValueError as error:
                failures.append(Failure(task.name, document.id, "data", str(error)))
                continue
            choices = documents.call(task.dataset, tuple, task.dataset.choices, document)
            requests.append(Request(task, document, prompt, generation, images, choices))
    return requests, failures


class ResponseLog:
    """The responses of a run on disk: one file per task, with the field names of lm-eval's sample logs.

    Args:
      part: the name of a folder for the responses of one process of several.
    """

    def __init__(self, output: Path, part: str = ""):
        self._folder, self._part = output / "responses", part
        (self._folder / part).mkdir(parents=True, exist_ok=True)

    def path(self, task: str) -> Path:
        return self._folder / f"{task}.jsonl"

    def read(self, task: str) -> list[dict[str, Any]]:
        """The records of a task, those of all processes."""
        rows = []
        for path in (self.path(task), *sorted(self._folder.glob(f"process_*/{task}.jsonl"))):
            if path.exists():
                documents.drop_cut_line(path)
                rows += [row for _, row in documents.read_lines(path)]
        return rows

    def answers(self, task: str, requests: Iterable[Request]) -> list[dict[str, Any]]:
        """The records that answer these requests, one for each document."""
        keys = {request.key for request in requests if request.task.name == task}
        # Two runs in one folder at the same time may both have asked; the last record counts.
        found = {r["doc_id"]: r for r in self.read(task) if record_key(r) in keys}
        return list(found.values())

    def append(self, request: Request, response: Any, model: str) -> None:
        with self._file(request.task.name).open("a", encoding="utf-8") as file:
            file.write(_line(_record(request, response, model)))

    def _file(self, task: str) -> Path:
        return self._folder / self._part / f"{task}.jsonl"

    def settle(self, answered: Sequence[tuple[Request, Any]], model: str) -> None:
        """Writes the files of the tasks anew: what other requests were answered, and then these, in this order."""
        by_task = defaultdict(dict)
        for request, response in answered:
            by_task[request.task.name][request.key] = _record(request, response, model)
        for task, records in by_task.items():
            others = [row for row in self.read(task) if record_key(row) not in records]
            lines = map(_line, [*others, *records.values()])
            atomic.write_bytes(self.path(task), "".join(lines).encode())

    def drop_parts(self) -> None:
        """Removes the files of single processes, after `settle`."""
        for folder in self._folder.glob("process_*"):
            shutil.rmtree(folder, ignore_errors=True)


def _record(request: Request, response: Any, model: str) -> dict[str, Any]:
    target = request.task.dataset.target(request.document)
    settings = list(request.choices) or dataclasses.asdict(request.generation)
    arguments = {"arg_0": request.prompt.with_marks(), "arg_1": settings}
    return {
        "task": request.task.name,
        "task_version": request.task.dataset.version,
        "model": model,
        "doc_id": request.document.id,
        "doc": dict(request.document.row),
        "target": target,
        "arguments": {"gen_args_0": arguments},
        "images": list(request.prompt.images),
        "resps": [[response]],
        "doc_hash": request.document.hash,
        "prompt_hash": request.prompt_hash,
        "target_hash": digest(target),
        "generation_hash": request.generation_hash,
    }


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def record_key(record: dict[str, Any]) -> tuple[str, str, str]:
    """`Request.key` of a stored response."""
    return record["doc_hash"], record["prompt_hash"], record["generation_hash"]


def run(
    model: Model,
    requests: Sequence[Request],
    log: ResponseLog,
    *,
    console: Console,
    crew: Crew = ALONE,
) -> list[Failure]:
    """Asks the requests that the log does not answer yet, the longest prompts first; returns the failures.

    With several processes, all call it, and afterwards the log of the first one has all responses.

    Raises:
      DataError: the log has responses of another model.
    """
    parts = parcels(requests)
    order = [request for parcel in parts for request in parcel]
    number = {id(request): i for i, request in enumerate(order)}
    answered = _answered(model, order, log)
    # Also where each process sees its own disk alone, all know what is answered.
    there = {i for known in crew.gather(list(answered)) for i in known}
    if there:
        console.print(f"{len(there)} of {len(requests)} responses were already there")
    pending = [[r for r in part if number[id(r)] not in there] for part in parts]
    mine = share([part for part in pending if part], crew)
    failures, told = {}, set()
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("asking", total=sum(map(len, mine)))
        for request, response in (pair for part in mine for pair in _ask(model, part)):
            name, doc_id = request.task.name, request.document.id
            if isinstance(response, Failed):
                if name not in told:  # the first failure of each task
                    said = f"{inert.line(doc_id, 80)}: {inert.line(response.reason)}"
                    console.print(f"no response: {name} {said}", markup=False)
                    told.add(name)
                failures[number[id(request)]] = response.reason
            else:
                log.append(request, response, model.name)
                answered[number[id(request)]] = response
            progress.update(bar, advance=1, description=name)
    _collect(model, order, log, answered, crew)
    found = [pair for own in crew.gather(list(failures.items())) for pair in own]
    place = {id(request): i for i, request in enumerate(requests)}
    found.sort(key=lambda pair: place[id(order[pair[0]])])
    return [
        Failure(order[i].task.name, order[i].document.id, "response", reason) for i, reason in found
    ]


def _answered(model: Model, order: Sequence[Request], log: ResponseLog) -> dict[int, Any]:
    """Number of a request -> its response in the log."""
    tasks = {request.task.name for request in order}
    if isinstance(model, ResponseFile):  # the file may have changed since
        for task in tasks:
            log.path(task).unlink(missing_ok=True)
    done = {}
    for task in tasks:
        for record in log.read(task):
            if record["model"] != model.name:
                raise documents.DataError(
                    f"{log.path(task)} has responses of {record['model']!r}, not of {model.name!r}; "
                    "choose another --output_path"
                )
            done[task, record_key(record)] = record["resps"][0][0]
    keys = ((i, (r.task.name, r.key)) for i, r in enumerate(order))
    return {i: done[key] for i, key in keys if key in done}


def _collect(model, order, log: ResponseLog, answered: dict[int, Any], crew: Crew) -> None:
    """Puts the responses of all processes into the log of the first one, in an order that depends on nothing else."""
    everything = {}
    for own in crew.gather(list(answered.items())):
        everything |= dict(own)
    if crew.index == 0:
        log.settle([(order[i], everything[i]) for i in sorted(everything)], model.name)
        crew.sync()
    crew.gather(None)  # nothing is removed before it is written elsewhere
    log.drop_parts()


def _ask(model: Model, parcel: Sequence[Request]) -> Iterator[tuple[Request, Any]]:
    likelihood = parcel[0].generation.output_type == "loglikelihood"
    return (model.loglikelihood if likelihood else model.generate)(parcel)


def parcels(requests: Iterable[Request]) -> list[list[Request]]:
    """The requests in the order in which they are asked, cut into parts that are asked one after the other.

    Requests of one parcel have the same `generation`. Questions about the same pictures are in one parcel.
    """
    groups, found = defaultdict(list), []
    for request in requests:
        groups[request.generation].append(request)
    for group in groups.values():
        least, parcel = max(_LEAST, -(-len(group) // _PARCELS)), []
        for request in in_order(group):
            if len(parcel) >= least and not (
                request.images and request.images == parcel[-1].images
            ):
                found.append(parcel)
                parcel = []
            parcel.append(request)
        found.append(parcel)
    return found


def share(parts: Sequence[list[Request]], crew: Crew) -> list[list[Request]]:
    """The parcels of one process. They are dealt out to and fro, because the first ones are the longest."""
    turn = [*range(crew.count), *reversed(range(crew.count))]
    return [part for i, part in enumerate(parts) if turn[i % len(turn)] == crew.index]


def in_order(requests: Iterable[Request]) -> list[Request]:
    """The longest prompts first, so that a prompt too long for the memory fails at once. Questions about the
    same pictures stand together, so that a model can read the pictures once."""

    def length(request: Request) -> tuple[int, int]:
        return len(request.images), len(request.prompt.text.encode())

    families = defaultdict(list)
    for request in sorted(requests, key=length, reverse=True):
        families[request.images].append(request)
    return [request for family in families.values() for request in family]
