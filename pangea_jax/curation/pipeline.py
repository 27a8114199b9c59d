"""What the pipelines share: work in shards on Beam, restart, results in files.

A pipeline is a row of parts. Each part reads the shards of the one before it and yields, for every row it
reads, exactly one outcome (`accounting.py`): `Passed` on to the next part, `Kept` as a record of PangeaIns,
or `Dropped` for a reason. Beam spreads the shards over its workers; a shard is written whole, its counts
last, and never made again. So what was killed goes on, and what it writes does not depend on how often it
was.

    OUT/records/00000.jsonl, images/    records, for launch/build_data.py pangeains --source=OUT/records
    OUT/provenance/00000.jsonl          line for line: where a record comes from and what was found of it
    OUT/dropped/PART-00000.jsonl        what was left out, at which stage, and why
    OUT/report.json, report.md          every stage's yield
    OUT/usage.json                      what was paid to the model
    OUT/work                            shards between the parts, and the model's replies
"""

import contextlib
import dataclasses
import fcntl
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
from pangea_jax.data.build import release
from pangea_jax.data.record import Conversation, RecordError, image_paths
from pangea_jax.work import runners
from pangea_jax.work.atomic import differences, read_json, write_bytes, write_json

RECORDS = "records"
"""The part that makes the records."""

# What of `config.llm` decides where and at what price answers come, not which.
_NOT_PLANNED = (
    *("base_url", "api_key_variable", "concurrency", "timeout", "retries", "patience", "journal"),
    *("price_in", "price_out", "image_tokens", "budget", "max_calls"),
)
_MOST_OUTCOMES = 64  # times the rows of a shard: where nearly all is dropped
_log = logging.getLogger(__name__)


class JobError(RuntimeError):
    """The pipeline cannot run; says what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a pipeline in its folder; picklable, the same to all workers.

    Attributes:
      out: folder of the results, on a file system that all workers can write.
      stages: where a record may be dropped, in their order.
      shard_size: rows of a shard.
    """

    out: Path
    stages: tuple[str, ...]
    shard_size: int = 256

    @property
    def replies(self) -> Path:
        """The model's replies; `started` makes the folder."""
        return self.out / "work" / "replies.sqlite"

    @property
    def _stopped(self) -> Path:
        return self.out / "work" / "stopped.json"

    def _path(self, part: str, shard: int, suffix: str = "jsonl") -> Path:
        return self.out / "work" / part / f"{shard:05d}.{suffix}"

    def _end(self, part: str) -> Path:
        return self.out / "work" / part / "all.json"

    @contextlib.contextmanager
    def started(self, plan: Mapping[str, Any]) -> Iterator[None]:
        """Claims the folder; a killed process leaves no claim behind.

        Args:
          plan: all that decides what the results are, see `plan`.

        Raises:
          JobError: somebody else writes here, or it holds results of another plan.
        """
        work = self.out / "work"
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(f"another process is writing {self.out}") from None
            plan = json.loads(json.dumps({**plan, "shard_size": self.shard_size}, default=str))
            if (work / "plan.json").is_file():
                differing = differences(read_json(work / "plan.json"), plan)
                if differing:
                    names = ", ".join(differing)
                    raise JobError(
                        f"{self.out} holds results of other settings ({names}); give another --out, or "
                        "remove it"
                    )
            for half_written in self.out.rglob("*.partial"):
                half_written.unlink(missing_ok=True)
            self._stopped.unlink(missing_ok=True)
            _write_json(work / "plan.json", plan)
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
        records, provenance = (
            self.out / name / f"{shard:05d}.jsonl" for name in (RECORDS, "provenance")
        )
        with records.open(encoding="utf-8") as ours, provenance.open(encoding="utf-8") as theirs:
            for record, origin in zip(ours, theirs, strict=True):
                yield json.loads(record), json.loads(origin)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the results, whole."""
        _write_file(self.out / name, data)

    def shards(self, part: str) -> int:
        """How many shards a finished part has."""
        return read_json(self._end(part))["shards"]

    def split(self, part: str, outcomes: Iterable[Outcome], *, source: str | None = None) -> int:
        """A part that goes through everything in order, in this process: reading, or comparing all with all.

        Args:
          outcomes: computed as they are asked for, the same ones every time.
          source: the part whose rows they account for; None: what is read enters here.

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
        _write_json(self._end(part), {"shards": shard})
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
        """A part that takes each shard for itself, on as many workers as `run` has.

        Args:
          run: `runners.Beam(options)`.
          function: gets the rows of a shard and yields the outcome of each; must be picklable and, given the
            model's replies, deterministic.

        Raises:
          reply_store.Stop: the budget is spent or the endpoint gone; finished shards stay.
          KeyboardInterrupt: likewise.
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
        _write_json(self._end(part), {"shards": shards})

    def _write(
        self, part: str, shard: int, outcomes: Iterable[Outcome], counts: Accounting
    ) -> None:
        """Writes a shard's files, whole, the counts last: they say that it is done."""
        dropped = [dataclasses.asdict(o) for o in outcomes if isinstance(o, Dropped)]
        unknown = {row["stage"] for row in dropped} | set(counts.added)
        if not unknown <= set(self.stages):
            raise AccountingError(f"part {part}: no stage {unknown - set(self.stages)}")
        path = self.out / "dropped" / f"{part}-{shard:05d}.jsonl"
        path.unlink(missing_ok=True)  # of a try that was killed before its counts were written
        if dropped:
            _write_lines(path, dropped)
        kept = [o for o in outcomes if isinstance(o, Kept)]
        if part == RECORDS:
            rows = [outcome.provenance for outcome in kept]
            _write_lines(self.out / "provenance" / f"{shard:05d}.jsonl", rows)
            rows = [outcome.record.to_pangeains() for outcome in kept]
            _write_lines(self.out / RECORDS / f"{shard:05d}.jsonl", rows)
        elif kept:
            raise AccountingError(f"part {part}: only {RECORDS!r} can keep records")
        passed = [outcome.row for outcome in outcomes if isinstance(outcome, Passed)]
        _write_lines(self._path(part, shard), passed)
        _write_json(self._path(part, shard, "json"), counts.to_json())

    def _without_pictures(self, outcome: Outcome) -> Outcome:
        """Writes a record's pictures at once: a shard of them may not fit into memory."""
        if not isinstance(outcome, Kept) or not outcome.pictures:
            return outcome
        for name, data in outcome.pictures.items():
            _write_file(self.out / RECORDS / name, data)
        return dataclasses.replace(outcome, pictures={})

    def accounting(self, *parts: str) -> Accounting:
        """Counts of consecutive finished parts: what entered the first, left the last, and was dropped.

        Raises:
          AccountingError: a record was lost on the way.
        """
        whole = Accounting()
        for number, part in enumerate(parts):
            counts = Accounting()
            for shard in range(self.shards(part)):
                counts.merge(Accounting.from_json(read_json(self._path(part, shard, "json"))))
            if number and counts.entered != whole.left:
                raise AccountingError(
                    f"{whole.left} records left for part {part}, which read {counts.entered}"
                )
            entered = counts.entered if number == 0 else whole.entered
            left = counts.left
            whole.merge(counts)
            whole.entered, whole.left = entered, left
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
          parts: all of the pipeline's, in order.
          published: what the paper says of a stage's yield.
          sections: heading -> what else was found, a table of names and values.

        Returns:
          the contents of report.json.
        """
        accounting, sections = self.accounting(*parts), dict(sections or {})
        if usage is not None:
            _write_json(self.out / "usage.json", {k: v._asdict() for k, v in usage.items()})
            sections |= estimates(usage)
        report = {
            "title": title,
            "entered": accounting.entered,
            "kept": accounting.left,
            "dropped": accounting.num_dropped,
            "stages": accounting.rows(self.stages),
            "published": dict(published or {}),
        }
        report |= {"sections": {k: dict(v) for k, v in sections.items()}}
        _write_file(self.out / "report.md", markdown(report).encode())
        _write_json(self.out / "report.json", report)
        return report


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part's work on one shard, as workers get it."""

    job: Job
    name: str
    source: str
    function: Callable[[Iterator[dict[str, Any]]], Iterator[Outcome]]

    def run_shard(self, shard: int) -> None:
        job = self.job
        # A runner may give a shard out twice; and after one shard is stopped the others need not try.
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
        # Beam would make something else of Ctrl-C, where it runs in the process that gets it.
        except (reply_store.Stop, KeyboardInterrupt) as stop:
            _write_json(job._stopped, {"kind": type(stop).__name__, "problem": str(stop)})
            return
        counts.check(f"part {self.name}, shard {shard}")
        job._write(self.name, shard, outcomes, counts)
        _log.info("%s: shard %d done, %d of it dropped", self.name, shard, counts.num_dropped)


