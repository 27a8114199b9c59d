"""Shards, accounting and restart, with a pipeline small enough to count by hand."""

import dataclasses
import itertools
import json
import os

import pytest

pytest.importorskip("apache_beam", reason="apache-beam is in requirements-curation.txt")

from pangea_jax.curation import llm, reply_store, workflow
from pangea_jax.curation.accounting import AccountingError, Added, Dropped, Kept, Passed
from pangea_jax.curation.workflow import Job
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.work import restart, runners

STAGES = ("size", "words", "make")
OPTIONS = ["--runner=DirectRunner"]


def _record(number, image=None):
    marker, images = ("<image>\n", (image,)) if image else ("", ())
    turns = (Turn("user", f"{marker}How many?"), Turn("assistant", str(number)))
    return Conversation(str(number), "test", "en", "", images, turns)


def _rows(number):
    """Every third row is too small; after every tenth, five in a group cannot be read."""
    for n in range(number):
        yield Dropped(str(n), "size", "too small") if n % 3 == 2 else Passed({"n": n})
        if n % 10 == 9:
            yield Dropped(f"group {n}", "size", "cannot be read", count=5)


def _make(rows):
    """Of every even row two records, one with a picture; every fifth is dropped."""
    for row in rows:
        n = row["n"]
        if n % 5 == 0:
            yield Dropped(str(n), "words", "a fifth")
            continue
        if n % 2 == 0:
            yield Added("make", 1)
            name = f"images/{n}.bin"
            yield Kept(_record(n, name), {"n": n, "copy": 1}, {name: bytes([n])})
        yield Kept(_record(n), {"n": n})


def _run(job, make=_make, number=100):
    with job.started({"number": number}):
        job.split("input", _rows(number))
        job.map(runners.Beam(OPTIONS), "records", "input", make)
        return job.report(("input", "records"), title="Test", published={"size": "half"})


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "out", STAGES, shard_size=16)


