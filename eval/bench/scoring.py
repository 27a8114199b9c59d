"""Scores of documents, tasks, data sets and the suite, from responses."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.bench.documents import call, read_lines
from eval.bench.judge import Judge, Question
from eval.bench.metrics import bootstrap
from eval.bench.responses import Failure
from eval.bench.task import PROFILES, Document, Failed, Profile, Scored, Task, answer_text
from eval.bench.tasks import DATASETS, GROUPS
from pangea_jax.sample.scores import wilson_interval
from pangea_jax.work import atomic

COLUMNS = ("en", "mul")
Bounds = tuple[float, float]
AVERAGES = {"multimodal": "pangeabench_multimodal", "text": "pangeabench_text"}
_NOT_JUDGED = Failed("not judged; name a judge with --judge")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response to a document, with the judge's reply for judged data sets."""

    document: Document
    response: Any
    record: Mapping[str, Any]
    reply: str | Failed | None = None


@dataclasses.dataclass
class TaskScores:
    """The scores of one task in one profile; `scored` maps the id of a document to it and its score."""

    task: Task
    profile: Profile
    scored: dict[str, tuple[Document, Scored]]
    failures: list[Failure] = dataclasses.field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.scored)

    @property
    def statistics(self) -> list[tuple[str, tuple[float, ...]]]:
        """(cluster, statistics) of each scored document, for the bootstrap."""
        return [(document.cluster, score.statistics) for document, score in self.scored.values()]

    @functools.cached_property
    def value(self) -> float:
        """The headline score on the scale of the paper's tables; NaN if no document has a score."""
        return micro_average([self]) if self.scored else float("nan")

    @property
    def clusters(self) -> int:
        """The number of independent groups of documents."""
        return len({cluster for cluster, _ in self.statistics})

    def metrics(self) -> dict[str, float]:
        """The mean of each metric, and the metrics that exist only for a whole subset."""
        if not self.scored:
            return {}
        documents, scores = zip(*self.scored.values(), strict=True)
        means = {n: float(np.mean([s.metrics[n] for s in scores])) for n in scores[0].metrics}
        filtered = [score.filtered for score in scores]
        dataset = self.task.dataset
        return means | dataset.corpus_metrics(documents, filtered, self.task.subset, self.profile)

    def only(self, ids: Iterable[str]) -> "TaskScores":
        """The scores of some documents."""
        scored = {id: self.scored[id] for id in self.scored if id in ids}
        return TaskScores(self.task, self.profile, scored)


def judge_answers(task: Task, answers: Sequence[Answer], judge: Judge | None) -> list[Answer]:
    """The answers with the judge's replies; without a judge, `Failed` takes the place of the reply."""
    dataset = task.dataset
    if not dataset.judged:
        return list(answers)
    if judge is None:
        return [dataclasses.replace(answer, reply=_NOT_JUDGED) for answer in answers]
    requests = [dataset.judge_request(a.document, answer_text(a.response)) for a in answers]
    questions = [
        Question(task.name, answer.document.id, request)
        for answer, request in zip(answers, requests, strict=True)
    ]
    replies = judge.replies(questions, dataset.readable)
    return [dataclasses.replace(a, reply=reply) for a, reply in zip(answers, replies, strict=True)]


def score_task(task: Task, answers: Sequence[Answer], profile: Profile) -> TaskScores:
    """Scores every answer by the rules of a profile."""
    found = TaskScores(task, profile, {})
    for answer in answers:
        document, result = answer.document, _score_answer(task, answer, profile)
        if isinstance(result, Failed):
            found.failures.append(Failure(task.name, document.id, "score", result.reason))
        else:
            found.scored[document.id] = document, result
    return found


def _score_answer(task: Task, answer: Answer, profile: Profile) -> Scored | Failed:
    # The paper's M-LlavaBench scores a missing reply, so its scorer gets None here. A run without any judge still has
    # no scores.
    reply = answer.reply
    if isinstance(reply, Failed):
        counted = profile == "paper" and task.dataset.paper_scores_failures
        if reply == _NOT_JUDGED or not counted:
            return reply
        reply = None
    wants_text = task.generation.output_type == "generate_until"
    if wants_text and not isinstance(answer.response, str):
        return Failed(f"the response is {type(answer.response).__name__}, not a text")
    scored = task.dataset.score, answer.document, answer.response, task.subset, profile, reply
    return call(task.dataset, (Scored, Failed), *scored)


