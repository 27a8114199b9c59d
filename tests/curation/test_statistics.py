"""Counts of a data set, and what it has in common with benchmarks."""

import base64
import csv
import functools
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")

from pangea_jax.curation import contamination, filters, near_duplicates, statistics
from pangea_jax.curation.contamination import BenchmarkError, Benchmarks, Findings, Overlap
from pangea_jax.data import mixture
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.store import RecordStore
from pangea_jax.figures import composition
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.work.restart import WorkError

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "pangeains_sample"
WORDS = [
    a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en", "il", "on", "ut")
]
QUESTION = "which of the two towers in this picture was built before the great flood"
CONTEXT = " ".join(random.Random(1).sample(WORDS, 60))
CHINESE = "图片中左边的人物穿着什么颜色的传统服装并且手里拿着什么东西"


def text(seed, count=30):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def picture(seed, size=(320, 256), quality=95):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=quality
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store with some conversations of the embedded sample."""
    sample = SampleStore()
    made = {split: sample.records(split) for split in sample.splits}
    records = {split: [some[i] for i in range(0, len(some), 4999)] for split, some in made.items()}
    keys = sorted({key for some in records.values() for record in some for key in record.images})
    collections = {key.split("/")[0]: [] for key in keys}
    for key in keys:
        collections[key.split("/")[0]].append(Picture(key, sample.image(key), 64, 64))
    directory = tmp_path_factory.mktemp("stored")
    write_store(
        directory,
        name="made",
        build="python launch/build_data.py made",
        records={split: ((record, {}) for record in some) for split, some in records.items()},
        images=collections,
    )
    return RecordStore(directory)


@pytest.fixture
def bench(tmp_path):
    """A folder as eval/run.py reads it, and a set as it was published."""
    folder = tmp_path / "bench"
    (folder / "xgqa" / "images").mkdir(parents=True)
    (folder / "xgqa" / "images" / "1.jpg").write_bytes(picture(1))
    (folder / "xgqa" / "images" / "white.png").write_bytes(white())
    rows = [
        {"id": "q1", "question": QUESTION, "answer": "left", "images": ["images/1.jpg"]},
        {"id": "q2", "question": CHINESE, "answer": "是", "images": ["images/white.png"]},
    ]
    write_lines(folder / "xgqa" / "en.jsonl", rows)
    (folder / "raw").mkdir()
    with gzip.open(folder / "raw" / "dev.json.gz", "wt") as file:
        json.dump([{"data": {"passages": [CONTEXT]}}], file)
    (folder / "raw" / "sums.tsv").write_text(f"{text('sum', 20)}\t18\n")
    return folder


def white():
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300), "white").save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def record(id, question, answer="an answer that is long enough", image=None, **more):
    said = [("human", ("<image>\n" if image else "") + question), ("gpt", answer)]
    turns = [{"from": speaker, "value": value} for speaker, value in said]
    plain = {"id": id, "conversations": turns, "language": "en", "source": "general/a"}
    return plain | ({"image": image} if image else {}) | more


def spans(context, first, count):
    return " ".join(context.split()[first : first + count])


@pytest.fixture
def data(tmp_path):
    """Records with planted overlaps: id -> what must be found."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "same.jpg").write_bytes(picture(1, (500, 400), 60))
    (folder / "images" / "other.jpg").write_bytes(picture(2))
    (folder / "images" / "broken.jpg").write_bytes(picture(3)[:2000])
    (folder / "images" / "white.png").write_bytes(white())
    planted = {
        "clean": (record("clean", text(0), text(1), "images/other.jpg"), set()),
        "exact": (record("exact", QUESTION.upper() + "?"), {"exact", "13-gram"}),
        "line": (record("line", f"{text(2)}\n{QUESTION}\nAnswer in a word."), {"exact", "13-gram"}),
        "run": (record("run", f"{text(3)} {spans(CONTEXT, 20, 13)}, {text(4)}"), {"13-gram"}),
        "answered": (record("answered", text(5), spans(CONTEXT, 40, 20)), {"13-gram"}),
        "twelve": (record("twelve", f"{text(6)} {spans(CONTEXT, 20, 12)} {text(7)}"), set()),
        "torn": (record("torn", f"{spans(CONTEXT, 0, 7)} {text(8)} {spans(CONTEXT, 7, 7)}"), set()),
        "short": (record("short", "left"), set()),
        "chinese": (record("chinese", f"请问，{CHINESE[3:20]}？", language="zh"), {"13-gram"}),
        "picture": (record("picture", text(9), text(10), "images/same.jpg"), {"picture"}),
        "white": (record("white", text(11), text(12), "images/white.png"), set()),
        "broken": (record("broken", text(13), text(14), "images/broken.jpg"), set()),
        "missing": (record("missing", text(15), text(16), "images/none.jpg"), set()),
    }
    bad = [{"id": "b|a\nd", "conversations": [], "language": "en"}, 5]
    write_lines(folder / "records.jsonl", [row for row, _ in planted.values()] + bad)
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"id": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    return folder, {id: kinds for id, (_, kinds) in planted.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_planted_overlaps_are_found_and_nothing_else(bench, data, tmp_path, workers):
    folder, planted = data
    benchmarks = Benchmarks.read([bench])
    found = statistics.measure(folder, benchmarks=benchmarks, work=tmp_path / "w", workers=workers)
    overlaps = {id: {o.kind for o in some} for id, some in found.findings.records()}
    assert overlaps == {id: kinds for id, kinds in planted.items() if kinds}
    assert found.faults == {"picture is damaged": 1, "picture is missing": 1}
    assert (found.total, found.kept) == (16, 13)
    assert found.rejected == {
        "no turns": (1, "b|a\nd"),
        "wrong type": (1, ""),
        "cannot be read": (1, ""),
    }

    report = statistics.write(found, ["## Sources"], tmp_path / "out").read_text("utf-8")
    assert "| no turns | 1 | `b\\|a d` |\n" in report
    listed = [id for id in planted if planted[id]]
    assert list(mixture.read_ids(tmp_path / "out" / "exclude_ids.txt")) == listed
    lines = (tmp_path / "out" / "contamination.jsonl").read_text("utf-8").splitlines()
    details = {(row["id"], row["document"]): row for row in map(json.loads, lines)}
    assert len(details) == len(lines) - 2  # the two that are exact hold runs as well
    assert details["answered", "raw/dev.json.gz:1"]["times"] == 20 - contamination.NGRAM + 1
    assert details["picture", "xgqa/images/1.jpg"]["bits"] <= near_duplicates.MAX_HASH_DISTANCE
    assert details.keys() >= {("run", "raw/dev.json.gz:1"), ("exact", "xgqa/en.jsonl:q1")}
    assert "| xgqa/en.jsonl | exact | 2 | 1 |" in report and f"{len(listed)} ids overlap" in report


def test_pictures_are_compared_only_if_asked_for(bench, stored, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(statistics._Records, "_read", lambda self, name: read.append(name) or b"")
    compared = {"benchmarks": Benchmarks.read([bench]), "work": tmp_path}
    statistics.measure(stored.directory, pictures=False, **compared)
    texts = Benchmarks.read([bench], pictures=False)
    statistics.measure(stored.directory, **compared | {"benchmarks": texts})
    assert read == []
    statistics.measure(stored.directory, **compared)
    assert read


def test_pictures_within_rows_are_no_text_and_no_limit(tmp_path):
    encoded = base64.b64encode(np.random.default_rng(0).bytes(150_000)).decode()
    (tmp_path / "x.tsv").write_text(f"1\t{encoded}\t{QUESTION}\r\n2\t\t{CONTEXT}\n", "utf-8")
    benchmarks = Benchmarks.read([tmp_path])
    assert benchmarks.documents == ("x.tsv:1", "x.tsv:2")
    assert [o.document for o in benchmarks.in_texts([QUESTION]) if o.kind == "exact"] == ["x.tsv:1"]
    assert benchmarks.words.keys() == set(filters.words(f"{QUESTION} {CONTEXT}"))


def test_the_list_of_ids_leaves_those_records_out(bench, data, tmp_path):
    folder, planted = data
    benchmarks = Benchmarks.read([bench])
    found = statistics.measure(folder, benchmarks=benchmarks, work=tmp_path)
    found.findings.write(tmp_path)
    ids = list(planted)
    columns = {"id": ids, "language": ["en"] * len(ids), "source": ["a"] * len(ids)}
    index = pa.table(columns | {"category": ["c"] * len(ids), "kind": ["image"] * len(ids)})
    left_out = mixture.read_ids(tmp_path / "exclude_ids.txt")
    plan = mixture.Mixture(None, language_alpha=1.0, text_ratio=None, exclude_ids=left_out)
    chosen = {ids[row] for row in mixture.choose(index, plan).rows}
    assert chosen == {id for id, kinds in planted.items() if not kinds}


def runs(words, n=contamination.NGRAM):
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_runs_of_words_are_those_of_plain_sets(tmp_path):
    luck = random.Random(0)
    few = WORDS[:4]  # so few words that runs do occur again
    documents = [" ".join(luck.choices(few, k=luck.randrange(5, 60))) for _ in range(40)]
    write_lines(tmp_path / "x.jsonl", [{"id": str(n), "text": t} for n, t in enumerate(documents)])
    benchmarks = Benchmarks.read([tmp_path])
    held = Counter(run for t in documents if len(t.split()) >= 8 for run in runs(t.split()))
    for _ in range(200):
        words = luck.choices([*few, "elsewhere"], weights=[9, 9, 9, 9, 1], k=60)
        overlaps = [o for o in benchmarks.in_texts([" ".join(words)]) if o.kind == "13-gram"]
        common = runs(words) & held.keys()
        expected = {f"x.jsonl:{n}" for n, t in enumerate(documents) if runs(t.split()) & common}
        assert {o.document for o in overlaps} == expected
        assert len({o.detail for o in overlaps}) == len(common)


def test_wording_that_many_share_is_no_content(tmp_path):
    template = text("template", 20)
    rows = [{"id": str(n), "text": f"{template} {text(n, 15)}"} for n in range(12)]
    write_lines(tmp_path / "x.jsonl", rows)
    benchmarks = Benchmarks.read([tmp_path])
    assert benchmarks.in_texts([f"{text('before', 9)} x {template} x"]) == []
    own = benchmarks.in_texts([text(3, 15)])
    assert {o.document for o in own} == {"x.jsonl:3"}

    findings = Findings()
    for n in range(contamination.BOILERPLATE):
        findings.add(f"r{n}", own)
    assert len(list(findings.records())) == contamination.BOILERPLATE
    findings.add("one too many", own)
    assert list(findings.records()) == []
    findings.add("but exact", [Overlap("exact", "x.jsonl:3", 0)])
    assert [id for id, _ in findings.records()] == ["but exact"]


def test_ids_that_a_line_cannot_hold_are_warned_of(tmp_path, caplog):
    findings = Findings()
    for id in ("plain", "# 1", "two\nlines", "zwei Wörter"):
        findings.add(id, [Overlap("exact", "x.jsonl:3", 0)])
    ids, details = findings.write(tmp_path)
    assert mixture.read_ids(ids) == ("plain", "zwei Wörter")
    assert [json.loads(line)["id"] for line in details.read_text("utf-8").splitlines()][1] == "# 1"
    assert len(caplog.records) == 2 and "'two\\nlines'" in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": \n', r"a\.jsonl, row 2: is not JSONL"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz, row 1"),
        ("a.json", b"\xff\xfe", r"a\.json, row 1: is not JSON"),
        ("a.jpg", b"no picture", r"a\.jpg'.*not a whole file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:10] + b"\xff" * 20, r"a\.jsonl\.gz, row 1"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 1_000, mtime=0)[:-9], r"a\.jsonl\.gz, row \d+"),
    ],
)
def test_benchmarks_that_are_broken_say_where(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BenchmarkError, match=message):
        Benchmarks.read([tmp_path])


