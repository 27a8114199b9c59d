"""Reading the records of the release: JSON, JSONL and Parquet."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pangea_jax.data.build import json_records
from pangea_jax.data.build.release import ReleaseError, read_records, record_files
from pangea_jax.data.record import Conversation, RecordError

ROOT = Path(__file__).parents[3]
RECORDS = [
    {
        "id": 2433684022797.0 if n % 3 == 0 else f"r{n}",
        "image": f"general/{n}.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\n这 {n}?"},
            {"from": "gpt", "value": "é"},
        ],
        "language": "zh_simplified",
    }
    for n in range(500)
]


def write_records(folder, suffix):
    path = folder / f"records{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=1), encoding="utf-8")
    elif suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    else:
        # A Parquet column has one type.
        rows = [record | {"id": str(record["id"])} for record in RECORDS]
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_records_are_read_in_order(tmp_path, suffix):
    read = []
    path = write_records(tmp_path, suffix)
    found = list(read_records(path, read.append))
    assert [str(record["id"]) for record in found] == [str(record["id"]) for record in RECORDS]
    same = ("image", "conversations", "language")
    assert [[r[k] for k in same] for r in found] == [[r[k] for k in same] for r in RECORDS]
    assert sum(read) == pytest.approx(path.stat().st_size, rel=0.01)


# Looked at while reading: the system's own figure of the peak starts from that of the process that forked.
_PEAK = """
import sys
from pathlib import Path
import psutil
from pangea_jax.data.build.release import read_records
count, peak, process = 0, 0, psutil.Process()
for count, _ in enumerate(read_records(Path(sys.argv[1])), start=1):
    if count % 250 == 0:
        peak = max(peak, process.memory_info().rss)