def _checked(outcome: Outcome, last_stage: str) -> Outcome:
    """Nothing is kept that launch/build_data.py would not take."""
    if isinstance(outcome, Kept):
        try:
            Conversation.from_pangeains(outcome.record.to_pangeains())
            for name in outcome.pictures:
                image_paths(name, outcome.record.id)
        except RecordError as error:
            return Dropped(outcome.record.id, last_stage, error.reason, str(error))
    return outcome


def plan(config: Mapping[str, Any], sources: Iterable[Path] = ()) -> dict[str, Any]:
    """What decides the results: the config without addresses, limits and prices, and the files read."""
    config = json.loads(json.dumps(plain(config), default=str))
    for name in _NOT_PLANNED:
        config.get("llm", {}).pop(name, None)
    found = [(path.name, path.stat()) for path in sources]
    files = sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in found)
    return config | {"files": files}


def source_files(source: Path) -> list[Path]:
    """Files of records: one file, or those of a folder; see `release.record_files`.

    Raises:
      JobError: there are none.
    """
    try:
        return release.record_files(source)
    except release.ReleaseError as error:
        raise JobError(str(error)) from None


def plain(value: Any) -> Any:
    """A section of a config, and those within it, as dicts."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return dict(value) if isinstance(value, Mapping) else value


def language_codes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`config.languages` as canonical codes.

    Raises:
      JobError: one of them is unknown.
    """
    try:
        return tuple(languages.get(tag).code for tag in split_names(config["languages"]))
    except KeyError as error:
        raise JobError(
            f"config.languages: {error.args[0]}; others take one line in pangea_jax/languages.py"
        ) from None


def split_names(value: Sequence[str]) -> tuple[str, ...]:
    """`("sw", "yo")`, also of the `("sw,yo",)` that a command line makes of `sw,yo`."""
    return tuple(name for entry in value for name in entry.split(",") if name)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Records are checked; what is said of them may quote half a surrogate pair, which JSON can escape.
    _write_file(path, text.encode("utf-8", "backslashreplace"))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value, ensure_ascii=False)


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