def dataset_columns(values: Mapping[str, float], dataset: str) -> dict[str, float]:
    """The numbers of a data set in the paper's tables: unweighted means over its subsets.

    Args:
      values: subset -> score.

    Returns:
      `en` and `mul`; a column is left out if none of its subsets has a score.
    """
    columns = {subset.name: subset.column for subset in DATASETS[dataset].subsets}
    if unknown := sorted(set(values) - set(columns)):
        raise ValueError(f"{dataset} has no subset {unknown[0]!r}; it has {', '.join(columns)}")
    members = {
        column: [v for name, v in values.items() if columns[name] == column and np.isfinite(v)]
        for column in COLUMNS
    }
    return {column: float(np.mean(scores)) for column, scores in members.items() if scores}


def suite_average(columns: Mapping[str, Mapping[str, float]], group: str) -> dict[str, float]:
    """AVG of a table: the unweighted mean over the data sets of a group that have the column.

    Args:
      columns: data set -> column -> score.
      group: `multimodal` or `text`.
    """
    members = {
        column: [
            columns[name][column]
            for name in GROUPS[AVERAGES[group]]
            if column in columns.get(name, {})
        ]
        for column in COLUMNS
    }
    return {column: float(np.mean(scores)) for column, scores in members.items() if scores}


def micro_average(scores: Sequence[TaskScores]) -> float:
    """The score over all documents of tasks of one data set, in all languages together."""
    sums = np.sum([values for s in scores for _, values in s.statistics], axis=0)
    return float(scores[0].task.dataset.combine(sums, scores[0].profile))


def draws(scores: Sequence[TaskScores], seed: int = 0) -> dict[str, np.ndarray]:
    """Bootstrap draws of a data set: subset -> values, and its columns under `EN` and `MUL`."""
    scores = [s for s in scores if s.scored]
    if not scores:
        return {}
    combine = functools.partial(scores[0].task.dataset.combine, profile=scores[0].profile)
    statistics = {s.task.subset.name: s.statistics for s in scores}
    values = bootstrap.draw_subsets(statistics, combine, seed=seed)
    for column in COLUMNS:
        members = [values[s.task.subset.name] for s in scores if s.task.subset.column == column]
        if members:
            values[column.upper()] = np.mean(members, axis=0)
    return values


def intervals(scores: Sequence[TaskScores]) -> dict[str, Bounds]:
    """95 % intervals of a data set's tasks by subset, and of its columns under `EN` and `MUL`.

    The bootstrap's, unless all documents of a subset have the same score, so that there is nothing to draw. Then the
    interval is Wilson's for this score of as many cases as there are clusters, or unknown if scores have no largest
    value. Such subsets widen the interval of their column as if they erred together.
    """
    scores = [s for s in scores if s.scored]
    sampled = draws(scores)
    found = {name: bootstrap.interval(values) for name, values in sampled.items()}
    added = {}
    for score in scores:
        name = score.task.subset.name
        if bootstrap.is_collapsed(found[name]):
            low, high = _wilson(score)
            added[name] = score.value - low, high - score.value
            found[name] = low, high
    for column in COLUMNS:
        members = [s.task.subset.name for s in scores if s.task.subset.column == column]
        slack = np.sum([added.get(name, (0, 0)) for name in members], axis=0) / max(1, len(members))
        if members and added.keys() & members:
            low, high = found[column.upper()]
            found[column.upper()] = float(low - slack[0]), float(high + slack[1])
    return found


def _wilson(score: TaskScores) -> Bounds:
    if not score.task.dataset.bounded:
        return math.nan, math.nan
    low, high = wilson_interval(min(1.0, max(0.0, score.value / 100)), score.clusters)
    return 100 * low, 100 * high