@pytest.mark.parametrize(
    ("name", "piece", "limit"),
    [
        ("a.jsonl.gz", b"{}\n" * 10_000, "inflates to more than 1,000,000 bytes"),
        ("a.jsonl.gz", b" " * 30_000, "more than 50,000 bytes; split it"),
        ("a.json.gz", b" " * 30_000, "more than 100,000 bytes; split it"),
        ("a.tsv", b"\t" * 30_000, "more than 50,000 bytes; split it"),
    ],
)
def test_a_benchmark_that_inflates_without_end_is_refused(
    tmp_path, monkeypatch, name, piece, limit
):
    monkeypatch.setattr(contamination, "_ANY_SIZE", 1_000_000)
    monkeypatch.setattr(contamination, "_MOST_RATIO", 10)
    monkeypatch.setattr(contamination, "_MOST_LINE", 50_000)
    monkeypatch.setattr(contamination, "_MOST_FILE", 100_000)
    data = piece * 1_000
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(BenchmarkError, match=f"{re.escape(name)}, row .*{re.escape(limit)}"):
        Benchmarks.read([tmp_path])


def test_half_a_surrogate_pair_is_a_letter_like_others(tmp_path):
    row = {"id": "\ud83d", "question": f"\ud83d {QUESTION}"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row), encoding="ascii")
    overlaps = Benchmarks.read([tmp_path]).in_texts([f"\ud83d {QUESTION}"])
    assert [o.document for o in overlaps if o.kind == "exact"] == ["x.jsonl:?"]


