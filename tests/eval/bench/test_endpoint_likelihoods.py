"""Log-likelihoods of an endpoint that echoes: equal to those of our own checkpoint path on the sample model."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest

import pangea_jax
from eval import run
from eval.bench import models
from eval.bench.checkpoint_model import CheckpointModel
from eval.bench.endpoint import Endpoint
from eval.bench.task import Failed

# Without a space between prompt and choice, the choice's first letters change the prompt's last token.
JOINED = """task: joined
language: en
dataset_kwargs: {data_files: joined.jsonl}
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
output_type: multiple_choice
target_delimiter: ""
"""
ROWS = [
    {"question": "The cat is un", "choices": ["der the table", "happy", "s"], "answer": 0},
    {"question": "Ni p", "choices": ["aka mweusi", "icha"], "answer": 1},
    {"question": "猫は", "choices": ["黒い", "です"], "answer": 0},
]


@pytest.fixture(scope="module")
def engine():
    return pangea_jax.load("sample", dtype="float32")


@functools.cache
def _log_probabilities(engine, text):
    """(of each token after those before it and of the likeliest next one, that one)."""
    logits = np.asarray(engine.logits(text), np.float64)
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    new = int(logits[-1].argmax())
    ids = [*engine.tokenizer.encode(text)[1:], new]
    return [None, *(float(logs[i, token]) for i, token in enumerate(ids))], new


class Handler(http.server.BaseHTTPRequestHandler):
    """`/v1/completions` as vLLM answers it, or with a fault; `/v1/chat/completions` says "2"."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            reply = self._completion(body) if self.path == "/v1/completions" else self._chat()
        status = 400 if reply is None else 200
        content = json.dumps(reply or {"error": {"message": "echo is not supported"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _chat(self):
        message = {"role": "assistant", "content": "The answer is 2."}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
        }

    def _completion(self, body):
        text, kind = body["prompt"], self.server.kind
        if kind == "refuses" or not body.get("echo") or body["max_tokens"] != 1:
            return None
        engine, tokens = self.server.engine, self.server.engine.tokenizer.encode(text)
        values, new = _log_probabilities(engine, text)
        pieces = [engine.tokenizer.decode([token]) for token in (*tokens, new)]
        offsets = np.cumsum([0, *map(len, pieces[:-1])]).tolist()
        if kind == "no echo":
            values, pieces, offsets, text = values[-1:], pieces[-1:], [0], ""
        logprobs = {"tokens": pieces, "token_logprobs": values, "text_offset": offsets}
        logprobs["top_logprobs"] = [{} for _ in values]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "text": text + pieces[-1],
            "logprobs": logprobs,
        }
        reply = {
            "id": "1",
            "object": "text_completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
        }
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": 1,
            "total_tokens": len(tokens) + 1,
        }
        return reply if kind == "no usage" else reply | {"usage": usage}

    def log_message(self, *args):
        pass


@pytest.fixture
def server(engine):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.lock, made.asked, made.kind, made.engine = threading.Lock(), [], "whole", engine
    made.url = f"http://127.0.0.1:{made.server_address[1]}/v1"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def _responses(folder, task, read_jsonl):
    rows = read_jsonl(folder / "samples" / f"{task}.jsonl")
    return {row["doc_id"]: row["resps"][0][0] for row in rows}


@pytest.mark.parametrize("kind", ["whole", "no usage"])
def test_they_equal_those_of_our_own_checkpoint(
    server, engine, kind, data_dir, tmp_path, write_jsonl, read_jsonl, monkeypatch
):
    server.kind = kind
    (tmp_path / "joined.yaml").write_text(JOINED, "utf-8")
    write_jsonl(tmp_path / "joined.jsonl", ROWS)
    changed = [
        row["question"]
        for row in ROWS
        for choice in row["choices"]
        if engine.tokenizer.encode(row["question"] + choice)[
            : len(engine.tokenizer.encode(row["question"]))
        ]
        != engine.tokenizer.encode(row["question"])
    ]
    assert changed, "no choice changes its prompt's tokens, so the test shows nothing"
    flags = [f"--include={tmp_path / 'joined.yaml'}", "--tasks=joined,xstorycloze_sw"]
    flags += [f"--data_dir={data_dir}", "--name=both", "--timeout=900"]
    there = [
        *flags,
        f"--output_path={tmp_path / 'there'}",
        "--model=openai:m",
        f"--base_url={server.url}",
    ]
    assert run.main(there) == 0
    monkeypatch.setattr(run, "_open_model", lambda args: CheckpointModel(engine, "sample"))
    assert run.main([*flags, f"--output_path={tmp_path / 'here'}", "--model=sample"]) == 0
    for task, count in (("joined_en", 3), ("xstorycloze_sw", 4)):
        found, wanted = (_responses(tmp_path / f, task, read_jsonl) for f in ("there", "here"))
        assert len(wanted) == count and found.keys() == wanted.keys()
        for doc_id, values in wanted.items():
            np.testing.assert_allclose(found[doc_id], values, rtol=0, atol=1e-4)
            assert len({*values}) == len(values)
    results = [json.loads((tmp_path / f / "results.json").read_text()) for f in ("there", "here")]
    assert results[0]["tasks"] == results[1]["tasks"]
    assert "acc_norm" in results[0]["tasks"]["joined_en"]["fixed"]["metrics"]


@pytest.mark.parametrize("kind", ["refuses", "no echo"])
def test_tasks_are_left_out_before_anything_is_asked(server, kind, data_dir, tmp_path, capsys):
    server.kind, out = kind, tmp_path / "out"
    flags = ["--tasks=mgsm_en,xstorycloze_sw", f"--data_dir={data_dir}", "--limit=3"]
    flags += [f"--output_path={out}", "--model=openai:m", f"--base_url={server.url}"]
    assert run.main(flags) == 3
    said = capsys.readouterr().out
    assert said.startswith("left out: xstorycloze_sw: it needs log-likelihoods")
    paths = [path for path, _ in server.asked]
    assert paths == ["/v1/completions"] + ["/v1/chat/completions"] * 3
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert list(results["documents"]) == ["mgsm_en"] and not results["failures"]
    for page in ("report.md", "report.html"):
        assert "xstorycloze_sw was left out: it needs log-likelihoods" in (out / page).read_text(
            "utf-8"
        )
    assert run.main(["rescore", str(out)]) == 3
    assert run.main([*flags, "--tasks=mgsm_en"]) == 0
    assert len(server.asked) == 4  # no task needs log-likelihoods, so there is no probe


def test_pictures_and_broken_replies(server, monkeypatch):
    model = models.EndpointModel(Endpoint("m", server.url, retries=0))
    assert len(model._endpoint.echo("Nairobi is")) > 1
    for values in ([None, "x", -1.0], [None], [None, -1.0, -2.0, -3.0, -4.0], []):

        def reply(self, body, values=values):
            choice = {"index": 0, "finish_reason": "length", "text": "x"}
            choice["logprobs"] = {"token_logprobs": values}
            return {"choices": [choice], "usage": {"prompt_tokens": 2}}

        monkeypatch.setattr(Handler, "_completion", reply)
        assert isinstance(model._endpoint.echo("Nairobi is"), Failed)


def test_a_dead_endpoint_is_no_reason_to_leave_tasks_out(data_dir, tmp_path, capsys):
    flags = ["--tasks=xstorycloze_sw", "--model=openai:m", "--base_url=http://127.0.0.1:9/v1"]
    flags += ["--retries=0", "--timeout=2", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}"]) == 2
    assert "no answer from m: endpoint: API" in capsys.readouterr().err