def summarise(results: Mapping[Profile, Sequence[TaskScores]]) -> dict[str, Any]:
    """The scores of a run in the form of `results.json`."""
    summary: dict[str, Any] = {"tasks": {}, "datasets": {}, "averages": {}}
    for profile, scores in results.items():
        columns = {}
        for name, dataset in DATASETS.items():
            members = [score for score in scores if score.task.dataset is dataset]
            if not members:
                continue
            bounds = intervals(members)
            columns[name] = dataset_columns({m.task.subset.name: m.value for m in members}, name)
            for member in members:
                entry = summary["tasks"].setdefault(member.task.name, _about_task(member.task))
                entry[profile] = _task_entry(member, bounds)
            about = {"title": dataset.title, "version": dataset.version}
            entry = summary["datasets"].setdefault(name, about)
            entry[profile] = _dataset_entry(members, columns[name], bounds)
        summary["averages"][profile] = {}
        for group, title in AVERAGES.items():
            if names := [name for name in GROUPS[title] if columns.get(name)]:
                average = suite_average(columns, group) | {"datasets": names}
                summary["averages"][profile][group] = average
    return summary


def _about_task(task: Task) -> dict[str, Any]:
    dataset, subset = task.dataset, task.subset
    names = {"dataset": dataset.name, "subset": subset.name, "language": subset.language}
    return names | {"version": dataset.version, "metric": dataset.metric}


def _task_entry(score: TaskScores, bounds: Mapping[str, Bounds]) -> dict[str, Any]:
    return {
        "score": _number(score.value),
        "interval": _interval(bounds.get(score.task.subset.name, (math.nan, math.nan))),
        "n": score.n,
        "failed": len(score.failures),
        "metrics": {name: _number(value) for name, value in score.metrics().items()},
    }


def _dataset_entry(members, columns, bounds) -> dict[str, Any]:
    entry = {
        column: {
            "score": _number(score),
            "interval": _interval(bounds[column.upper()]),
            "n": sum(m.n for m in members if m.task.subset.column == column),
            "subsets": sum(m.task.subset.column == column and m.n > 0 for m in members),
            "of": sum(s.column == column for s in members[0].task.dataset.subsets),
        }
        for column, score in columns.items()
    }
    scored = [m for m in members if m.n]
    return entry | ({"micro": _number(micro_average(scored))} if scored else {})


def _interval(bounds: Bounds) -> list[float | None]:
    return [_number(bound) for bound in bounds]


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def write_samples(
    output: Path,
    answers: Mapping[str, Sequence[Answer]],
    results: Mapping[Profile, Sequence[TaskScores]],
) -> None:
    """`<output>/samples/<task>.jsonl`: each response with the answer read from it and its scores."""
    folder = output / "samples"
    folder.mkdir(exist_ok=True)
    by_task = {(p, s.task.name): s.scored for p, scores in results.items() for s in scores}
    for task, members in answers.items():
        lines = []
        for answer in members:
            record = dict(answer.record)
            for profile in PROFILES:
                _, scored = by_task.get((profile, task), {}).get(answer.document.id, (None, None))
                record[profile] = scored and {
                    "filtered_resps": [scored.filtered],
                    "metrics": dict(scored.metrics),
                    "statistics": list(scored.statistics),
                }
            if isinstance(answer.reply, str):
                record["judge_reply"] = answer.reply
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        atomic.write_bytes(folder / f"{task}.jsonl", "".join(lines).encode())


def read_records(output: Path, task: str) -> list[dict[str, Any]]:
    """The responses of a task from its sample log, without the fields that `write_samples` added."""
    added = {*PROFILES, "judge_reply"}
    rows = read_lines(output / "samples" / f"{task}.jsonl")
    return [{name: row[name] for name in row if name not in added} for _, row in rows]


def read_scores(output: Path, task: Task, profile: Profile) -> TaskScores:
    """The scores of a task from its sample log."""
    scored = {}
    for _, record in read_lines(output / "samples" / f"{task.name}.jsonl"):
        if entry := record[profile]:
            document = Document(record["doc_id"], record["doc"])
            score = Scored(entry["filtered_resps"][0], entry["metrics"], tuple(entry["statistics"]))
            scored[document.id] = document, score
    return TaskScores(task, profile, scored)