def test_every_record_is_accounted_for(job):
    report = _run(job)
    passed = [n for n in range(100) if n % 3 != 2]
    fifths = [n for n in passed if n % 5 == 0]
    evens = [n for n in passed if n % 5 and n % 2 == 0]
    assert report["entered"] == 100 + 10 * 5
    assert report["kept"] == len(passed) - len(fifths) + len(evens)
    assert report["dropped"] == 33 + 50 + len(fifths)
    assert report["stages"] == [
        {
            "stage": "size",
            "in": 150,
            "added": 0,
            "out": 67,
            "dropped": {"cannot be read": 50, "too small": 33},
        },
        {"stage": "words", "in": 67, "added": 0, "out": 54, "dropped": {"a fifth": len(fifths)}},
        {
            "stage": "make",
            "in": 54 + len(evens),
            "added": len(evens),
            "out": 54 + len(evens),
            "dropped": {},
        },
    ]
    kept = [pair for shard in range(job.shards("records")) for pair in job.kept(shard)]
    assert len(kept) == report["kept"]
    assert all(record["id"] == str(origin["n"]) for record, origin in kept)
    assert (job.out / "records" / "images" / "4.bin").read_bytes() == b"\4"
    dropped = [
        json.loads(line)
        for path in (job.out / "dropped").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert sum(row["count"] for row in dropped) == report["dropped"]
    text = (job.out / "report.md").read_text()
    assert "| size | 150 | 83 | 67 | 44.7% | half |" in text
    assert "150 records entered, 26 more were made of them; 80 are kept, 96 dropped." in text


def test_costs_that_are_only_bounded_are_said_to_be(job):
    paid = reply_store.Usage(7, 100, 10, 0.5)
    _run(job)
    usage = {"a": paid, "b": paid._replace(estimated=3)}
    report = job.report(("input", "records"), title="Test", usage=usage)
    assert list(report["sections"]) == ["Estimated cost"]
    assert report["sections"]["Estimated cost"].keys() == {"b"}
    assert (
        "| b | 3 of 7 replies came without a count of tokens" in (job.out / "report.md").read_text()
    )
    assert json.loads((job.out / "usage.json").read_text())["b"]["estimated"] == 3
    report = job.report(("input", "records"), title="Test", usage={"a": paid})
    assert report["sections"] == {}


def test_lost_records_are_noticed(job):
    with pytest.raises(Exception, match=r"16 records entered .* but 15 left and 0 were dropped"):
        _run(
            job,
            lambda rows: (Kept(_record(row["n"]), {}) for row in itertools.islice(rows, 1, None)),
        )


def test_unknown_stages_are_noticed(job):
    with pytest.raises(Exception, match=r"no stage \{'elsewhere'\}"):
        _run(job, lambda rows: (Dropped("x", "elsewhere", "why") for row in rows))


def test_comparing_all_with_all_accounts_for_its_rows(job):
    with job.started({}):
        job.split("input", _rows(100))
        unique = (
            Passed(row) if row["n"] % 2 else Dropped(str(row["n"]), "words", "even")
            for row in job.read_all("input")
        )
        job.split("unique", unique, source="input")
        assert [row["n"] for row in job.read_all("unique")] == [
            n for n in range(100) if n % 3 != 2 and n % 2
        ]
        job.accounting("input", "unique").check("both")
        with pytest.raises(AccountingError, match="part few: 67 records entered"):
            job.split(
                "few", map(Passed, itertools.islice(job.read_all("input"), 50)), source="input"
            )


def test_records_that_the_builder_would_reject_are_dropped(job):
    def make(rows):
        for row in rows:
            n = row["n"]
            if n % 3:
                yield Kept(_record(n, "images/a.png"), {}, {"../outside": b"x"})
            else:
                yield Kept(_record("" if n % 2 else "half a pair: \ud83d"), {"text": "\ud83d"})

    report = _run(job, make)
    assert report["kept"] == 0
    reasons = {"field is missing", "path is not allowed", "not valid Unicode"}
    assert set(report["stages"][-1]["dropped"]) == reasons
    assert not (job.out / "outside").exists()


def test_another_plan_is_refused_and_names_what_differs(job, tmp_path):
    _run(job)
    differing = r"holds results of other settings \(number is 100 there and 50 here\)"
    with pytest.raises(restart.WorkError, match=differing):
        _run(job, number=50)
    with job.started({"number": 100}), pytest.raises(restart.WorkError, match="another process"):
        _run(job)


@dataclasses.dataclass(frozen=True)
class Config:
    llm: llm.ClientConfig
    x: tuple[int, ...] = (1, 2)


MODEL = llm.ClientConfig("m", "u", budget=3.0, price_in=1.0)


def test_plan_leaves_out_where_and_at_what_price():
    assert workflow.plan(Config(MODEL)) == {
        "llm": {"model": "m", "temperature": 0, "max_tokens": 4096, "extra_body": {}},
        "x": [1, 2],
        "files": [],
    }


def test_plan_knows_files_that_were_written_again(tmp_path):
    path, before = tmp_path / "a.json", 1_700_000_000_000_000_000
    path.write_text("[1]")
    os.utime(path, ns=(before, before))
    first = workflow.plan(Config(MODEL), [path])
    assert first["files"] == [["a.json", 3, before]]
    path.write_text("[2]")
    assert workflow.plan(Config(MODEL), [path]) != first


def test_a_stop_leaves_finished_shards_and_the_rest_is_made_later(job, tmp_path):
    def stops(rows):
        for row in rows:
            if row["n"] == 51:
                raise reply_store.BudgetExceeded("the budget is spent")
            yield Dropped(str(row["n"]), "make", "none")

    with pytest.raises(
        reply_store.BudgetExceeded, match=r"stopped with 2 of 5 shards done: the budget is spent"
    ):
        _run(job, stops)
    first = (job.out / "work" / "records" / "00000.json").read_bytes()
    assert not (job.out / "report.json").exists()
    report = _run(job, lambda rows: (Dropped(str(row["n"]), "make", "none later") for row in rows))
    assert report["kept"] == 0
    assert report["stages"][-1]["dropped"]["none"] == 32  # the finished shards are not made again
    assert (job.out / "work" / "records" / "00000.json").read_bytes() == first


def test_a_try_that_was_killed_before_the_end_leaves_nothing_dropped(job):
    """Where a second try finds more, as a picture that can be fetched by then."""
    _run(job, lambda rows: (Dropped(str(row["n"]), "make", "not there") for row in rows))
    for name in ("00000.json", "all.json"):
        (job.out / "work" / "records" / name).unlink()
    _run(job, lambda rows: (Kept(_record(row["n"]), {}) for row in rows))
    assert len(list(job.kept(0))) == 16
    left = {path.name for path in (job.out / "dropped").glob("records-*")}
    assert left == {f"records-{n:05d}.jsonl" for n in range(1, job.shards("records"))}


def test_an_interrupt_is_one_to_the_caller_too(job):
    def stops(rows):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        _run(job, stops)
    assert _run(job)["kept"] == 80


def test_missing_beam_names_the_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(restart.WorkError, match="pip install -r requirements-curation"):
        runners.Beam(OPTIONS)
