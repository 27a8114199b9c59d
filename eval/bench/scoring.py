"""Scores of documents, tasks, data sets and the suite, from responses."""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.bench.documents import read_lines
from eval.bench.judge import Judge, Question
from eval.bench.metrics import bootstrap
from eval.bench.responses import Failure
from eval.bench.task import PROFILES, Document, Failed, Profile, Scored, Task, answer_text
from eval.bench.tasks import DATASETS, GROUPS
from pangea_jax.work import atomic

COLUMNS = ("en", "mul")
_NOT_JUDGED = Failed("not judged; name a judge with --judge")
AVERAGES = {"multimodal": "pangeabench_multimodal", "text": "pangeabench_text"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response to a document, with the judge's reply for judged data sets."""

    document: Document
    response: Any
    record: Mapping[str, Any]
    reply: str | Failed | None = None


@dataclasses.dataclass
class TaskScores:
    """The scores of one task in one profile.

    Attributes:
      value: headline score on the scale of the paper's tables; NaN if no document has a score.
      metrics: the mean of each metric, and the metrics that exist only for a whole subset.
      documents: the documents with a score; `scored` maps their ids to the scores.
    """

    task: Task
    profile: Profile
    value: float
    n: int
    metrics: dict[str, float]
    failures: list[Failure]
    documents: list[Document]
    scored: dict[str, Scored]

    @property
    def statistics(self) -> list[tuple[str, tuple[float, ...]]]:
        """(cluster, statistics) of each scored document, for the bootstrap."""
        return [(d.cluster, self.scored[d.id].statistics) for d in self.documents]


def judge_answers(task: Task, answers: Sequence[Answer], judge: Judge | None) -> list[Answer]:
    """The answers with the judge's replies; without a judge, `Failed` takes the place of the reply."""
    dataset = task.dataset
    if not dataset.judged:
        return list(answers)
    if judge is None:
        return [dataclasses.replace(answer, reply=_NOT_JUDGED) for answer in answers]
    questions = [
        Question(
            task.name, a.document.id, dataset.judge_request(a.document, answer_text(a.response))
        )
        for a in answers
    ]
    replies = judge.replies(questions, dataset.readable)
    return [dataclasses.replace(a, reply=reply) for a, reply in zip(answers, replies, strict=True)]


def score_task(task: Task, answers: Sequence[Answer], profile: Profile) -> TaskScores:
    """Scores every answer by the rules of a profile."""
    scored, failures = {}, []
    for answer in answers:
        result = _score_answer(task, answer, profile)
        if isinstance(result, Failed):
            failures.append(Failure(task.name, answer.document.id, "score", result.reason))
        else:
            scored[answer.document.id] = result
    documents = [a.document for a in answers if a.document.id in scored]
    return combine_scores(task, profile, documents, scored, failures)


def combine_scores(
    task: Task,
    profile: Profile,
    documents: list[Document],
    scored: Mapping[str, Scored],
    failures: Sequence[Failure] = (),
) -> TaskScores:
    """The score of a task from those of `documents`."""
    members = {document.id: scored[document.id] for document in documents}
    value, metrics = float("nan"), {}
    if members:
        sums = np.sum([s.statistics for s in members.values()], axis=0)
        value = float(task.dataset.combine(sums, profile))
        names = next(iter(members.values())).metrics
        metrics = {n: float(np.mean([s.metrics[n] for s in members.values()])) for n in names}
        filtered = [scored_document.filtered for scored_document in members.values()]
        metrics |= task.dataset.corpus_metrics(documents, filtered, task.subset, profile)
    return TaskScores(
        task, profile, value, len(members), metrics, list(failures), documents, members
    )


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
    return task.dataset.score(answer.document, answer.response, task.subset, profile, reply)


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
    result = {}
    for column in COLUMNS:
        members = [v for name, v in values.items() if columns[name] == column and np.isfinite(v)]
        if members:
            result[column] = float(np.mean(members))
    return result


def suite_average(columns: Mapping[str, Mapping[str, float]], group: str) -> dict[str, float]:
    """AVG of a table: the unweighted mean over the data sets of a group that have the column.

    Args:
      columns: data set -> column -> score.
      group: `multimodal` or `text`.
    """
    result = {}
    for column in COLUMNS:
        members = [
            columns[name][column]
            for name in GROUPS[AVERAGES[group]]
            if column in columns.get(name, {})
        ]
        if members:
            result[column] = float(np.mean(members))
    return result


def micro_average(scores: Iterable[TaskScores]) -> float:
    """The score over all documents of a data set, of all languages together."""
    scores = list(scores)
    sums = np.sum([values for s in scores for _, values in s.statistics], axis=0)
    return float(scores[0].task.dataset.combine(sums, scores[0].profile))


def draws(scores: Sequence[TaskScores], seed: int = 0) -> dict[str, np.ndarray]:
    """Bootstrap draws of a data set: subset -> values, and its columns under `en` and `mul` in capitals."""
    dataset, profile = scores[0].task.dataset, scores[0].profile
    statistics = {s.task.subset.name: s.statistics for s in scores if s.statistics}
    if not statistics:
        return {}
    combine = functools.partial(dataset.combine, profile=profile)
    values = bootstrap.draw_subsets(statistics, combine, seed=seed)
    for column in COLUMNS:
        members = [
            values[s.task.subset.name]
            for s in scores
            if s.task.subset.column == column and s.statistics
        ]
        if members:
            values[column.upper()] = np.mean(members, axis=0)
    return values


def summarise(results: Mapping[Profile, Sequence[TaskScores]]) -> dict[str, Any]:
    """The scores of a run in the form of `results.json`."""
    summary: dict[str, Any] = {"tasks": {}, "datasets": {}, "averages": {}}
    for profile, scores in results.items():
        by_dataset: dict[str, list[TaskScores]] = defaultdict(list)
        for score in scores:
            by_dataset[score.task.dataset.name].append(score)
        columns = {}
        for name, members in by_dataset.items():
            sampled = draws(members)
            for member in members:
                _add_task(summary["tasks"], member, sampled)
            values = {m.task.subset.name: m.value for m in members}
            columns[name] = dataset_columns(values, name)
            entry = summary["datasets"].setdefault(
                name, {"title": DATASETS[name].title, "version": DATASETS[name].version}
            )
            entry[profile] = _dataset_entry(members, columns[name], sampled)
        summary["averages"][profile] = {
            group: suite_average(columns, group) | {"datasets": _members(columns, group)}
            for group in AVERAGES
            if _members(columns, group)
        }
    return summary


def _members(columns, group) -> list[str]:
    return [name for name in GROUPS[AVERAGES[group]] if columns.get(name)]


def _add_task(tasks: dict[str, Any], score: TaskScores, sampled) -> None:
    task = score.task
    entry = tasks.setdefault(
        task.name,
        {
            "dataset": task.dataset.name,
            "subset": task.subset.name,
            "language": task.subset.language,
            "version": task.dataset.version,
            "metric": task.dataset.metric,
        },
    )
    entry[score.profile] = {
        "score": _number(score.value),
        "interval": [
            _number(v) for v in bootstrap.interval(sampled.get(task.subset.name, np.array([])))
        ],
        "n": score.n,
        "failed": len(score.failures),
        "metrics": {name: _number(value) for name, value in score.metrics.items()},
    }


def _dataset_entry(members, columns, sampled) -> dict[str, Any]:
    entry = {
        column: {
            "score": _number(columns[column]),
            "interval": [_number(v) for v in bootstrap.interval(sampled[column.upper()])],
            "subsets": sum(m.task.subset.column == column and m.n > 0 for m in members),
            "of": sum(s.column == column for s in members[0].task.dataset.subsets),
        }
        for column in columns
    }
    scored = [m for m in members if m.n]
    if scored:
        entry["micro"] = _number(micro_average(scored))
    return entry


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
                scored = by_task.get((profile, task), {}).get(answer.document.id)
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


def read_samples(path: Path, task: Task, profile: Profile) -> TaskScores:
    """The scores of a task from its sample log."""
    documents, scored = [], {}
    for _, record in read_lines(path):
        if entry := record[profile]:
            document = Document(record["doc_id"], record["doc"])
            documents.append(document)
            scored[document.id] = Scored(
                entry["filtered_resps"][0], entry["metrics"], tuple(entry["statistics"])
            )
    return combine_scores(task, profile, documents, scored)