def test_a_folder_without_a_benchmark_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        Benchmarks.read([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Benchmarks.read([tmp_path / "nowhere"])


def test_a_worker_that_is_killed_says_so():
    dying = types.SimpleNamespace(measure=os._exit, chunks=functools.partial(iter, [1, 2]))
    with pytest.raises(WorkError, match="a worker was killed"):
        list(statistics._results(dying, 2))


def test_counts_are_those_of_a_recount(stored, tmp_path):
    found = statistics.measure(stored.directory, work=tmp_path)
    index = stored.index
    assert found.total == found.kept == len(index)
    assert "identified" not in found.markdown([])
    rows = index.select(["category", "source", "language"]).to_pylist()
    assert found.cells == Counter(tuple(row.values()) for row in rows)
    counted = composition.Composition(found.index())
    expected = composition.Composition(index)
    assert counted.languages == expected.languages and counted.sources == expected.sources
    assert (counted.counts == expected.counts).all()

    records = stored.records(stored.splits[0])
    one = statistics.Statistics()
    for conversation in (records[0], records[1]):
        one.add(conversation)
    said = [
        sum(len(t.text) for t in r.turns if t.role == "assistant") for r in (records[0], records[1])
    ]
    answers = [n for numbers in one.lengths.values() for n in numbers[2]]
    assert sorted(answers) == sorted(said)


def test_the_command_writes_report_figure_and_lists(bench, data, tmp_path):
    folder, _ = data
    command = [sys.executable, ROOT / "launch" / "curate.py", "stats", folder, f"--bench={bench}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, f"--out={out}", "--workers=1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "13 of 16 records can be used" in done.stdout
    assert {p.name for p in out.iterdir()} >= {
        *("report.md", "composition.png", "composition.svg", "composition.csv"),
        *("exclude_ids.txt", "contamination.jsonl"),
    }
    table = list(csv.reader((out / "composition.csv").open(encoding="utf-8")))
    assert table[0] == ["category", "source", "en", "zh", "all"] and table[1][-1] == "13"
    beside = subprocess.run([*command[:3], folder / "records.jsonl"], env=environment)
    assert beside.returncode == 0 and (folder / "statistics" / "report.md").is_file()
    for wrong in ([tmp_path / "nowhere"], [folder, f"--images={tmp_path / 'nowhere'}"]):
        failed = subprocess.run(
            [*command[:3], *wrong], capture_output=True, text=True, env=environment
        )
        assert failed.returncode == 1
        assert "nowhere: no such folder" in failed.stderr and "Traceback" not in failed.stderr


def test_task_types_come_from_the_provenance(data, tmp_path):
    folder, _ = data
    out = tmp_path / "results"
    (out / "provenance").mkdir(parents=True)
    os.symlink(folder, out / "records")
    write_lines(
        out / "provenance" / "00000.jsonl", [{"task_types": ["Data Analysis", "Captioning"]}]
    )
    found = statistics.measure(out, work=tmp_path)
    assert found.kept == 13 and found.task_types == {"Data Analysis": 1, "Captioning": 1}
    assert "| Captioning | 1 |" in found.markdown([])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs ../shared/data/pangeains_sample")
def test_a_benchmark_of_real_records_is_found_in_them(tmp_path):
    records = json.loads((SAMPLE / "PangeaIns.json").read_text("utf-8"))
    told = [r for r in records if len(filters.words(r["conversations"][1]["value"])) >= 40]
    rows = [{"id": str(r["id"]), "text": r["conversations"][1]["value"]} for r in told[::4]]
    write_lines(tmp_path / "x.jsonl", rows)
    found = statistics.measure(SAMPLE, benchmarks=Benchmarks.read([tmp_path]), work=tmp_path)
    assert found.kept == 135
    wanted = {row["id"] for row in rows}
    assert wanted <= {
        id for id, some in found.findings.records() if "exact" in {o.kind for o in some}
    }
    assert len(wanted) > 10


@pytest.mark.skipif(not (SAMPLE.parent / "bench").is_dir(), reason="needs ../shared/data/bench")
def test_real_benchmarks_are_read_as_they_were_published(tmp_path):
    bench = SAMPLE.parent / "bench"
    benchmarks = Benchmarks.read([bench / "mgsm", bench / "mmmu", bench / "tydiqa"])
    assert len(benchmarks.pictures) > 15 and len(benchmarks.documents) > 7 * 258
    lines = (bench / "mgsm" / "mgsm_sw.tsv").read_text("utf-8").splitlines()
    question = next(line.split("\t")[0] for line in lines if len(line.split()) > 20)
    rows = [record("asked", f"Jibu swali. {question}"), record("clean", text(0), text(1))]
    picture = next((bench / "mmmu" / "images").glob("*.png"))
    rows.append(record("seen", text(2), text(3), picture.name))
    write_lines(tmp_path / "records.jsonl", rows)
    found = statistics.measure(
        tmp_path, benchmarks=benchmarks, images=picture.parent, work=tmp_path / "w"
    )
    kinds = {id: {o.kind for o in some} for id, some in found.findings.records()}
    assert kinds == {"asked": {"13-gram"}, "seen": {"picture"}}
