"""A run asks PangeaBench of its own model, on the way and at its end."""

import json

import pytest

from tests.eval.bench.conftest import _write_jsonl, write_little
from tests.launch.conftest import call


@pytest.mark.slow
def test_a_fine_tune_is_asked_on_the_way_and_at_its_end(tmp_path):
    """Also where adapters train on a base in 4 bits."""
    write_little(tmp_path / "data", _write_jsonl)
    done = call(
        "launch/train.py",
        "--config=configs/finetune.py:model=sample,data=emoji,lora=4,weights=int4,validation=0",
        "--config.mixture.num_examples=64",
        "--config.mixture.epochs=1",
        "--config.steps=4",
        "--config.eval.bench.tasks=mgsm_sw,xgqa_de",
        f"--config.eval.bench.data={tmp_path / 'data'}",
        "--config.eval.bench.limit=3",
        "--config.eval.bench.every=2",
        "--config.eval.bench.every_limit=1",
        "--config.eval.bench.max_new_tokens=3",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    splits = json.loads((tmp_path / "run" / "results.json").read_text())["splits"]
    assert splits.keys() == {"mgsm", "xgqa", "average"}
    assert splits["average"]["multilingual"]["n"] == 6
    for task in ("mgsm_sw", "xgqa_de"):
        file = tmp_path / "run" / "pangeabench" / "responses" / f"{task}.jsonl"
        assert len(file.read_text().splitlines()) == 3
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    asked = [line["step"] for line in lines if "bench/xgqa/mul" in line]
    assert asked == [1, 3]
    assert (tmp_path / "run" / "adapter").is_dir() and not (tmp_path / "run" / "model").exists()
