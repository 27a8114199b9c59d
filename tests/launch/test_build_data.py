"""`python launch/build_data.py pangeains` and `own`, as a user calls them."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import build_data
from pangea_jax.data.store import RecordStore
from pangea_jax.sample import emoji

SCRIPT = Path(build_data.__file__)


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "release"
    (folder / "general/set").mkdir(parents=True)
    records = []
    for n in range(30):
        (folder / f"general/set/{n}.jpg").write_bytes(jpeg(n))
        turns = [
            {"from": "human", "value": "<image>\nNi nini?"},
            {"from": "gpt", "value": f"Paka {n}"},
        ]
        image = f"general/set/{n}.jpg"
        records.append({"id": n, "image": image, "conversations": turns, "language": "sw"})
    (folder / "PangeaIns.json").write_text(json.dumps(records))
    return folder


def call(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_makes_a_store_and_a_report(source, tmp_path):
    (source / "general/set/3.jpg").unlink()
    out = tmp_path / "out"
    done = call(
        "pangeains",
        f"--source={source}",
        f"--out={out}",
        "--workers=2",
        f"--tokenizer={emoji.DIRECTORY}",
        "--max_bad_fraction=0.1",
        "--limit=20",
    )
    assert done.returncode == 0, done.stderr
    assert "19 of 20 records, 19 pictures" in done.stdout
    said = "picture is missing: PangeaIns.json, record 4 ('3'), field image: looked for"
    assert f"1  {said}" in done.stdout
    store = RecordStore(out)
    store.verify()
    assert len(store.records("train")) == 19
    assert store.index["num_tokens"].null_count == 0
    for name in ("report.md", "composition.csv", "composition.png", "composition.svg"):
        assert (out / "report" / name).stat().st_size > 40
    report = (out / "report/report.md").read_text()
    assert "| picture is missing | 1 | 5.00% | `PangeaIns.json, record 4 ('3'), field" in report


def errors(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        sys.argv = ["build_data.py", *map(str, arguments)]
        build_data.main()
    assert stopped.value.code not in (0, None)
    return f"{stopped.value.code} {capsys.readouterr().err}"


def test_faults_are_told_in_a_sentence(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    common = ("pangeains", f"--source={source}", f"--out={tmp_path / 'out'}", "--workers=1")
    assert "unrecognized arguments: --worker_count=3" in errors(capsys, *common, "--worker_count=3")
    assert "unknown language tag 'xx'" in errors(capsys, *common, "--default_language=xx")
    assert "no tokenizer: looked for" in errors(capsys, *common, "--tokenizer=nowhere")
    for flag in ("--limit=0", "--workers=-1", "--max_pixels=many"):
        name = flag.partition("=")[0]
        assert f"{name}: expected a whole number from 1 on" in errors(capsys, *common, flag)
    for wrong in ("5", "nan"):
        message = errors(capsys, *common, f"--max_bad_fraction={wrong}")
        assert "--max_bad_fraction: expected a fraction from 0 to 1" in message
    for path in (source / "general/set").glob("1*.jpg"):
        path.unlink()
    message = errors(capsys, *common)
    assert "11 of 30 records (36.7%) cannot be used, more than --max_bad_fraction=0.01" in message
    assert "11  picture is missing: PangeaIns.json, record 2 ('1'), field image: looked" in message
    assert len((tmp_path / "out/rejected.jsonl").read_text().splitlines()) == 11
    text = (source / "PangeaIns.json").read_text()
    (source / "PangeaIns.json").write_text(text[:700])
    elsewhere = (*common[:2], f"--out={tmp_path / 'other'}", "--workers=1")
    assert "PangeaIns.json, byte 700: ends inside the array" in errors(capsys, *elsewhere)
    (source / "PangeaIns.json").unlink()
    assert "holds no PangeaIns.json" in errors(capsys, *elsewhere)


def test_own_data_from_a_table(tmp_path, capsys, monkeypatch):
    (tmp_path / "pics").mkdir()
    for n in range(3):
        (tmp_path / f"pics/{n}.jpg").write_bytes(jpeg(n))
    rows = [f"pics/{n}.jpg,Hii ni rangi gani?,Ni nyekundu.,note {n}" for n in range(3)]
    (tmp_path / "mine.csv").write_text("\n".join(["path,q,a,remark", *rows]))
    common = ("own", f"--source={tmp_path}", f"--out={tmp_path / 'out'}", "--workers=1")
    monkeypatch.setattr(sys, "argv", sys.argv)
    message = errors(capsys, *common)
    assert "mine.csv, byte 0: line 1: none of the columns path, q, a, remark is known" in message
    assert "expected OURS=YOURS,..., OURS one of id, image," in errors(
        capsys, *common, "--columns=picture=path"
    )
    sys.argv = ["build_data.py", *common, "--columns=image=path,question=q,answer=a", "--own=team"]
    build_data.main()
    said = capsys.readouterr().out
    assert "3 of 3 records, 3 pictures" in said
    assert "language identified from the words of 0 records, and of 3 not (und)" in said
    assert "3  field remark is not used\n" in said
    report = (tmp_path / "out/report/report.md").read_text()
    assert "| field remark is not used | 3 |" in report
    assert "| not identified (und) | 3 | 100.00% |" in report
    store = RecordStore(tmp_path / "out")
    assert store.orientation == "upright"
    assert [r.source for r in store.records("train")] == ["team"] * 3


def test_killed_and_called_again_it_goes_on(source, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ("pangeains", f"--source={source}", "--workers=2")
    assert call(*arguments, f"--out={whole}").returncode == 0
    command = [sys.executable, str(SCRIPT), *arguments, f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "work/raw.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    done = call(*arguments, f"--out={out}")
    assert done.returncode == 0, done.stderr
    for path in whole.rglob("*"):
        if path.is_file() and path.suffix != ".sqlite":
            other = out / path.relative_to(whole)
            assert other.read_bytes() == path.read_bytes(), path


def test_beam_runner(source, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is an extra: pip install apache-beam")
    out = tmp_path / "out"
    done = call(
        "pangeains",
        f"--source={source}",
        f"--out={out}",
        "--runner=DirectRunner",
        "--direct_num_workers=1",
    )
    assert done.returncode == 0, done.stderr
    assert len(RecordStore(out).records("train")) == 30


def test_beam_runner_without_beam_names_the_remedy(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    common = ("pangeains", f"--source={source}", f"--out={tmp_path / 'out'}")
    assert "pip install apache-beam" in errors(capsys, *common, "--runner=DirectRunner")
