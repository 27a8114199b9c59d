"""The terminal chat with the sample model, as a process of its own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import pangea_jax
from pangea_jax.sample.sample_store import SampleStore
from tests.launch.conftest import run_interrupted

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def butterfly(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "butterfly.png"
    path.write_bytes(SampleStore().image("twemoji/1f98b"))
    return str(path)


def chat(*flags, lines=()):
    return subprocess.run(
        [sys.executable, "launch/chat.py", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LC_ALL": "C.UTF-8"},
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=300,
    )


def test_one_answer(butterfly):
    done = chat("--model=sample", f"--image={butterfly}", "--prompt=What is this?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "butterfly\n", "")


def test_a_conversation(butterfly):
    lines = [
        f"/image {butterfly}",
        "What is this?",
        "What is this?",  # the picture is still part of what was said
        "/image nowhere.png",
        "/picture x",
        "caf\udce9",  # a byte that is not UTF-8
        "/reset",
        "What is this?",
        "/quit",
        "never read",
    ]
    done = chat("--max_new_tokens=8", lines=lines)
    assert done.returncode == 0
    first, again, blind = done.stdout.splitlines()
    assert first == "butterfly"
    assert again
    assert blind != "butterfly"
    assert done.stderr.splitlines() == [
        "error: there is no file nowhere.png",
        "error: /picture is not a command; the commands are /image FILE, /reset, /quit",
        "error: messages: a text is not Unicode ('utf-8' codec can't encode character '\\udce9' in "
        "position 3: surrogates not allowed)",
    ]


def test_flags_reach_the_engine(butterfly):
    settings = {"temperature": 3.0, "top_p": 0.9, "top_k": 40, "seed": 5, "max_new_tokens": 12}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    done = chat(f"--image={butterfly}", "--prompt=What is this?", "--system=Be odd.", *flags)
    picture = {"type": "image", "image": butterfly}
    asked = [picture, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": asked}]
    (expected,) = pangea_jax.load("sample").generate([messages], **settings)
    assert done.stdout == f"{expected}\n"


def test_a_phone_photograph_is_seen_upright(tmp_path):
    """The model takes this kangaroo for something else if it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing = SampleStore().image("twemoji/1f998")
    (tmp_path / "drawing.png").write_bytes(drawing)
    lying = Image.open(io.BytesIO(drawing)).convert("RGBA").transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "phone.png", exif=exif)
    ask = "--prompt=What is this?"
    upright = chat(f"--image={tmp_path / 'drawing.png'}", ask).stdout
    assert upright == "kangaroo\n"
    assert chat(f"--image={tmp_path / 'phone.png'}", ask).stdout == upright
    stored = chat(f"--image={tmp_path / 'phone.png'}", "--orientation=stored", ask).stdout
    assert stored != upright


def test_ctrl_c_while_the_model_loads_ends_quietly():
    done = run_interrupted("launch/chat.py", "pangea_jax.load", ["--model=sample"])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=nowhere"], "no folder nowhere"),
        (["--image=nowhere.png"], "there is no file nowhere.png"),
        (["--prompt=x", "--top_p=2"], "top_p 2.0 must be within 0 and 1"),
        (["--prompt=x", "--max_new_tokens=600"], "context of 512"),
        (["question"], "unexpected argument 'question'"),
        (["--tempreature=1"], "tempreature"),
        (["--dtype=int7"], "dtype int7"),
        (["--prompt=x", "--system="], "--system is empty"),
    ],
)
def test_errors_are_one_sentence(flags, message):
    done = chat(*flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr
