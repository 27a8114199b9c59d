"""Asks a model about the documents of tasks and stores every response as it arrives.

Responses are appended to `<output>/responses/<task>.jsonl`. A killed run continues from there: a request is known by
the hashes of its document, prompt and generation settings, and is not asked again. Responses from a file
(`ResponseFile`) are always read again.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from eval.bench import documents
from eval.bench.models import Model, Request, ResponseFile
from eval.bench.task import Failed, Profile, Task, digest
from pangea_jax.figures import inert


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
                prompt = task.dataset.prompt(document, task.subset, profile)
                images = tuple(folder / name for name in prompt.images)
                for path in images:
                    if not path.is_file():
                        raise ValueError(f"picture {path} does not exist")
            except ValueError as error:
                failures.append(Failure(task.name, document.id, "data", str(error)))
                continue
            choices = task.dataset.choices(document)
            requests.append(Request(task, document, prompt, generation, images, choices))
    return requests, failures


class ResponseLog:
    """The responses of a run on disk: one file per task, with the field names of lm-eval's sample logs."""

    def __init__(self, output: Path):
        self._folder = output / "responses"
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, task: str) -> Path:
        return self._folder / f"{task}.jsonl"

    def read(self, task: str) -> list[dict[str, Any]]:
        """The records of a task."""
        path = self.path(task)
        if not path.exists():
            return []
        documents.drop_cut_line(path)
        return [row for _, row in documents.read_lines(path)]

    def answers(self, task: str, requests: Iterable[Request]) -> list[dict[str, Any]]:
        """The records that answer these requests, one for each document."""
        keys = {request.key for request in requests if request.task.name == task}
        # Two runs in one folder at the same time may both have asked; the last record counts.
        found = {r["doc_id"]: r for r in self.read(task) if record_key(r) in keys}
        return list(found.values())

    def append(self, request: Request, response: Any, model: str) -> None:
        target = request.task.dataset.target(request.document)
        settings = list(request.choices) or dataclasses.asdict(request.generation)
        arguments = {"arg_0": request.prompt.with_marks(), "arg_1": settings}
        record = {
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
        with self.path(request.task.name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def record_key(record: dict[str, Any]) -> tuple[str, str, str]:
    """`Request.key` of a stored response."""
    return record["doc_hash"], record["prompt_hash"], record["generation_hash"]


def run(
    model: Model, requests: Sequence[Request], log: ResponseLog, *, console: Console
) -> list[Failure]:
    """Asks the requests that the log does not answer yet, the longest prompts first; returns the failures.

    Raises:
      DataError: the log has responses of another model.
    """
    done = set()
    tasks = {request.task.name for request in requests}
    for task in tasks:
        for record in log.read(task):
            if record["model"] != model.name:
                raise documents.DataError(
                    f"{log.path(task)} has responses of {record['model']!r}, not of {model.name!r}; "
                    "choose another --output_path"
                )
            done.add((task, record_key(record)))
    if isinstance(model, ResponseFile):  # the file may have changed since
        done.clear()
        for task in tasks:
            log.path(task).unlink(missing_ok=True)
    pending = [r for r in requests if (r.task.name, r.key) not in done]
    if skipped := len(requests) - len(pending):
        console.print(f"{skipped} of {len(requests)} responses were already there")
    failures, told = [], set()
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("asking", total=len(pending))
        for request, response in _ask(model, pending):
            if isinstance(response, Failed):
                name, doc_id = request.task.name, request.document.id
                if name not in told:  # the first failure of each task
                    said = f"{inert.line(doc_id, 80)}: {inert.line(response.reason)}"
                    console.print(f"no response: {name} {said}", markup=False)
                    told.add(name)
                failures.append(Failure(name, doc_id, "response", response.reason))
            else:
                log.append(request, response, model.name)
            progress.update(bar, advance=1, description=request.task.name)
    order = {(r.task.name, r.document.id): i for i, r in enumerate(requests)}
    return sorted(failures, key=lambda failure: order[failure.task, failure.doc_id])


def _ask(model: Model, requests: Iterable[Request]) -> Iterator[tuple[Request, Any]]:
    groups = defaultdict(list)
    for request in requests:
        groups[request.generation].append(request)
    for generation, group in groups.items():
        likelihood = generation.output_type == "loglikelihood"
        answer = model.loglikelihood if likelihood else model.generate
        yield from answer(in_order(group))


def in_order(requests: Iterable[Request]) -> list[Request]:
    """The longest prompts first, so that a prompt too long for the memory fails at once. Questions about the
    same pictures stand together, so that a model can read the pictures once."""

    def length(request: Request) -> tuple[int, int]:
        return len(request.images), len(request.prompt.text.encode())

    families = defaultdict(list)
    for request in sorted(requests, key=length, reverse=True):
        families[request.images].append(request)
    return [request for family in families.values() for request in family]
