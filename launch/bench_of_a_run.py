"""PangeaBench, asked by a training job of its own model.

It is asked on the live parameters. Each process gets a copy of the model on its own devices
(`pangea_jax.generate.replica`) and answers its share of the documents. The folder `pangeabench/` of the work directory
gets what eval/run.py writes. Responses are kept there as they arrive, so a stopped run does not ask them again.

It needs requirements-eval.txt.
"""

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array
from rich.console import Console

from eval.ablation import intervals
from eval.bench import checkpoint_model, report, responses, results, scoring
from eval.bench.models import Request
from eval.bench.responses import Failure
from eval.bench.tasks import select
from launch import common
from pangea_jax.data.tokenizer import Tokenizer
from pangea_jax.experiment import Experiment
from pangea_jax.generate.replica import Replica
from pangea_jax.train.state import TrainState
from pangea_jax.work import distributed, mirror

STEPS = "steps"


class Bench:
    """All processes make the same calls. It reads all documents at once, so it fails before training.

    Raises:
      UserError: a task needs a judge, or the profile has no scores for it.
      DataError: documents are missing or malformed.
    """

    def __init__(self, exp: Experiment, tokenizer: Tokenizer, workdir: Path):
        self._exp, self._settings = exp, exp.eval.bench
        self._tokenizer, self._replica = tokenizer, None
        self._folder, self._name = workdir / intervals.BENCH_FOLDER, exp.title
        self._tasks = select(self._settings.tasks.split(","))
        for task in self._tasks:
            if task.dataset.judged or self._settings.profile not in task.dataset.profiles:
                raise common.UserError(
                    f"config.eval.bench.tasks: {task.name} needs a judge or has no {self._settings.profile} scores; "
                    "leave it out, and ask it with eval/run.py"
                )
        data = common.folder(self._settings.data, "config.eval.bench.data")
        names = {f"{task.dataset.name}/" for task in self._tasks}
        self._held = contextlib.ExitStack()
        near = mirror.mirrored(data, bring=None, within=names)
        self._data = self._held.enter_context(near).folder
        new = self._settings.max_new_tokens
        self._overrides = {} if new is None else {"max_new_tokens": new}
        self._requests, self._failures = self._made(self._settings.limit)
        self._subset = self._drawn() if self._settings.every else []

    def due(self, step: int) -> bool:
        """Whether a part is asked after `step`, if it is not the last one."""
        return bool(self._settings.every) and (step + 1) % self._settings.every == 0

    @property
    def has_curve(self) -> bool:
        return bool(self._settings.every)

    def run(self, state: TrainState, step: int) -> dict[str, float]:
        """Asks a small part; `bench/DATA SET/en` and `/mul`, and their averages, on the scale of the paper's tables.
        They are complete on the first process alone."""
        folder = self._folder / STEPS / f"{step + 1:08d}"
        with mirror.mirrored(folder, bring=None) as files:
            quiet = Console(quiet=True)
            records, _ = self._ask(state.params, self._subset, files, quiet, f"step {step + 1}")
        if records is None:
            return {}
        summary = scoring.summarise(results.score(records, None)[1])
        return dict(_metrics(summary, self._settings.profile))

    def finish(self, params: Mapping[str, Array], console: Console) -> dict[str, dict]:
        """Asks everything and writes the report; the scores as `splits`, on the first process alone."""
        with distributed.stoppable(), mirror.mirrored(self._folder, bring=None) as files:
            records, failures = self._ask(params, self._requests, files, console, "the end")
            if records is None:
                return {}
            settings = self._settings
            config: dict[str, Any] = dict(tasks=settings.tasks, profile=settings.profile)
            config |= dict.fromkeys(("judge", "judge_base_url", "base"))
            config |= {"model": self._name, "name": self._name, "limit": settings.limit}
            config |= {"gen_kwargs": "", "include": [], "left_out": {}}
            config |= results.departures(
                self._tasks, self._data, limit=settings.limit, overrides=self._overrides
            )
            failures = [*self._failures, *failures]
            results.write(files.folder, config, records, failures, None, console)
            found = intervals.bench_splits(report.read_results(files.folder))
        self._held.close()
        return found

    def _ask(
        self,
        params: Mapping[str, Array],
        requests: Sequence[Request],
        files: mirror.Mirror,
        console: Console,
        when: str,
    ) -> tuple[dict[str, list] | None, list[Failure]]:
        """The records of each task, on the first process, and the failures."""
        crew, exp = checkpoint_model.crew(files.sync), self._exp
        # Made late: a run that goes on from a checkpoint has its own first.
        self._replica = self._replica or Replica(exp.model, self._tokenizer, exp.reading)
        model = checkpoint_model.CheckpointModel(
            self._replica.engine(params),
            f"{self._name}, {when}",
            batch_size=self._settings.batch_size,
            profile=self._settings.profile,
        )
        log = responses.ResponseLog(files.folder, crew.part)
        shown = Console(quiet=True) if crew.index else console
        failures = responses.run(model, requests, log, console=shown, crew=crew)
        del model
        self._replica.release()
        if crew.index:
            return None, []
        return {task.name: log.answers(task.name, requests) for task in self._tasks}, failures

    def _made(self, limit: float | None) -> tuple[list[Request], list[Failure]]:
        return responses.make_requests(
            self._tasks,
            self._data,
            profile=self._settings.profile,
            limit=limit,
            overrides=self._overrides,
        )

    def _drawn(self) -> list[Request]:
        """The small part: for each task, documents drawn with a seed of their own."""
        requests, chosen = self._made(None)[0], []
        for task in self._tasks:
            own = [request for request in requests if request.task.name == task.name]
            seed = [self._settings.seed, zlib.crc32(task.name.encode())]
            rng, number = np.random.default_rng(seed), min(self._settings.every_limit, len(own))
            places = rng.choice(len(own), number, replace=False)
            chosen += [own[place] for place in sorted(places)]
        return chosen


def _metrics(summary: Mapping[str, Any], profile: str):
    for name, entry in summary["datasets"].items():
        for column in scoring.COLUMNS:
            if found := entry.get(profile, {}).get(column):
                yield f"bench/{name}/{column}", found["score"]
    for group, average in summary["averages"][profile].items():
        for column in scoring.COLUMNS:
            if column in average:
                yield f"bench/average_{group}/{column}", average[column]
