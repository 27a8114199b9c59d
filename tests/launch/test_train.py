"""The main command as a user runs it, in a process of its own, for a few steps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import pangea_jax
from configs import sample
from launch import common
from pangea_jax.experiment import Experiment
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.sample.scores import BLIND, SCORES
from pangea_jax.typed_config import build
from pangea_jax.work.restart import WorkError
from tests.conftest import simulated_devices

ROOT = Path(__file__).parents[2]
# 12 steps of 16 examples, checkpoints every 4, a handful of questions.
SHORT = (
    "--config.mixture.num_examples=192",
    "--config.pipeline.rows=4",
    "--config.pipeline.row_tokens=288",
    "--config.pipeline.max_targets=128",
    "--config.augmented_views=1",
    "--config.checkpoint.every=4",
    "--config.log_every=2",
    "--config.eval.limit=4",
)
COMMAND = (sys.executable, "launch/train.py", "--config=configs/ablate_en_ratio.py")
# What other requirements files bring, and the tests' environment has. The main job does without.
OTHERS = (
    *("regex", "sacrebleu", "langdetect", "py3langid", "openai", "datasets", "apache_beam"),
    *("imagehash", "rensa", "protego", "fastapi", "uvicorn", "prometheus_client", "gcsfs"),
    *("torch", "transformers", "peft", "babel", "resvg_py"),
)
ALONE = f"""
import importlib.machinery, runpy, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        return None if name.partition(".")[0] in {OTHERS} else super().find_spec(name, *more)
places = importlib.machinery.PathFinder
sys.meta_path[:] = [Finder if finder is places else finder for finder in sys.meta_path]
sys.path.insert(0, ".")
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""
MAIN_JOB_ALONE = (sys.executable, "-c", ALONE, COMMAND[-1])


