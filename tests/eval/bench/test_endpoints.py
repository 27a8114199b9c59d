"""Models and judges behind an endpoint: what they are asked, and what becomes of a call that fails."""

import http.server
import json
import threading

import pytest

from eval import run
from eval.bench import models


def _results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


class Handler(http.server.BaseHTTPRequestHandler):
    """A chat endpoint that misbehaves as its plan says: a list of statuses, then well."""

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(size))
        with self.server.lock:
            self.server.requests.append(body)
            plan = self.server.plan.pop(0) if self.server.plan else 200
        if plan == "nonsense":
            self._send(200, b"<html>moved</html>", "text/html")
        elif plan == 200:
            text = self.server.answer(body)
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
            }
            reply = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            }
            self._send(200, json.dumps(reply).encode(), "application/json")
        else:
            self._send(plan, b'{"error": {"message": "busy"}}', "application/json")

    def _send(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.requests, server.plan = threading.Lock(), [], []
    server.answer = lambda body: "man"
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_endpoint_model_with_pictures(endpoint, data_dir, tmp_path):
    endpoint.plan = [429, 500]
    flags = ["--tasks=xgqa_de", "--model=openai:m", f"--base_url={endpoint.url}", "--retries=4"]
    assert run.main([*flags, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]) == 0
    assert _results(tmp_path / "out")["tasks"]["xgqa_de"]["fixed"]["score"] == 100
    assert len(endpoint.requests) == 9 + 2
    image, text = endpoint.requests[-1]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "\nWho? Answer the question using a single word or phrase in English."
    assert endpoint.requests[-1]["max_tokens"] == 16
    again = ["--tasks=xgqa_de", "--model=openai:m", f"--base_url={endpoint.url}"]
    run.main([*again, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"])
    assert len(endpoint.requests) == 11  # nothing is asked twice


def test_real_questions_with_several_pictures(endpoint, bench, tmp_path, read_jsonl, write_jsonl):
    rows = []
    for i, question in enumerate(read_jsonl(bench / "mmmu" / "questions.jsonl")):
        images = [question[f"image_{k}"] for k in range(1, 8) if question.get(f"image_{k}")]
        names = ("question", "options", "answer")
        row = {"id": str(i), "question_type": "multiple-choice", "images": images}
        rows.append(row | {name: question[name] for name in names})
    write_jsonl(tmp_path / "data" / "xmmmu" / "en.jsonl", rows)
    (tmp_path / "data" / "xmmmu" / "images").symlink_to(bench / "mmmu" / "images")
    endpoint.answer = lambda body: "The answer is (A)."
    flags = ["--tasks=xmmmu_en", "--model=openai:m", f"--base_url={endpoint.url}"]
    flags += [f"--data_dir={tmp_path / 'data'}", f"--output_path={tmp_path / 'out'}"]
    assert run.main(flags) == 0
    share = 100 * sum(row["answer"] == "A" for row in rows) / len(rows)
    for profile in ("paper", "fixed"):
        score = _results(tmp_path / "out")["tasks"]["xmmmu_en"][profile]["score"]
        assert score == pytest.approx(share)
    shown = [
        part
        for body in endpoint.requests
        for part in body["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    # Every picture once: some stand in the options, some are named nowhere in the text.
    assert len(shown) == sum(len(row["images"]) for row in rows) == 25


def test_an_endpoint_that_fails_costs_only_its_own_documents(endpoint, data_dir, tmp_path, capsys):
    endpoint.plan = [500, "nonsense", 400]
    (data_dir / "xgqa" / "images" / "2.png").write_bytes(b"no picture")
    flags = ["--tasks=xgqa_de", "--model=openai:m", f"--base_url={endpoint.url}", "--retries=0"]
    flags += ["--concurrency=1", f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]
    assert run.main(flags) == 1
    results = _results(tmp_path / "out")
    assert results["tasks"]["xgqa_de"]["fixed"]["n"] == 3
    reasons = " ".join(f["reason"] for f in results["failures"])
    assert "InternalServerError" in reasons and "BadRequestError" in reasons
    assert reasons.count("cannot be decoded") == 3
    assert "6 documents have no score" in capsys.readouterr().out
    assert run.main(flags) == 1  # what failed is asked again
    assert _results(tmp_path / "out")["tasks"]["xgqa_de"]["fixed"]["n"] == 6


def test_a_dead_endpoint(data_dir, tmp_path):
    flags = ["--tasks=mgsm_en", "--model=openai:m", "--base_url=http://127.0.0.1:9/v1"]
    flags += ["--retries=0", "--timeout=2", "--limit=2", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}"]) == 1
    results = _results(tmp_path / "out")
    assert results["tasks"] == {} and len(results["failures"]) == 2


def test_failures_are_told_while_others_are_asked(endpoint, data_dir, tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(run.Console, "print", lambda self, *text, **_: printed.extend(text))
    endpoint.plan = [400, 400]
    flags = ["--tasks=mgsm_en", "--model=openai:m", f"--base_url={endpoint.url}", "--retries=0"]
    flags += ["--concurrency=1", f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]
    assert run.main(flags) == 1
    assert printed[0].startswith("no response: mgsm_en ") and "BadRequestError" in printed[0]
    assert not any(str(text).startswith("no response") for text in printed[1:])


def test_half_a_character_and_an_empty_key(endpoint, data_dir, tmp_path, monkeypatch, read_jsonl):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    endpoint.answer = lambda body: "man \ud83d"
    flags = ["--tasks=xgqa_de", "--model=openai:m", f"--base_url={endpoint.url}", "--retries=0"]
    assert run.main([*flags, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]) == 0
    records = read_jsonl(tmp_path / "out" / "responses" / "xgqa_de.jsonl")
    assert {record["resps"][0][0] for record in records} == {"man \ufffd"}


def test_what_two_runs_at_once_have_asked_counts_once(endpoint, data_dir, tmp_path):
    out = tmp_path / "out"
    flags = ["--tasks=xgqa_de", "--model=openai:m", f"--base_url={endpoint.url}"]
    flags += [f"--data_dir={data_dir}", f"--output_path={out}"]
    assert run.main(flags) == 0
    log = out / "responses" / "xgqa_de.jsonl"
    log.write_text(2 * log.read_text("utf-8"), "utf-8")
    before = _results(out)
    assert run.main(flags) == 0
    assert _results(out) == before and before["documents"] == {"xgqa_de": 9}


def test_chat_endpoints_cannot_do_log_likelihoods(endpoint, data_dir, tmp_path, capsys):
    flags = ["--tasks=xstorycloze_sw", "--model=openai:m", f"--base_url={endpoint.url}"]
    assert run.main([*flags, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]) == 3
    said = capsys.readouterr().out
    assert said.startswith("left out: xstorycloze_sw: it needs log-likelihoods, and this endpoint")
    (probe,) = endpoint.requests
    assert probe["echo"] and probe["logprobs"] == 1


def _judge_flags(data_dir, tmp_path, write_jsonl, judge):
    rows = [
        {"task": "xchat_en", "doc_id": str(i), "response": "This is a red square, I believe."}
        for i in range(4)
    ]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    return [
        "--tasks=xchat_en",
        f"--responses={file}",
        f"--data_dir={data_dir}",
        f"--output_path={tmp_path / 'out'}",
        *judge,
    ]


def test_judge_endpoint_and_its_cache(endpoint, data_dir, tmp_path, write_jsonl):
    endpoint.answer = lambda body: "Fine. [RESULT] 4"
    judge = ["--judge=openai:j", f"--judge_base_url={endpoint.url}"]
    flags = _judge_flags(data_dir, tmp_path, write_jsonl, judge)
    assert run.main(flags) == 0
    assert _results(tmp_path / "out")["datasets"]["xchat"]["fixed"]["en"]["score"] == 75
    # Four documents, but one question: same text, same answer, same rubric.
    assert len(endpoint.requests) == 1
    system, user = endpoint.requests[0]["messages"]
    assert system["content"].startswith("You are a fair judge")
    assert "Score 3: 3" in user["content"] and "red square" in user["content"]
    with (tmp_path / "out" / "judge.jsonl").open("a") as cache:
        cache.write('{"key": "cut sho')  # what a kill in the middle of a write leaves
    assert run.main(["rescore", str(tmp_path / "out"), *judge]) == 0
    assert len(endpoint.requests) == 1


def test_unreadable_judgements_are_failures_not_scores(endpoint, data_dir, tmp_path, write_jsonl):
    endpoint.answer = lambda body: "I would rather not say."
    judge = ["--judge=openai:j", f"--judge_base_url={endpoint.url}"]
    assert run.main(_judge_flags(data_dir, tmp_path, write_jsonl, judge)) == 1
    results = _results(tmp_path / "out")
    assert results["tasks"]["xchat_en"]["fixed"]["score"] is None
    assert results["tasks"]["xchat_en"]["fixed"]["failed"] == 4
    assert len(endpoint.requests) == 3  # tried again before giving up
    assert "en" not in results["datasets"]["xchat"]["fixed"]
    assert "I would rather not say" in results["failures"][0]["reason"]
    rescore = ["rescore", str(tmp_path / "out"), *judge]
    assert run.main(rescore) == 1
    assert len(endpoint.requests) == 6  # by each run
    endpoint.answer = lambda body: "Fine. [RESULT] 4"
    assert run.main(rescore) == run.main(rescore) == 0
    assert len(endpoint.requests) == 7  # and a readable reply is kept
    assert _results(tmp_path / "out")["tasks"]["xchat_en"]["fixed"]["score"] == 75


def test_an_unreadable_reply_that_an_earlier_version_stored_is_asked_for_again(
    endpoint, data_dir, tmp_path, write_jsonl
):
    endpoint.answer = lambda body: "Fine. [RESULT] 4"
    judge = ["--judge=openai:j", f"--judge_base_url={endpoint.url}"]
    flags, cache = (
        _judge_flags(data_dir, tmp_path, write_jsonl, judge),
        tmp_path / "out" / "judge.jsonl",
    )
    assert run.main(flags) == 0
    row = json.loads(cache.read_text("utf-8"))
    write_jsonl(cache, [row | {"reply": "I would rather not say."}])
    assert run.main(flags) == 0
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    "row", [[], {"key": "a"}, {"key": ["a"], "reply": "x"}, {"key": "a", "reply": 5}]
)
def test_a_damaged_cache_of_the_judge_is_named(data_dir, tmp_path, write_jsonl, capsys, row):
    write_jsonl(tmp_path / "out" / "judge.jsonl", [row])
    judge = ["--judge=openai:j", "--judge_base_url=http://127.0.0.1:9/v1"]
    assert run.main(_judge_flags(data_dir, tmp_path, write_jsonl, judge)) == 2
    assert "judge.jsonl, line 1: expected the texts key and reply" in capsys.readouterr().err


def test_replayed_judge_with_a_missing_reply(data_dir, tmp_path, write_jsonl):
    replies = [
        {"task": "xchat_en", "doc_id": str(i), "reply": f"[RESULT] {i + 1}"} for i in range(3)
    ]
    file = write_jsonl(tmp_path / "j.jsonl", replies)
    flags = _judge_flags(data_dir, tmp_path, write_jsonl, [f"--judge=replay:{file}"])
    assert run.main(flags) == 1
    results = _results(tmp_path / "out")
    assert results["tasks"]["xchat_en"]["fixed"]["score"] == pytest.approx(25)
    assert results["failures"][0]["reason"] == "no reply in j.jsonl"


def test_replies_are_texts(data_dir, tmp_path, write_jsonl, capsys):
    file = write_jsonl(tmp_path / "j.jsonl", [{"task": "xchat_en", "doc_id": 0, "reply": 5}])
    assert run.main(_judge_flags(data_dir, tmp_path, write_jsonl, [f"--judge=replay:{file}"])) == 2
    assert "the reply to xchat_en '0' is int, expected a text" in capsys.readouterr().err


def test_stop_strings_are_cut():
    assert models.cut("18\nQuestion: more", ("Question:", "\n")) == "18"
    assert models.cut("18", ()) == "18"
