"""The command itself: it starts, answers, drains at SIGTERM, and says in one sentence what is wrong."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server is in requirements-serve.txt")

import httpx2 as httpx

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PANGEA_API_KEY": ""}
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x y z " * 20}]}


@contextlib.contextmanager
def command(*flags):
    process = subprocess.Popen(
        [sys.executable, "launch/serve.py", *flags],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_an_answer_end():
    with command("--name=tiny", "--port=0", "--max_prompt=256", "--max_tokens=64") as process:
        line = process.stdout.readline()
        assert line.startswith("tiny is served at http://127.0.0.1:"), process.stderr.read()
        url = line.split()[-1]
        lines = []
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=300
        ) as reply:
            found = reply.iter_lines()
            lines.append(next(found))
            process.send_signal(signal.SIGTERM)
            lines += found
        assert lines[-2] == "data: [DONE]"
        threading.Timer(60, process.kill).start()
        assert process.wait() == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=nowhere"], "no folder nowhere"),
        (["--host=192.0.2.1"], "give another --port or --host"),
        (["--api_key_file=/dev/null"], "holds no key"),
    ],
)
def test_errors_are_one_sentence(flags, message):
    with command("--port=0", *flags) as process:
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert out == ""
    assert errors.startswith("error: ") and message in errors
    assert "Traceback" not in errors
