"""The 14 data sets of PangeaBench, and how their tasks are named; for a while, tasks of one's own beside them."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence

from eval.bench.task import OWN, Dataset, Task
from eval.bench.tasks import (
    cvqa,
    flores,
    m3exam,
    m_llavabench,
    marvl,
    maxm,
    mgsm,
    mmmlu,
    tydiqa,
    xchat,
    xgqa,
    xm100,
    xmmmu,
    xstorycloze,
)
from pangea_jax import languages

_MODULES = (
    xchat, m_llavabench, cvqa, marvl, xm100, xgqa, maxm, xmmmu, m3exam, flores, tydiqa, xstorycloze, mgsm, mmmlu
)  # fmt: skip
# In the order of the paper's Tables 2 and 3.
DATASETS: dict[str, Dataset] = {module.DATASET.name: module.DATASET for module in _MODULES}
ALL_TASKS: dict[str, Task] = {
    task.name: task
    for dataset in DATASETS.values()
    for subset in dataset.subsets
    for task in [Task(dataset, subset)]
}
GROUPS = {
    "pangeabench": tuple(DATASETS),
    "pangeabench_multimodal": tuple(n for n, d in DATASETS.items() if d.group == "multimodal"),
    "pangeabench_text": tuple(n for n, d in DATASETS.items() if d.group == "text"),
}
_PARTS = ("cvqa_local", "cvqa_translated")
# Names that a task of one's own cannot have.
TAKEN = frozenset((*DATASETS, *ALL_TASKS, *GROUPS, *_PARTS, OWN))


@contextlib.contextmanager
def included(datasets: Sequence[Dataset]) -> Iterator[None]:
    """Has these data sets beside PangeaBench's, and as the group `own`, until the context ends."""
    own = {dataset.name: dataset for dataset in datasets}
    tasks = {t.name: t for d in datasets for t in (Task(d, subset) for subset in d.subsets)}
    DATASETS.update(own)
    ALL_TASKS.update(tasks)
    GROUPS[OWN] = tuple(own)
    try:
        yield
    finally:
        del GROUPS[OWN]
        for name in own:
            del DATASETS[name]
        for name in tasks:
            del ALL_TASKS[name]


class UnknownTaskError(ValueError):
    """The name is not a task, data set or group."""


def select(names: Iterable[str]) -> list[Task]:
    """The tasks with these names, without repeats, in the order of the paper's tables.

    Args:
      names: tasks (`mgsm_bn`), data sets (`mgsm`), groups (`pangeabench_text`), languages (`lang:sw`), or
        `cvqa_local` and `cvqa_translated`.

    Raises:
      UnknownTaskError: a name is not known; the message has the nearest known names.
    """
    wanted = {task.name for name in names for task in _matching(name.strip())}
    return [task for task in ALL_TASKS.values() if task.name in wanted]


def _matching(name: str) -> list[Task]:
    if name.startswith("lang:"):
        try:
            code = languages.get(name.removeprefix("lang:")).code
        except KeyError as error:
            raise UnknownTaskError(str(error.args[0])) from None
        found = [task for task in ALL_TASKS.values() if task.subset.language == code]
        if not found:
            raise UnknownTaskError(f"no task is in {languages.get(code).english_name} ({code})")
        return found
    if name in _PARTS:
        column = "mul" if name == "cvqa_local" else "en"
        return [Task(cvqa.DATASET, s) for s in cvqa.DATASET.subsets if s.column == column]
    members = GROUPS.get(name, (name,) if name in DATASETS else ())
    if members:
        return [Task(DATASETS[member], s) for member in members for s in DATASETS[member].subsets]
    if task := ALL_TASKS.get(name) or _by_alias(name):
        return [task]
    known = [*GROUPS, *DATASETS, *ALL_TASKS]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "--list shows all of them."
    raise UnknownTaskError(f"unknown task {name!r}; {hint}")


def _by_alias(name: str) -> Task | None:
    """The task for another code of its language: `maxm_iw` is `maxm_he`."""
    for dataset in DATASETS:
        if name.startswith(f"{dataset}_"):
            try:
                code = languages.get(name.removeprefix(f"{dataset}_")).code
            except KeyError:
                return None
            return ALL_TASKS.get(f"{dataset}_{code}")
    return None
