"""Every benchmark runs to its end. Models and data are so small that the figures mean nothing."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    attention,
    curation,
    decode,
    estimate,
    full_size,
    input_pipeline,
    peer,
    sample_records,
    sample_run,
    sample_step,
)
from configs import pangea_7b_finetune

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny_peer(monkeypatch):
    """A narrow model of a few layers replaces that of 50 million parameters. The figures of the machine are fixed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    vision = dict(width=32, layers=2, heads=2, mlp=32)
    language = dict(width=32, layers=1, heads=4, head_width=8, mlp=32)
    config = dataclasses.replace(
        peer.CONFIG,
        vision=dataclasses.replace(peer.CONFIG.vision, **vision),
        language=dataclasses.replace(peer.CONFIG.language, **language),
    )
    monkeypatch.setattr(peer, "CONFIG", config)
    monkeypatch.setattr(decode, "NEW", 8)
    monkeypatch.setattr(peer.make_pair, "__defaults__", (config, peer.TOKENS))
    monkeypatch.setattr(peer, "matmul_flops", lambda: 1e9)
    monkeypatch.setattr(peer, "read_bandwidth", lambda: 1e9)


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls main() of a module with a command line and returns what it printed."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        return capsys.readouterr().out

    return run


def test_forward(tiny_peer, run):
    from benchmarks import forward

    said = run(forward, "--repetitions=1")
    assert "prefill, 1 row" in said and "train step, 4 rows" in said
    ours, theirs = said.split("loss ")[1].splitlines()[0].split(", transformers ")
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_train_step(tiny_peer, run):
    from benchmarks import train_step

    said = run(train_step, "--conversations=4", "--repetitions=1")
    assert said.count("useful tokens/s") == 4 and said.count("times as fast") == 4


def test_decode(tiny_peer, run):
    said = run(decode, "--repetitions=1")
    assert said.count("8 tokens a row are the same") == 2
    assert "a token reads" in said


def test_decode_alone(tiny_config, capsys):
    decode.alone(tiny_config, repetitions=1, rows=(1, 2), words=8)
    assert capsys.readouterr().out.count("tokens/s") == 2


def test_evaluate(tiny_peer, run):
    from benchmarks import evaluate

    said = run(evaluate, "--documents=3", "--new_tokens=2", "--questions=1")
    assert "3 of 3 answers are the same" in said


def test_serve(tiny_peer, run):
    from benchmarks import serve

    said = run(serve, "--requests=1", "--rows=1", "--clients=1")
    assert "server, 1 clients" in said and "first token" in said and "transformers, batches" in said


def test_attention(run):
    said = run(
        attention, "--impls=xla,blockwise", "--row_tokens=256", "--rows=1", "--repetitions=1"
    )
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["xla", "blockwise"]
    assert float(said.split()[-1]) < 0.02


def test_estimate_ranks_pairs():
    times = np.array([[1.0, 2.0], [2.0, 2.05], [4.0, 3.0], [3.0, 5.0]])
    assert estimate.ranked(times, 0.0) == (5, 6)
    assert estimate.ranked(times, 0.05) == (4, 5)


def test_input_pipeline(run):
    """The peer runs too if its libraries and a vocabulary of the Qwen family are there."""
    tokenizer = ROOT.parent / "shared/data/tokenizer_qwen3"
    peer_too = tokenizer.is_dir() and importlib.util.find_spec("transformers")
    flags = (f"--tokenizer={tokenizer}", "--image_id=151655") if peer_too else ()
    said = run(input_pipeline, *flags, "--workers=0", "--seconds=1", "--examples=20")
    assert "64 records generated" in said and ("ratio " in said) == bool(peer_too)
    assert "8192" in said and "resident memory" in said


def test_sample_records(run):
    said = run(sample_records, "--examples=40", "--two_pictures=1")
    assert "two pictures" in said and "one picture" not in said
    assert said.count("tokens a name") == 2


def test_sample_step(run):
    said = run(sample_step, "--steps=2", "--point=num_examples=256")
    assert "64 conversations a step" in said and "step / products" in said


def test_curation(run):
    said = run(curation, "--rows=20", "--hashes=1000")
    for part in ("rules, Parquet", "tar, all of the part", "pictures, ours", "comparing texts"):
        assert part in said


def test_full_size(tiny_config, emoji_tokenizer, tmp_path, capfd):
    language = dataclasses.replace(
        tiny_config.language, vocab_size=emoji_tokenizer.vocab_size, max_positions=8192
    )
    folder = tmp_path / "full"
    full_size.write(folder, dataclasses.replace(tiny_config, language=language))
    full_size.convert(folder)
    assert "every tensor byte-equal" in capfd.readouterr().out
    full_size.forward(folder, weights="int8")
    said = capfd.readouterr().out
    assert "weights int8" in said and "compiled: first token after" in said


def test_sample_run(run):
    said = run(sample_run, "--config=tests/launch/tiny.py:steps=2")
    assert "wall time" in said and "train step" in said


def test_the_script_for_a_gpu_is_right():
    """The script needs a GPU. This test checks its syntax, time limits and config keys."""
    script = ROOT / "benchmarks/on_gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck:
        subprocess.run([shellcheck, script], check=True)
    text = script.read_text()
    for module in ("attention", "decode", "mfu"):
        assert f" benchmarks.{module}" in text
    seconds = [int(line.split()[2]) for line in text.splitlines() if line.startswith("part ")]
    assert len(seconds) == 5 and sum(seconds) <= 600
    config = pangea_7b_finetune.get_config()
    for key in re.findall(r"--config\.([\w.]+)=", text):
        part, _, leaf = key.rpartition(".")
        assert leaf in (config[part] if part else config), key


def test_every_benchmark_is_called_here_and_in_the_documentation():
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "peer"}
    here = Path(__file__).parent
    tests = "".join(path.read_text() for path in here.glob("test_*.py"))
    told = (ROOT / "docs/benchmarks.md").read_text()
    assert {name for name in names if name not in tests} == set()
    assert {name for name in names if f"python -m benchmarks.{name}" not in told} == set()
