"""Signs beside scores that do not stand for a whole run as the task defines it, and what they mean."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.bench.tasks import ALL_TASKS
from pangea_jax.figures import inert

LIMITED, CHANGED, MISSING, PART = "†", "‡", "§", "*"
_ORDER = (LIMITED, CHANGED, MISSING)
Results = Mapping[str, Any]


def name_of(run: Results) -> str:
    """The name of a run's model in reports."""
    return run.get("name") or run["model"]


def of_task(run: Results, task: str, profile: str) -> str:
    """The signs of a task's scores in a profile."""
    config = run["config"]
    documents = run.get("documents", {})
    # Results of earlier versions do not say which tasks a limit or a setting has touched.
    limited = config.get("limited", documents if config.get("limit") else ())
    changed = config.get("changed", documents if config.get("gen_kwargs") else ())
    scored = run["tasks"].get(task, {}).get(profile, {}).get("n", 0)
    touched = {
        LIMITED: task in limited,
        CHANGED: task in changed,
        MISSING: scored < documents.get(task, 0),
    }
    return "".join(sign for sign in _ORDER if touched[sign])


def of_dataset(run: Results, dataset: str, profile: str, column: str | None = None) -> str:
    """The signs of all tasks of a data set, or of one of its columns."""
    members = [ALL_TASKS[name] for name in run.get("documents", ())]
    chosen = [
        task.name
        for task in members
        if task.dataset.name == dataset and column in (None, task.subset.column)
    ]
    return join(of_task(run, name, profile) for name in chosen)


def of_run(run: Results, profile: str) -> str:
    """The signs of all scores of a run."""
    return join(of_task(run, name, profile) for name in run.get("documents", ()))


def join(signs: Iterable[str]) -> str:
    """Each sign once, in one order."""
    found = "".join(signs)
    return "".join(sign for sign in _ORDER if sign in found)


def legend(runs: Sequence[Results]) -> list[str]:
    """A line for each sign that stands in the report of these runs; it names the flags of each run."""
    lines = []
    for sign in join(of_run(run, profile) for run in runs for profile in _profiles(run)):
        touched = [run for run in runs if any(sign in of_run(run, p) for p in _profiles(run))]
        lines.append(f"{sign} {_MEANINGS[sign]}{_flags(sign, touched, alone=len(runs) == 1)}.")
    return lines


_MEANINGS = {
    LIMITED: "only the first documents of a task were asked",
    CHANGED: "asked with other generation settings than the task's own",
    MISSING: "some documents have no score and are left out of the mean; n counts those that have one",
}


def _flags(sign: str, runs: Sequence[Results], *, alone: bool) -> str:
    """What made the sign, by run, in brackets."""
    said = []
    for run in runs:
        limit, settings = (run["config"].get(flag) for flag in ("limit", "gen_kwargs"))
        if sign == LIMITED:
            text = f"--limit={limit:g}" if limit else "files cut by fetch --limit"
        elif sign == CHANGED:
            text = f"--gen_kwargs={inert.line(settings, 80)}"
        else:
            text = f"{len(run['failures'])} failures"
        said.append(text if alone else f"{inert.line(name_of(run), 80)}: {text}")
    return f" ({'; '.join(said)})"


def _profiles(run: Results) -> list[str]:
    """The profiles in which the run has scores, the headline first."""
    found = {p for task in run["tasks"].values() for p in task if p in ("paper", "fixed")}
    return sorted(found | {run["profile"]}, key=lambda p: (p != run["profile"], p))
