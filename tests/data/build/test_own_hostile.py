"""Own data within the limits of docs/security.md: what breaks one is one bad record, in every form of files."""

import base64
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pangea_jax.data.build import archives, embedded, json_records, own_files
from pangea_jax.data.build.own_records import FAULT
from pangea_jax.data.build.plan import BuildError
from pangea_jax.data.record import UNREADABLE
from pangea_jax.data.store import RecordStore
from pangea_jax.work.restart import WorkError
from tests.data.build.own import build
from tests.data.build.released import encoded, noise

GOOD = {"image": "a.png", "question": "What?", "answer": "A cat.", "language": "en"}
DEEP = "[" * 3_000 + "]" * 3_000


@pytest.fixture
def source(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.png").write_bytes(encoded(noise(8, 8), "PNG"))
    return tmp_path / "s"


def rejected(source, **options):
    """The reasons of a build, of which the first and the last record are good."""
    out = source.parent / "o"
    summary = build(source, out, 0.9, **options)
    assert summary["kept"] == 2
    RecordStore(out).verify()
    return {reason: count for reason, (count, _) in summary["rejected"].items()}


def write_lines(source, *lines):
    lines = [json.dumps(GOOD), *lines, json.dumps(GOOD)]
    (source / "data.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"conversations": DEEP}, "wrong type"),
        ({"image": DEEP}, "path is not allowed"),
        ({"image": "[" * 90 + '"a.png"' + "]" * 90}, "markers and images differ in number"),
        ({"image": "/a" * 3_000}, "path is not allowed"),
        ({"image": "../a.png"}, "path is not allowed"),
        ({"question": "a\ud800?"}, "not valid Unicode"),
        ({"\ud800" * 100: "x", "answer": ""}, "field is missing"),
        ({"id": ["x" * 5_000]}, "wrong type"),
        ({"n": float("nan")}, "cannot be read"),
        ({UNREADABLE: 5}, "cannot be read"),
        ({UNREADABLE: [1]}, "cannot be read"),
        ({FAULT: ["a", "b", "c"]}, "a"),
        ({"image": {"\0embedded": "00", "size": "x"}}, "markers and images differ in number"),
    ],
)
def test_a_record_that_breaks_a_limit_is_one_bad_record(source, value, reason):
    if reason == "field is missing":
        value = value | {"answer": None}
    if reason.startswith("markers"):
        value = value | {"question": "<image> <image>"}
    write_lines(source, json.dumps(GOOD | value))
    assert rejected(source) == {reason: 1}


def test_marks_of_readers_in_a_record_change_nothing(source):
    forged = GOOD | {FAULT: 5, "image": [{"\0embedded": "00", "path": "a.png"}]}
    write_lines(source, json.dumps(forged))
    summary = build(source, source.parent / "o")
    assert (summary["kept"], summary["pictures"]) == (3, 1)


def test_rows_of_a_table_that_break_a_limit(source, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_BYTES", 10_000)
    rows = [
        b"image,question,answer,language",
        b"a.png,What?,A cat.,en",
        b"a.png,caf\xe9?,A cat.,en",
    ]
    rows += [b"a.png," + b"x" * 6_000 + b',"' + b"y\n" * 3_000 + b'",en', rows[1]]
    (source / "data.csv").write_bytes(b"\n".join(rows))
    assert rejected(source) == {"not valid Unicode": 1, "cannot be read": 1}
    (source / "data.csv").write_bytes(b"\n".join([*rows, b"x" * 20_000]))
    with pytest.raises(WorkError, match=r"line 3006: longer than .*; shorten it"):
        build(source, source.parent / "o2")


def test_a_text_of_parquet_that_is_not_unicode(source):
    questions = pa.array([b"ok", b"a\xff?", b"ok"], pa.binary()).view(pa.string())
    columns = {name: [value] * 3 for name, value in GOOD.items() if name != "question"}
    pq.write_table(pa.table(columns | {"question": questions}), source / "data.parquet")
    assert rejected(source) == {"not valid Unicode": 1}


def test_a_map_of_parquet_that_is_nested_too_deeply(source, monkeypatch):
    # Arrow itself reads at most 64 levels.
    monkeypatch.setattr(json_records, "MAX_NESTING", 3)
    kind = pa.map_(pa.string(), pa.map_(pa.string(), pa.string()))
    deep = pa.array([None, [("a", [("b", "c")])], None], kind)
    columns = {name: [value] * 3 for name, value in GOOD.items()}
    pq.write_table(pa.table(columns | {"deep": deep}), source / "data.parquet")
    assert rejected(source) == {"cannot be read": 1}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.timestamp("s"), 10**15),
        (pa.date32(), 2**31 - 1),
        (pa.duration("s"), 2**62),
        (pa.timestamp("s", "Mars/Phobos"), 0),
    ],
    ids=str,
)
def test_a_value_that_python_cannot_hold_is_a_fault_of_its_record(tmp_path, kind, value):
    plain = pa.int32() if kind == pa.date32() else pa.int64()
    taken = pa.array([None, value, None], plain).view(kind)
    table = pa.table({"question": ["a", "b", "c"], "taken": taken})
    with pa.ipc.new_file(tmp_path / "data.arrow", table.schema) as file:
        file.write_table(table)
    first, second, third = own_files.read_records(tmp_path / "data.arrow")
    assert (first, third) == ({"question": "a"}, {"question": "c"})
    reason, field, detail = second[FAULT]
    assert (reason, field) == ("cannot be read", "taken")
    assert str(kind) in detail