print(count, peak >> 20)
"""


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    line = json.dumps({"id": "a", "conversations": [{"from": "human", "value": "x" * 2_000}]})
    peaks = []
    for records in (500, 30_000):  # 1 MB, 62 MB
        path = tmp_path / f"{records}{suffix}"
        begin, between, end = ("[", ",", "]") if suffix == ".json" else ("", "\n", "")
        path.write_text(begin + between.join([line] * records) + end)
        command = [sys.executable, "-c", _PEAK, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        count, peak = map(int, done.stdout.split())
        assert count == records
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 20, f"peak memory in MiB: {peaks}"


def test_parquet_has_no_null_fields(tmp_path):
    rows = [{"id": "a", "image": None, "language": "en"}, {"id": "b", "image": "x.jpg"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    found = list(read_records(tmp_path / "r.parquet"))
    assert found == [{"id": "a", "language": "en"}, {"id": "b", "image": "x.jpg"}]


@pytest.mark.parametrize(
    ("text", "offset", "problem"),
    [
        (b'[{"id": 1}, {"id": nul}]', 19, "is not JSON .*after 1 records"),
        (b'[{"id": 1}, {"id": "x', 21, "ends inside the array, after 1 records"),
        (b'[{"id": 1} {"id": 2}]', 11, "is not JSON"),
        (b'[{"id": 1}', 10, "ends inside"),
        (b'[{"id": 1}, ', 12, "ends inside"),
        (b'[{"id": 1}] x', 12, "is not JSON .*trailing garbage"),
        (b'{"id": 1}', 0, "expected an array"),
        (b"", 0, "expected an array"),
    ],
)
def test_broken_json_names_the_byte(tmp_path, text, offset, problem):
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(ReleaseError, match=rf"r\.json, byte {offset}: {problem}") as caught:
        list(read_records(tmp_path / "r.json"))
    assert caught.value.offset == offset
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("where", [10, 262_143, 262_144, 262_145, 700_000])
def test_byte_is_exact_wherever_the_blocks_of_the_reader_end(tmp_path, where):
    record = json.dumps({"id": "a", "text": "x" * 50})
    text = "[" + ",".join([record] * 12_000) + "]"
    place = text.index(":", where)
    (tmp_path / "r.json").write_text(text[:place] + "?" + text[place + 1 :])
    with pytest.raises(ReleaseError) as caught:
        list(read_records(tmp_path / "r.json"))
    assert caught.value.offset == place
    cut = (tmp_path / "cut.json", text[:place])
    cut[0].write_text(cut[1])
    with pytest.raises(ReleaseError, match=rf"byte {place:,}: ends inside"):
        list(read_records(cut[0]))


def test_broken_lines_name_the_byte(tmp_path):
    path = tmp_path / "r.jsonl"
    text = '{"id": "é"}\n{"id": "é", 3}\n'.encode()
    path.write_bytes(text)
    with pytest.raises(ReleaseError, match=rf"byte {text.index(b'3')}: line 2: "):
        list(read_records(path))
    path.write_bytes(b'{"id": 1}\n{"id": 2} {"id": 3}\n')
    with pytest.raises(ReleaseError, match=r"byte 20: line 2: Extra data"):
        list(read_records(path))


def write_both(folder, records):
    """The same records as an array and as lines."""
    (folder / "r.jsonl").write_bytes(b"\n".join(records))
    (folder / "r.json").write_bytes(b"[" + b", ".join(records) + b"]")
    return folder / "r.jsonl", folder / "r.json"


@pytest.mark.parametrize("depth", [100, 5_000, 200_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_what_is_nested_too_deeply_is_a_record_that_cannot_be_read(
    tmp_path, depth, opening, closing
):
    deep = f'{{"id": "deep", "conversations": {opening * depth}0{closing * depth}}}'
    text = {"id": "code", "conversations": "[" * 2_000 + "{" * 2_000}  # in a text they nest nothing
    shallow = json.loads(f'{{"id": "shallow", "conversations": {"[" * 99}{"]" * 99}}}')
    records = [record.encode() for record in (deep, json.dumps(text), json.dumps(shallow))]
    for path in write_both(tmp_path, records):
        first, *others = read_records(path)
        assert others == [text, shallow]
        with pytest.raises(RecordError, match=r"'deep'.* be read .nested more than 100 levels"):
            Conversation.from_pangeains(first)


def test_a_nested_record_takes_no_memory(tmp_path):
    deep = b'{"id": "deep", "c": ' + b'{"a":' * 300_000 + b"1" + b"}" * 300_000 + b"}"
    for path in write_both(tmp_path, [deep] * 3):
        tracemalloc.start()
        assert len(list(read_records(path))) == 3
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 << 20


@pytest.mark.parametrize(
    "number",
    [b"1" * 5_000, b"-" + b"9" * 20, b"18446744073709551616", b"NaN", b"-Infinity", b"1e999"],
)
def test_a_number_that_others_cannot_read_rejects_its_record(tmp_path, number):
    good = b'{"id": 18446744073709551615, "x": [1e300, -9223372036854775808, 0]}'
    for path in write_both(tmp_path, [good, b'{"id": "bad", "x": [%s]}' % number, good]):
        first, bad, last = read_records(path)
        assert first == last == json.loads(good)
        with pytest.raises(RecordError, match=r"'bad'.* cannot be read .holds the number"):
            Conversation.from_pangeains(bad)


@pytest.mark.parametrize("broken", [rb"\ud800", b"\xed\xa0\x80", b"\xff", rb"\udc00\ud800"])
def test_half_a_surrogate_pair_rejects_its_record(tmp_path, broken):
    turns = b'[{"from": "human", "value": "%s"}, {"from": "gpt", "value": "x"}]'
    record = b'{"id": "%s", "language": "en", "conversations": ' + turns + b"}"
    records = [record % (b"first", b"a"), record % (b"bad", broken), record % (b"last", b"b")]
    for path in write_both(tmp_path, records):
        first, bad, last = read_records(path)
        assert [Conversation.from_pangeains(r).id for r in (first, last)] == ["first", "last"]
        with pytest.raises(RecordError, match=r"'bad'.*not valid Unicode"):
            Conversation.from_pangeains(bad)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    for path in write_both(tmp_path, [b'{"id": 1}']):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert list(read_records(path)) == [{"id": 1}]


def test_a_record_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "MAX_BYTES", 1 << 20)
    long = json.dumps({"id": "long", "text": ['\\"]}' * 300_000, {}]}).encode()
    for path in write_both(tmp_path, [b'{"id": 1}', long, b'{"id": 2}']):
        first, bad, last = read_records(path)
        assert (first, last) == ({"id": 1}, {"id": 2})
        with pytest.raises(RecordError, match=r"'long'.* cannot be read .longer than"):
            Conversation.from_pangeains(bad)


def test_what_blocks_cut_is_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_BLOCK", 1)
    values = [{"t": '\\"]}é\n😀', "n": [-1.5e-7, None, True, False, {}, []]}, "s", 12, -3.25]
    for ascii in (True, False):
        text = json.dumps(values, ensure_ascii=ascii).replace("\\ud83d", "\\uD83D")
        (tmp_path / "r.json").write_text(text, encoding="utf-8")
        assert list(read_records(tmp_path / "r.json")) == values


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_named_pipe_is_refused_at_once(tmp_path, suffix):
    os.mkfifo(tmp_path / f"r{suffix}")
    with pytest.raises(ReleaseError, match="a named pipe, not a regular file"):
        list(read_records(tmp_path / f"r{suffix}"))


def test_broken_parquet_is_named(tmp_path):
    path = write_records(tmp_path, ".parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ReleaseError, match=r"records\.parquet: is not a complete Parquet file"):
        list(read_records(path))


def test_record_files_of_a_folder(tmp_path):
    with pytest.raises(ReleaseError, match=r"holds no PangeaIns\.json"):
        record_files(tmp_path)
    parts = [tmp_path / f"{n}.parquet" for n in range(3)]
    for path in reversed(parts):
        path.touch()
    assert record_files(tmp_path) == parts
    (tmp_path / "more.jsonl").touch()
    with pytest.raises(ReleaseError, match="several sets of records"):
        record_files(tmp_path)
    (tmp_path / "PangeaIns.json").touch()
    assert record_files(tmp_path) == [tmp_path / "PangeaIns.json"]
    assert record_files(parts[1]) == [parts[1]]
    with pytest.raises(ReleaseError, match=r"is not one of \.json"):
        read_records(tmp_path / "x.csv")