def start(*flags, command=COMMAND, devices=1, **kwargs):
    environment = dict(os.environ, XLA_FLAGS=simulated_devices(devices))
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def run(*flags, **kwargs):
    """(exit code, standard output, standard error) of the command."""
    process = start(*flags, **kwargs)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open(encoding="utf-8")]
    return {
        line["step"]: (line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory and output of one uninterrupted short run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    code, out, err = run(f"--workdir={workdir}", *SHORT, command=MAIN_JOB_ALONE)
    assert code == 0, err[-3000:]
    return workdir, out


def test_its_model_answers(finished):
    """The folder holds weights, sizes and tokenizer."""
    workdir, _ = finished
    model = pangea_jax.load(workdir / "model")
    assert model.reader.policy.background == (255, 255, 255)  # as the config says
    assert model.reader.policy == pangea_jax.load(workdir).reader.policy
    picture = {"type": "image", "image": SampleStore().image("noto/1f98b")}
    message = {"role": "user", "content": [picture, {"type": "text", "text": "Hii ni nini?"}]}
    assert isinstance(model.generate([[message]], max_new_tokens=4)[0], str)


def test_writes_what_it_promises(finished):
    workdir, out = finished
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    assert set(results["splits"]) == {"seen_artwork", "unseen_artwork"}
    for split in results["splits"].values():
        assert set(split["languages"]) == {"en", "es", "sw", "ru", "ar", "hi", "zh", "ko"}
        for scores in (split["english"], split["multilingual"], *split["languages"].values()):
            names = {prefix + score.metric for score in SCORES for prefix in ("", BLIND)}
            assert set(scores) == names | {"n"}
            assert all(0 <= scores[name] <= 1 for name in names)
        assert split["languages"]["sw"]["n"] == 4
        assert split["multilingual"]["n"] == 28
    mixture = results["mixture"]
    assert abs(mixture["examples_per_language"]["en"] - 0.4 * 192) < 1
    assert sum(mixture["examples_per_language"].values()) == 192
    assert results["steps"] == 12
    assert sorted(metrics(workdir)) == [1, 3, 5, 7, 9, 11]
    for figure in ("loss", "languages", "tasks", "sheet"):
        assert (workdir / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (workdir / f"{figure}.svg").read_text(encoding="utf-8")[:2000]
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((workdir / "config.json").read_text())["mixture"]["en_ratio"] == 0.4
    assert "English" in out
    assert "12/12" in out


def test_the_loss_falls(finished):
    losses = [loss for loss, *_ in metrics(finished[0]).values()]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path):
    """After Ctrl-C the run says how to continue. Then losses and weights are the same, bit for bit."""
    workdir = tmp_path / "run"
    process = start(f"--workdir={workdir}", *SHORT)
    path = workdir / "metrics.jsonl"
    deadline = time.time() + 300
    while time.time() < deadline and not (path.exists() and path.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err[-3000:]
    assert "the same command continues" in err
    saved = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    assert 0 < saved < 12
    code, _, err = run(f"--workdir={workdir}", *SHORT)
    assert code == 0, err[-3000:]
    assert f"resumed from step {saved} of 12" in err
    assert_same_run(finished[0], workdir)


def assert_same_run(one, other):
    ours, theirs = metrics(one), metrics(other)
    # A log line is an average since the last one. The first line after a resume may cover fewer steps.
    common = [step for step in ours if ours[step] == theirs.get(step)]
    assert 11 in common
    for name, value in load_file(one / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(other / "model" / "model.safetensors")[name], value)
    splits = [json.loads((w / "results.json").read_text())["splits"] for w in (one, other)]
    assert splits[0] == splits[1]


@pytest.mark.slow
def test_eight_devices_equal_one(finished, tmp_path):
    workdir = tmp_path / "run"
    code, _, err = run(f"--workdir={workdir}", *SHORT, devices=8)
    assert code == 0, err[-3000:]
    assert "'fsdp': 8" in err
    one, eight = metrics(finished[0]), metrics(workdir)
    for step, values in one.items():
        np.testing.assert_allclose(eight[step], values, rtol=2e-4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--config.optimizer.learning_rat=1"],
            "error: config.optimizer.learning_rat is an unknown key; did you mean 'learning_rate'?",
        ),
        (
            ["--config=configs/sample.py", "--config.eval.questions=1"],
            "error: config.eval.questions is an unknown key; known are batch_size, bench,",
        ),
        (["--config=configs/ablate_en_ratio.py:en_ration=0.5"], "did you mean 'en_ratio'"),
        (["--config=configs/ablate_en_ratio.py:scale=huge"], "not one of ('sample', 'pangea_0_5b'"),
        (["--config=configs/ablate_en_ratio.py:en_ratio=1.5"], "must be in [0, 1]"),
        (["--config=configs/no_such.py"], "no_such.py"),
        (["--config.mesh.data=3"], "does not fill the 1 devices"),
        (["--config.seed=None"], "error: config.seed is None; expected int"),
        (["--config.mixture.sources=None"], "error: config.mixture.sources names no artist"),
        (["--workdir=README.md/run"], "cannot write to README.md/run"),
        (["--config.steps=0"], "config.steps is 0; expected a number of 1 or more"),
        (["--config.steps=9999"], "make 750 steps of 16 rows, not 9999"),
        (["--profile=9:3"], "expected START:STOP, such as 20:25"),
    ],
)
def test_bad_input_is_one_sentence(flags, says, tmp_path):
    workdir = [] if any("workdir" in flag for flag in flags) else [f"--workdir={tmp_path / 'run'}"]
    code, _, err = run(*workdir, *flags)
    assert code == 1
    assert says in err
    assert "Traceback" not in err


def test_a_corrupt_file_is_named(tmp_path):
    store = tmp_path / "emoji"
    shutil.copytree(ROOT / "pangea_jax" / "assets" / "emoji", store)
    file = store / "tokenizer.model"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    flags = (f"--workdir={tmp_path / 'run'}", f"--config.data.store={store}", "--config.eval=None")
    code, _, err = run(*flags)
    assert code == 1
    assert file.name in err
    assert "Traceback" not in err
    file.unlink()
    code, _, err = run(*flags)
    assert code == 1
    assert file.name in err


def test_refuses_the_work_directory_of_another_config(finished):
    code, _, err = run(f"--workdir={finished[0]}", *SHORT, "--config.seed=7")
    assert code == 1
    assert "another config (seed is 0 there and 7 here" in err


def test_a_config_that_was_refused_leaves_the_work_directory_free(tmp_path):
    """After a refusal, the same folder can be used with another config, until a run has begun in it."""
    config, workdir = sample.get_config(), tmp_path / "run"
    for config.steps in (9999, 50):
        common.claim_workdir(workdir, build(Experiment, config))
    assert json.loads((workdir / "config.json").read_text())["steps"] == 50
    (workdir / "starts.jsonl").touch()
    config.steps = 60
    with pytest.raises(WorkError, match="steps is 50 there and 60 here"):
        common.claim_workdir(workdir, build(Experiment, config))


def test_a_run_may_continue_with_settings_that_change_no_step(tmp_path):
    config = sample.get_config()
    common.claim_workdir(tmp_path, build(Experiment, config))
    (tmp_path / "starts.jsonl").touch()
    config.update(keep="attention", accumulation=2, log_every=5)
    config.mesh.tensor, config.pipeline.threads, config.checkpoint.every = 2, 3, 50
    common.claim_workdir(tmp_path, build(Experiment, config))
    config.pipeline.rows = 4
    with pytest.raises(WorkError, match=r"config \(pipeline\.rows is 16 there and 4 here\)"):
        common.claim_workdir(tmp_path, build(Experiment, config))
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["tensor"] == 2


@pytest.mark.parametrize(
    "key", ["steps", "log_every", "accumulation", "checkpoint.every", "checkpoint.keep"]
)
def test_a_count_of_none_is_an_error(key):
    config = sample.get_config()
    config.update_from_flattened_dict({key: 0})
    with pytest.raises(ValueError, match=rf"config\.{key} is 0; expected a number of 1"):
        build(Experiment, config)


def test_an_unknown_key_is_an_error(tmp_path):
    """A command line cannot set what a config does not have; a config file can hold anything."""
    for line, says in (
        ("config.log_evry = 3", "config.log_evry is an unknown key; did you mean 'log_every'?"),
        ("config.pipeline.row = 3", "config.pipeline.row is an unknown key; did you mean 'rows'?"),
        ("config.eval.limt = 3", "config.eval.limt is an unknown key; did you mean 'limit'?"),
    ):
        text = f"from configs import sample\ndef get_config():\n  config = sample.get_config()\n  {line}\n"
        (tmp_path / "mine.py").write_text(text + "  return config\n")
        code, _, err = run(f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'mine.py'}")
        assert code == 1
        assert says in err
        assert "Traceback" not in err


def test_a_flag_can_set_none(tmp_path):
    """ml_collections cannot; without an evaluation there are no scores."""
    flags = ("--config.augmented_views=1", "--config.steps=1", "--config.eval=None")
    code, _, err = run(f"--workdir={tmp_path}", "--config.reading.background=None", *flags)
    assert code == 0, err[-3000:]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eval"] is None and config["reading"]["background"] is None
    assert json.loads((tmp_path / "results.json").read_text())["splits"] == {}


def test_a_second_run_in_a_work_directory_is_refused_at_its_start(tmp_path):
    with common.only_run(tmp_path / "run"):
        code, _, err = run(f"--workdir={tmp_path / 'run'}", *SHORT)
    assert code == 1
    assert f"another process is writing {tmp_path / 'run'}; wait until it ends" in err
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {common.LOCK, common.attempts.FILE}  # those of the first
    # The lock that a killed run has left behind holds nobody up.
    with common.only_run(tmp_path / "run"):
        pass