def test_a_damaged_arrow_file_is_named(source):
    batch = pa.table({"text": ["a" * 40, "b" * 40]})
    with pa.ipc.new_file(source / "data.arrow", batch.schema) as file:
        file.write_table(batch)
    content = (source / "data.arrow").read_bytes()
    offsets = (40).to_bytes(4, "little") + (80).to_bytes(4, "little")
    assert content.count(offsets) == 1
    (source / "data.arrow").write_bytes(content.replace(offsets, b"\x7f\xff\xff\x7f" * 2))
    with pytest.raises(WorkError, match=r"data\.arrow.*is not a complete Arrow file"):
        list(own_files.read_records(source / "data.arrow"))


def test_a_picture_inside_a_record_that_is_too_large(source, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1_000)
    data = base64.b64encode(encoded(noise(64, 64), "PNG")).decode()
    write_lines(source, json.dumps(GOOD | {"image": f"data:image/png;base64,{data}"}))
    assert rejected(source) == {"picture cannot be read": 1}
    writer = embedded.Writer(source / "pictures.sqlite")
    writer.take(b"x" * 1_001)
    writer.close()
    assert not (source / "pictures.sqlite").exists()


def test_links_and_pipes_of_own_data(source):
    (source.parent / "secret.png").write_bytes(encoded(noise(8, 8), "PNG"))
    (source / "link.png").symlink_to(source.parent / "secret.png")
    os.mkfifo(source / "pipe.png")
    write_lines(source, *(json.dumps(GOOD | {"image": n}) for n in ("link.png", "pipe.png")))
    assert rejected(source) == {
        "picture is outside of the source": 1,
        "picture is not a regular file": 1,
    }
    assert build(source, source.parent / "all", 0.9, follow_links=True)["kept"] == 3
    (source / "data.jsonl").rename(source.parent / "data.jsonl")
    (source / "data.jsonl").symlink_to(source.parent / "data.jsonl")
    with pytest.raises(BuildError, match=r"data\.jsonl is a symbolic link out of the source"):
        build(source, source.parent / "other", 0.9)
    os.mkfifo(source.parent / "pipe.jsonl")
    with pytest.raises(WorkError, match="a named pipe, not a regular file"):
        own_files.read_records(source.parent / "pipe.jsonl")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ('{"_data_files": 5}', "cannot be read"),
        ('{"_data_files": [{"filename": 5}]}', "cannot be read"),
        ('{"_data_files": ' + DEEP + "}", "cannot be read"),
        ('{"_data_files": [{"filename": "../data.jsonl"}]}', "data.jsonl is a symbolic link out"),
    ],
)
def test_a_description_of_saved_data_that_leads_elsewhere(source, state, said):
    (source.parent / "data.jsonl").write_text(json.dumps(GOOD))
    (source / "state.json").write_text(state)
    with pytest.raises(WorkError, match=said):
        build(source, source.parent / "o")


def test_a_removed_file_of_pictures_is_made_again(source, tmp_path):
    data = base64.b64encode(encoded(noise(8, 8), "PNG")).decode()
    write_lines(source, json.dumps(GOOD | {"image": f"data:image/png;base64,{data}", "answer": ""}))
    from rich.progress import Progress

    from pangea_jax.data.build.pangeains import Build
    from pangea_jax.data.build.records import Records

    made = Build(source, tmp_path / "o", own="own")
    made.start()
    list(Records(made).split(Progress(disable=True)))
    before = made.embedded.read_bytes()
    made.embedded.unlink()
    list(Records(made).split(Progress(disable=True)))
    assert made.embedded.read_bytes() == before


def test_a_long_rejected_record_is_cut(source):
    write_lines(source, json.dumps(GOOD | {"answer": "", "question": "x" * 200_000}))
    assert rejected(source) == {"empty answer": 1}
    (line,) = (source.parent / "o/rejected.jsonl").read_text().splitlines()
    assert len(line) < 70_000
