"""`fetch` through the clients of the hub, against a hub on this machine."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.bench import tasks
from eval.bench.documents import load
from tests.eval.bench import hub

ROOT = Path(__file__).resolve().parents[3]
XGQA, MGSM, MARVL = "neulab/PangeaBench-xgqa", "juletxara/mgsm", "neulab/PangeaBench-marvl"
XM100 = "neulab/PangeaBench-xm100"
MGSM_CARD = """---
configs:
- config_name: te
  data_files:
  - split: test
    path: te/test-*.parquet
---
"""


@pytest.fixture(scope="module")
def repositories():
    """Small ones in the layouts of the hub: splits as files, configurations of a card, pictures in Parquet."""
    datasets = pytest.importorskip("datasets", reason="datasets is in requirements-eval.txt")
    datasets.disable_progress_bars()
    text, encoded = datasets.Value("string"), io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(encoded, "PNG")
    picture = {"bytes": encoded.getvalue(), "path": None}

    def parquet(rows: int, **columns) -> bytes:
        values = {"string": "x", "int32": 2}
        row = {
            name: picture if isinstance(kind, datasets.Image) else values[kind.dtype]
            for name, kind in columns.items()
        }
        stored = datasets.Dataset.from_list([row] * rows, features=datasets.Features(columns))
        file = io.BytesIO()
        stored.to_parquet(file)
        return file.getvalue()

    image = datasets.Image()
    asked = parquet(3, question=text, answer=text, image=image)
    solved = parquet(4, question=text, answer=text, answer_number=datasets.Value("int32"))
    stated = parquet(2, hypothesis=text, label=text, image=image)
    captioned = parquet(1, image_id=text, caption=text, image=image)
    return {
        XGQA: {"data/bn-00000-of-00001.parquet": asked},
        MGSM: {"README.md": MGSM_CARD.encode(), "te/test-00000-of-00001.parquet": solved},
        MARVL: {"data/sw-00000-of-00001.parquet": stated},
        XM100: {"data/sw-00000-of-00001.parquet": captioned},
        # With a script of its own, and the hub's conversion of what it makes.
        "juletxara/xstory_cloze": {
            "xstory_cloze.py": b"raise SystemExit",
            "sw/eval/0000.parquet": parquet(
                1,
                **{f"input_sentence_{i}": text for i in range(1, 5)},
                sentence_quiz1=text,
                sentence_quiz2=text,
                answer_right_ending=datasets.Value("int32"),
            ),
        },
    }


def _fetch(url: str, names: str, folder: Path) -> tuple[int, str]:
    """Exit code and output of the command; the clients read the hub's address when they are imported."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "cache"), "COLUMNS": "200"}
    command = [sys.executable, "eval/run.py", "fetch", f"--tasks={names}", f"--data_dir={folder}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def _documents(name: str, folder: Path) -> list[dict]:
    (task,) = tasks.select([name])
    return [dict(document.row) for document in load(task, folder)]


def test_tasks_come_from_the_hub(repositories, tmp_path):
    """Pictures, a configuration of a card, a connection that is lost on the way."""
    with hub.serve(repositories) as server:
        server.drops[XGQA] = 2
        code, output = _fetch(server.url, "xgqa_bn,mgsm_te", tmp_path)
        assert code == 0, output
        assert server.drops[XGQA] == 0
    assert [row["answer"] for row in _documents("mgsm_te", tmp_path)] == ["2"] * 4
    rows = _documents("xgqa_bn", tmp_path)
    assert len(rows) == 3 and len({row["images"][0] for row in rows}) == 1
    picture = Image.open(tmp_path / "xgqa" / rows[0]["images"][0])
    assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.slow
def test_what_fails_costs_only_its_own_task(repositories, tmp_path):
    """No repository, a hub that answers 500, a connection that is always lost; a script, whose conversion is read.
    The same command goes on later with what is missing."""
    names = "xstorycloze_sw,maxm_en,marvl_sw,xm100_sw,mgsm_te"
    with hub.serve(repositories) as server:
        server.failing[MARVL], server.drops[XM100] = 500, 1000
        code, output = _fetch(server.url, names, tmp_path)
        assert code == 1
        lines = {line.partition(":")[0]: line for line in output.splitlines()}
        assert lines["mgsm_te"] == "mgsm_te: 4 documents"
        assert lines["xstorycloze_sw"] == "xstorycloze_sw: 1 documents"
        assert "neulab/PangeaBench-maxm" in lines["maxm_en"]
        assert MARVL in lines["marvl_sw"] and "HTTP Error 500" in output
        assert XM100 in lines["xm100_sw"] and "documents" not in lines["xm100_sw"]
        assert sorted(path.name for path in tmp_path.glob("*/*.jsonl")) == ["sw.jsonl", "te.jsonl"]
        assert not list(tmp_path.glob("*/*.partial"))
        server.failing.clear()
        server.drops.clear()
        server.asked.clear()
        code, output = _fetch(server.url, names.replace("maxm_en,", ""), tmp_path)
        assert code == 0, output
        assert "mgsm_te: there already" in output and "marvl_sw: 2 documents" in output
        assert not any(MGSM in path for _, path in server.asked)
    assert len(_documents("xm100_sw", tmp_path)) == 1
