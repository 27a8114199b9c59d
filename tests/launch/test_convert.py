"""`launch/convert.py` as a user runs it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pangea_jax import checkpoints
from pangea_jax.checkpoints import SpecialTokens
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.model import LoraConfig
from pangea_jax.model.params import flatten
from pangea_jax.sample import emoji
from tests.checkpoints.tiny import random_state, with_language, write_run
from tests.launch.conftest import call, run_interrupted

ROOT = Path(__file__).parents[2]
CONFIG = with_language(vocab_size=5200)


def convert(*flags):
    """(exit code, standard output, standard error)."""
    done = call("launch/convert.py", *flags, timeout=300, HF_HUB_OFFLINE="1")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    state = random_state(CONFIG, dtype=jnp.bfloat16)
    tokenizer = load_tokenizer(emoji.DIRECTORY)
    tokens = SpecialTokens.of(tokenizer)
    checkpoints.save(state, CONFIG, folder, tokens=tokens)
    (folder / "tokenizer.model").write_bytes((emoji.DIRECTORY / emoji.TOKENIZER).read_bytes())
    return folder


def test_there_and_back(public, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    code, out, err = convert(f"--from={public}", f"--to={ours}")
    assert code == 0, err
    assert str(ours) in out
    code, _, err = convert(f"--from={ours}", f"--to={back}", "--format=hf", "--dtype=float32")
    assert code == 0, err
    assert "AutoProcessor cannot be used" in " ".join(err.split())
    first, second = (load_file(path / "model.safetensors") for path in (public, back))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value.astype(np.float32), err_msg=name)
    assert load_tokenizer(back).encode("cat") == load_tokenizer(public).encode("cat")


def test_a_home_folder_is_written_as_shells_leave_it(public, tmp_path, monkeypatch):
    """Shells do not expand the ~ in `--to=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "source").symlink_to(public)
    code, _, err = convert("--from=~/source", "--to=~/out", "--format=hf")
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (ROOT / "~").exists()


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_ctrl_c_speaks_of_the_conversion(public, tmp_path, form):
    """The message is about the conversion, not about training."""
    flags = f"--from={public}", f"--to={tmp_path / 'out'}", f"--format={form}"
    done = run_interrupted("launch/convert.py", "pangea_jax.checkpoints.resolve", flags)
    assert (done.returncode, done.stdout) == (130, "")
    assert "repeat the command" in done.stderr
    assert "trained" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "base"), [((), None), (("--base=owner/name",), "owner/name")], ids=["none", "named"]
)
def test_adapters_name_the_model_under_them(tmp_path, flags, base):
    config = with_language(lora=LoraConfig(rank=2))
    (tmp_path / "run").mkdir()
    run = write_run(tmp_path / "run", config, flatten(random_state(config)))
    code, _, err = convert(f"--from={run}", f"--to={tmp_path / 'out'}", "--format=peft", *flags)
    assert code == 0, err
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == base


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to=x",), "expected --from=DIR|owner/name and --to=DIR"),
        (("--from=nowhere", "--to=x"), "there is no folder nowhere"),
        (("--from=sample", "--to=x"), "launch/train.py writes a model like it"),
        (
            ("--from={public}", "--to=x", "--layout=transformers-5"),
            "--layout is only for --format=hf",
        ),
        (("--from={public}/model.safetensors", "--to=x"), "no config.json in"),
        (("--from=owner/name", "--to=x"), "could not be downloaded from the Hugging Face hub"),
        (("--from={public}", "--to={public}"), "is there already"),
        (("--from={empty}", "--to=x"), "no config.json"),
        (("--from={public}", "--to=x", "--format=onnx"), "onnx"),
        (("--from={public}", "--to=x", "--tokenizer={empty}"), "no tokenizer: looked for"),
        (("--from={public}", "--to=x", "--format=peft"), "is no training run with adapters"),
        (
            ("--from={public}", "--to=x", "--format=peft", "--dtype=float32"),
            "takes neither --dtype",
        ),
        (
            ("--from={public}", "--to=x", "--base=owner/name"),
            "is a whole model, so it takes no base",
        ),
    ],
)
def test_mistakes_are_one_sentence(public, tmp_path, flags, message):
    code, out, err = convert(*(flag.format(public=public, empty=tmp_path) for flag in flags))
    assert code == 1
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert not (ROOT / "x").exists()
