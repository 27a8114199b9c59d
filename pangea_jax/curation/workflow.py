"""One run of a curation pipeline: its parts, their shards, and the files of its results.

A pipeline is a sequence of parts. Each part reads the shards of the part before it. For every row that it reads, it
yields exactly one outcome (`accounting.py`): `Passed` on to the next part, `Kept` as a record of PangeaIns,
or `Dropped` for a reason. Beam distributes the shards to its workers. A finished shard is never made again. So a killed
pipeline goes on, and its results do not depend on the number of kills (`pangea_jax/work/restart.py`).

    OUT/records/00000.jsonl, images/    records, for launch/build_data.py pangeains --source=OUT/records
    OUT/provenance/00000.jsonl          one line for each record: its source, models, scores and repairs
    OUT/dropped/PART-00000.jsonl        the dropped records, with stage and reason
    OUT/report.json, report.md          every stage's yield
    OUT/usage.json                      what the model has cost
    OUT/work                            shards between the parts, and the model's replies
"""

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pangea_jax import languages
from pangea_jax.curation import llm, reply_store
from pangea_jax.curation.accounting import (
    Accounting,
    AccountingError,
    Dropped,
    Kept,
    Outcome,
    Passed,
    estimates,
    markdown,
)
from pangea_jax.data.record import Conversation, RecordError, image_paths
from pangea_jax.work import restart, runners
from pangea_jax.work.atomic import as_json, read_json, write_bytes, write_json

RECORDS = "records"
"""The part that makes the records."""

# Keys of `config.llm` and `config.scoring_llm` that do not change the answers.
_NOT_PLANNED = (
    *("base_url", "api_key_variable", "concurrency", "timeout", "retries", "patience", "journal"),
    *("price_in", "price_out", "image_tokens", "budget", "max_calls"),
)
# A shard ends after 64 times its rows in outcomes, even if nearly all rows are dropped.
_MOST_OUTCOMES = 64
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a pipeline in its folder; picklable.

    Attributes:
      out: folder of the results, on a file system to which all workers can write.
      stages: the stages at which a record may be dropped, in their order.
      shard_size: rows of a shard.
    """

    out: Path
    stages: tuple[str, ...]
    shard_size: int = 256

    @property
    def replies(self) -> Path:
        """The database of the model's replies; `started` makes its folder."""
        return self.out / "work" / "replies.sqlite"

    @property
    def _stopped(self) -> Path:
        return self.out / "work" / "stopped.json"

    def _path(self, part: str, shard: int, suffix: str = "jsonl") -> Path:
        return restart.shard_path(self.out / "work" / part, shard, suffix)

    def _results(self, shard: int) -> tuple[Path, Path]:
        """The files of a shard's records and of their provenance."""
        folders = (self.out / RECORDS, self.out / "provenance")
        return tuple(restart.shard_path(folder, shard, "jsonl") for folder in folders)

    def _end(self, part: str) -> Path:
        return self.out / "work" / part / "all.json"

    @contextlib.contextmanager
    def started(self, plan: Mapping[str, Any]) -> Iterator[None]:
        """Claims the folder for a run of this plan.

        Args:
          plan: everything that decides the results, see `plan`.

        Raises:
          WorkError: another process writes here, or the folder holds results of another plan.
        """
        work = self.out / "work"
        with restart.claim(work / "lock"):
            restart.settle(work / "plan.json", {**plan, "shard_size": self.shard_size}, self.out)
            restart.remove_partial(self.out)
            self._stopped.unlink(missing_ok=True)
            yield

    def read(self, part: str, shard: int) -> Iterator[dict[str, Any]]:
        """The rows that a part passed on in one shard."""
        with self._path(part, shard).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def read_all(self, part: str) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(self.read(part, n) for n in range(self.shards(part)))

    def kept(self, shard: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(record, provenance) of a finished shard."""
        records, provenance = self._results(shard)
        with records.open(encoding="utf-8") as ours, provenance.open(encoding="utf-8") as theirs:
            for record, origin in zip(ours, theirs, strict=True):
                yield json.loads(record), json.loads(origin)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the results."""
        write_bytes(self.out / name, data)

    def shards(self, part: str) -> int:
        """The number of shards of a finished part."""
        return read_json(self._end(part))["shards"]

    def split(self, part: str, outcomes: Iterable[Outcome], *, source: str | None = None) -> int:
        """Runs a part in this process, in order, for work such as reading or comparing all rows with each other.

        Args:
          outcomes: computed lazily; a second call must give the same outcomes.
          source: the part whose rows have these outcomes. None: the rows enter the pipeline here.

        Returns:
          the number of shards.
        """
        if self._end(part).is_file():
            return self.shards(part)
        outcomes, total, shard = iter(outcomes), Accounting(), 0
        while some := self._next_shard(outcomes):
            counts = Accounting()
            for outcome in some:
                counts.count(outcome)
            counts.entered = counts.left + counts.num_dropped - counts.added.total()
            if not self._path(part, shard, "json").is_file():
                self._write(part, shard, some, counts)
            total.merge(counts)
            shard += 1
        if source is not None:
            entered = self.accounting(source).left
            dataclasses.replace(total, entered=entered).check(f"part {part}")
        write_json(self._end(part), {"shards": shard})
        return shard

    def _next_shard(self, outcomes: Iterator[Outcome]) -> list[Outcome]:
        some, passed = [], 0
        for outcome in outcomes:
            some.append(outcome)
            passed += isinstance(outcome, Passed)
            if passed == self.shard_size or len(some) == _MOST_OUTCOMES * self.shard_size:
                break
        return some

    def map(
        self,
        run: runners.Run,
        part: str,
        source: str,
        function: Callable[[Iterator[dict[str, Any]]], Iterator[Outcome]],
    ) -> None:
        """Runs a part on each shard separately, on the workers of `run`.

        Args:
          run: `runners.Beam(options)`.
          function: gets the rows of a shard and yields the outcome of each. It must be picklable and, given
            the model's replies, deterministic.

        Raises:
          reply_store.Stop: the budget is spent or the endpoint does not answer; finished shards stay.
          KeyboardInterrupt: a worker was interrupted; finished shards stay.
        """
        shards = self.shards(source)
        todo = [n for n in range(shards) if not self._path(part, n, "json").is_file()]
        for _ in run(_Part(self, part, source, function).run_shard, todo):
            pass
        if self._stopped.is_file():
            stopped = read_json(self._stopped)
            done = sum(self._path(part, n, "json").is_file() for n in range(shards))
            if stopped["kind"] == "KeyboardInterrupt":
                raise KeyboardInterrupt
            is_spent = stopped["kind"] == reply_store.BudgetExceeded.__name__
            kind = reply_store.BudgetExceeded if is_spent else llm.EndpointError
            raise kind(f"stopped with {done} of {shards} shards done: {stopped['problem']}")
        write_json(self._end(part), {"shards": shards})

    def _write(
        self, part: str, shard: int, outcomes: Iterable[Outcome], counts: Accounting
    ) -> None:
        """Writes the files of a shard, the counts last, since they mark it as finished."""
        dropped = [dataclasses.asdict(o) for o in outcomes if isinstance(o, Dropped)]
        unknown = {row["stage"] for row in dropped} | set(counts.added)
        if not unknown <= set(self.stages):
            raise AccountingError(f"part {part}: no stage {unknown - set(self.stages)}")
        path = self.out / "dropped" / f"{part}-{shard:05d}.jsonl"
        path.unlink(missing_ok=True)  # of a run that was killed before it wrote the counts
        if dropped:
            _write_lines(path, dropped)
        kept = [o for o in outcomes if isinstance(o, Kept)]
        if part == RECORDS:
            records, provenance = self._results(shard)
            _write_lines(provenance, [outcome.provenance for outcome in kept])
            _write_lines(records, [outcome.record.to_pangeains() for outcome in kept])
        elif kept:
            raise AccountingError(f"part {part}: only {RECORDS!r} can keep records")
        passed = [outcome.row for outcome in outcomes if isinstance(outcome, Passed)]
        _write_lines(self._path(part, shard), passed)
        write_json(self._path(part, shard, "json"), counts.to_json())

    def _without_pictures(self, outcome: Outcome) -> Outcome:
        """Writes the pictures of a record at once, since those of a whole shard may not fit into memory."""
        if not isinstance(outcome, Kept) or not outcome.pictures:
            return outcome
        for name, data in outcome.pictures.items():
            write_bytes(self.out / RECORDS / name, data)
        return dataclasses.replace(outcome, pictures={})

    def accounting(self, *parts: str) -> Accounting:
        """Adds up consecutive finished parts: records that entered the first, left the last, and were dropped.

        Raises:
          AccountingError: a record was lost on the way.
        """
        whole, entered = Accounting(), None
        for part in parts:
            counts = Accounting()
            for shard in range(self.shards(part)):
                counts.merge(Accounting.from_json(read_json(self._path(part, shard, "json"))))
            if entered is None:
                entered = counts.entered
            elif counts.entered != whole.left:
                raise AccountingError(
                    f"{whole.left} records left for part {part}, which read {counts.entered}"
                )
            whole.merge(counts)
            whole.entered, whole.left = entered, counts.left
        whole.check("all parts")
        return whole

    def report(
        self,
        parts: Sequence[str],
        *,
        title: str,
        published: Mapping[str, str] | None = None,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
        usage: Mapping[str, reply_store.Usage] | None = None,
    ) -> dict[str, Any]:
        """Writes report.json, report.md and usage.json.

        Args:
          parts: all parts of the pipeline, in order.
          published: stage -> its yield in the paper.
          sections: heading -> a table of further names and values.
          usage: purpose -> what the model's replies have cost.

        Returns:
          the contents of report.json.
        """
        accounting, sections = self.accounting(*parts), dict(sections or {})
        if usage is not None:
            write_json(self.out / "usage.json", {k: v._asdict() for k, v in usage.items()})
            sections |= estimates(usage)
        report = {
            "title": title,
            "entered": accounting.entered,
            "kept": accounting.left,
            "dropped": accounting.num_dropped,
            "stages": accounting.rows(self.stages),
            "published": dict(published or {}),
            "sections": {heading: dict(table) for heading, table in sections.items()},
        }
        write_bytes(self.out / "report.md", markdown(report).encode())
        write_json(self.out / "report.json", report, ensure_ascii=False)
        return report


@dataclasses.dataclass(frozen=True)
class _Part:
    """The work of a part, as it is sent to the workers."""

    job: Job
    name: str
    source: str
    function: Callable[[Iterator[dict[str, Any]]], Iterator[Outcome]]

    def run_shard(self, shard: int) -> None:
        job = self.job
        # A runner may run a shard twice. If one shard was stopped, the others are not run.
        if job._path(self.name, shard, "json").is_file() or job._stopped.is_file():
            return
        counts, outcomes = Accounting(), []

        def rows():
            for row in job.read(self.source, shard):
                counts.entered += 1
                yield row

        try:
            for outcome in self.function(rows()):
                outcome = job._without_pictures(_checked(outcome, job.stages[-1]))
                counts.count(outcome)
                outcomes.append(outcome)
        # Beam would replace a KeyboardInterrupt with its own error.
        except (reply_store.Stop, KeyboardInterrupt) as stop:
            write_json(job._stopped, {"kind": type(stop).__name__, "problem": str(stop)})
            return
        counts.check(f"part {self.name}, shard {shard}")
        job._write(self.name, shard, outcomes, counts)
        _log.info("%s: shard %d done, %d records dropped", self.name, shard, counts.num_dropped)


def _checked(outcome: Outcome, last_stage: str) -> Outcome:
    """Drops a record that launch/build_data.py would reject."""
    if isinstance(outcome, Kept):
        try:
            Conversation.from_pangeains(outcome.record.to_pangeains())
            for name in outcome.pictures:
                image_paths(name, outcome.record.id)
        except RecordError as error:
            return Dropped(outcome.record.id, last_stage, error.reason, str(error))
    return outcome


def plan(config: Any, sources: Iterable[Path] = ()) -> dict[str, Any]:
    """Everything that decides the results: the source files, and the config without addresses, limits and prices.

    Args:
      config: a dataclass.
    """
    config = as_json(dataclasses.asdict(config))
    for model in config.keys() & {"llm", "scoring_llm"}:
        config[model] = {k: v for k, v in config[model].items() if k not in _NOT_PLANNED}
    found = [(path.name, path.stat()) for path in sources]
    files = sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in found)
    return config | {"files": files}


def language_codes(
    tags: Sequence[str],
    key: str = "languages",
    hint: str = "; to add a language, add a line to pangea_jax/languages.py",
) -> tuple[str, ...]:
    """The canonical codes of the language tags in `config.KEY`.

    Raises:
      ValueError: a tag is unknown; names the key, and ends with `hint`.
    """
    try:
        return tuple(languages.get(tag).code for tag in split_names(tags))
    except KeyError as error:
        raise ValueError(f"config.{key}: {error.args[0]}{hint}") from None


def split_names(value: Sequence[str]) -> tuple[str, ...]:
    """Splits names at commas: `sw,yo` on a command line becomes `("sw,yo",)`, and here `("sw", "yo")`."""
    return tuple(name for entry in value for name in entry.split(",") if name)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Records are valid Unicode, but details of faults may contain half a surrogate pair, which JSON can escape.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
