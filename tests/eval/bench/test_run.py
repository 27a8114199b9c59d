"""The command: responses kept and asked once, judges, failures counted, reports that show the scores."""

import http.server
import json
import random
import threading

import pytest
from PIL import Image

from eval import bench_report, models, run, runner, tasks
from eval.data import DataError, load

NUMBERS = range(30)


@pytest.fixture
def data_dir(tmp_path, write_jsonl):
    """A little of MGSM, xGQA, XStoryCloze and xChat, with pictures."""
    folder = tmp_path / "data"
    for code, label in (("en", "How many?"), ("sw", "Ngapi?"), ("bn", "কত?")):
        rows = [{"id": str(i), "question": f"{label} {'x' * i}", "answer": str(i)} for i in NUMBERS]
        write_jsonl(folder / "mgsm" / f"{code}.jsonl", rows)
    for i in range(3):
        (folder / "xgqa" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / "xgqa" / "images" / f"{i}.png")
    rows = [
        {"id": str(i), "question": "Who?", "answer": "man", "images": [f"images/{i % 3}.png"]}
        for i in range(9)
    ]
    write_jsonl(folder / "xgqa" / "de.jsonl", rows)
    story = {"sentences": ["A.", "B.", "C.", "D."], "endings": ["one", "two"], "answer": 1}
    write_jsonl(folder / "xstorycloze" / "sw.jsonl", [{"id": str(i)} | story for i in range(4)])
    rubric = {"criteria": "Is it good?"} | {f"score{i}_description": str(i) for i in range(1, 6)}
    row = {
        "system_prompt": "Help.",
        "input": "What?",
        "reference_answer": "That.",
        "rubric": rubric,
    }
    (folder / "xchat").mkdir()
    (folder / "xchat" / "images").symlink_to(folder / "xgqa" / "images")
    rows = [{"id": str(i), "images": ["images/0.png"]} | row for i in range(4)]
    write_jsonl(folder / "xchat" / "en.jsonl", rows)
    return folder


def _results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def _mgsm_responses(language="en", wrong=()):
    return [
        {
            "task": f"mgsm_{language}",
            "doc_id": str(i),
            "response": f"The answer is {i + (i in wrong)}.",
        }
        for i in NUMBERS
    ]


def test_list_shows_14_data_sets(capsys):
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert len(tasks.DATASETS) == 14
    for name in tasks.DATASETS:
        assert f"│ {name} " in shown
    for count in (
        "400",
        "600",
        "3,600",
        "77,328",
        "1,890",
        "2,650",
        "2,753",
        "5,077",
        "20,240",
        "2,750",
    ):
        assert count in shown


def test_selection():
    names = [task.name for task in tasks.select(["mgsm_bn", "maxm_iw", "mgsm_bn"])]
    assert names == ["maxm_he", "mgsm_bn"]
    assert len(tasks.select(["pangeabench"])) == len(tasks.ALL_TASKS) == 227
    assert {t.dataset.group for t in tasks.select(["pangeabench_text"])} == {"text"}
    assert {t.subset.language for t in tasks.select(["lang:sw"])} == {"sw"}
    assert len(tasks.select(["cvqa_local"])) == 36
    with pytest.raises(tasks.UnknownTaskError, match="did you mean mgsm_sw"):
        tasks.select(["mgms_sw"])
    with pytest.raises(tasks.UnknownTaskError, match="unknown language tag 'xx'"):
        tasks.select(["lang:xx"])


def test_scores_from_a_file_of_responses(data_dir, tmp_path, write_jsonl):
    responses = _mgsm_responses("en", wrong=(3,)) + _mgsm_responses("bn", wrong=(3, 4, 5))
    file = write_jsonl(tmp_path / "r.jsonl", responses)
    out = tmp_path / "out"
    flags = ["--tasks=mgsm_en,mgsm_bn", f"--responses={file}", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={out}"]) == 0
    results = _results(out)
    assert results["tasks"]["mgsm_en"]["fixed"]["score"] == pytest.approx(100 * 29 / 30)
    assert results["tasks"]["mgsm_bn"]["fixed"]["score"] == pytest.approx(100 * 27 / 30)
    # The strict pattern of Bengali is English: these answers pass it, Bengali ones never would.
    assert results["datasets"]["mgsm"]["fixed"]["en"]["score"] == pytest.approx(100 * 29 / 30)
    assert results["datasets"]["mgsm"]["fixed"]["mul"]["subsets"] == 1
    low, high = results["tasks"]["mgsm_bn"]["fixed"]["interval"]
    assert low < 90 < high
    assert results["tasks"]["mgsm_en"]["version"] == 1
    assert results["environment"]["packages"]["sacrebleu"]
    page = (out / "report.md").read_text("utf-8")
    assert "96.7 [" in page and "PANGEA-7B | published" in page
    assert "mgsm_bn, paper profile: the paper's strict pattern for Bengali" in page
    assert "data:image/svg+xml;base64" in (out / "report.html").read_text("utf-8")


def test_missing_and_superfluous_responses_are_told(data_dir, tmp_path, write_jsonl, capsys):
    foreign = {"task": "mgsm_sw", "doc_id": "1", "response": "x"}
    responses = [*_mgsm_responses()[2:], foreign]
    file = write_jsonl(tmp_path / "r.jsonl", responses)
    flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}"]) == 1
    results = _results(tmp_path / "out")
    assert [f["doc_id"] for f in results["failures"]] == ["0", "1"]
    assert results["tasks"]["mgsm_en"]["fixed"]["n"] == 28
    assert results["tasks"]["mgsm_en"]["fixed"]["score"] == 100  # missing is not wrong
    shown = capsys.readouterr().out
    assert "no score: mgsm_en 0, 1 (response: no response in r.jsonl)" in shown
    assert "1 responses of" in shown


class Killed(BaseException):
    pass


class Counting:
    """A model that knows the answers, notes what it was asked, and may die on the way."""

    name = "counting"

    def __init__(self, lives: int | None = None):
        self.asked, self._lives = [], lives

    def generate(self, requests):
        for request in requests:
            if self._lives is not None and len(self.asked) >= self._lives:
                raise Killed
            self.asked.append(request.key)
            yield request, f"The answer is {request.document.row['answer']}."

    def loglikelihood(self, requests):
        for request in requests:
            self.asked.append(request.key)
            yield request, [-5.0, -1.0]


def _run_model(model, names, data_dir, output):
    requests, _ = runner.make_requests(tasks.select(names), data_dir, profile="fixed")
    console = run.Console(quiet=True)
    with runner.ResponseLog(output) as log:
        return runner.run(model, requests, log, console=console)


def test_a_killed_run_goes_on_where_it_was(data_dir, tmp_path):
    names = ["mgsm_en", "mgsm_sw", "xstorycloze_sw"]
    whole = Counting()
    _run_model(whole, names, data_dir, tmp_path / "whole")
    rng, asked, killed = random.Random(0), [], 0
    while killed < 2:
        model = Counting(lives=rng.randint(5, 20))
        with pytest.raises(Killed):
            _run_model(model, names, data_dir, tmp_path / "killed")
        asked += model.asked
        killed += 1
        path = tmp_path / "killed" / "responses" / "mgsm_en.jsonl"
        if path.exists():
            with path.open("a") as file:
                file.write('{"doc_id": "cut sho')  # what a kill in the middle of a write leaves
    last = Counting()
    _run_model(last, names, data_dir, tmp_path / "killed")
    asked += last.asked
    assert sorted(asked) == sorted(whole.asked)  # each once
    with runner.ResponseLog(tmp_path / "whole") as a, runner.ResponseLog(tmp_path / "killed") as b:
        for name in names:
            first, second = (sorted(log.read(name), key=_doc_id) for log in (a, b))
            assert first == second


def _doc_id(record):
    return record["doc_id"]


def test_longest_prompts_come_first(data_dir, tmp_path):
    model = Counting()
    _run_model(model, ["mgsm_en"], data_dir, tmp_path)
    with runner.ResponseLog(tmp_path) as log:
        lengths = [len(r["doc"]["question"]) for r in log.read("mgsm_en")]
    assert lengths == sorted(lengths, reverse=True)


def test_changed_settings_are_asked_again(data_dir, tmp_path):
    for overrides, expected in (({}, 30), ({}, 0), ({"max_new_tokens": 8}, 30)):
        requests, _ = runner.make_requests(
            tasks.select(["mgsm_en"]), data_dir, profile="fixed", overrides=overrides
        )
        model = Counting()
        with runner.ResponseLog(tmp_path) as log:
            runner.run(model, requests, log, console=run.Console(quiet=True))
        assert len(model.asked) == expected


def test_an_output_folder_belongs_to_one_model(data_dir, tmp_path):
    _run_model(Counting(), ["mgsm_en"], data_dir, tmp_path)
    other = Counting()
    other.name = "other"
    with pytest.raises(DataError, match="has responses of 'counting', not of 'other'"):
        _run_model(other, ["mgsm_en"], data_dir, tmp_path)


def test_log_likelihoods(data_dir, tmp_path, write_jsonl):
    where = [{"task": "xstorycloze_sw", "doc_id": str(i)} for i in range(4)]
    values = [[-5.0, -1.0], [-1.0, -5.0], [-3.0, -2.0], "text"]
    rows = [w | {"response": v} for w, v in zip(where, values, strict=True)]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    flags = ["--tasks=xstorycloze_sw", f"--responses={file}", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}"]) == 1
    results = _results(tmp_path / "out")
    assert results["tasks"]["xstorycloze_sw"]["fixed"]["score"] == pytest.approx(200 / 3)
    assert "expected 2 log-likelihoods, got 'text'" in results["failures"][0]["reason"]


def test_rescore_needs_no_data(data_dir, tmp_path, write_jsonl):
    file = write_jsonl(tmp_path / "r.jsonl", _mgsm_responses(wrong=(1,)))
    out = tmp_path / "out"
    flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
    run.main([*flags, f"--output_path={out}"])
    before = _results(out)
    (out / "results.json").write_text(
        json.dumps(before | {"tasks": {}, "datasets": {}}), encoding="utf-8"
    )
    (data_dir / "mgsm" / "en.jsonl").unlink()
    assert run.main(["rescore", str(out)]) == 0
    assert _results(out) == before


def test_compare_and_report(data_dir, tmp_path, write_jsonl, capsys):
    for name, wrong in (("good", ()), ("bad", range(0, 30, 2))):
        file = write_jsonl(tmp_path / f"{name}.jsonl", _mgsm_responses(wrong=wrong))
        flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
        run.main([*flags, f"--output_path={tmp_path / name}"])
    capsys.readouterr()
    assert run.main(["compare", str(tmp_path / "good"), str(tmp_path / "bad")]) == 0
    shown = capsys.readouterr().out
    assert "+50.0" in shown and "30" in shown
    folders = [str(tmp_path / "good"), str(tmp_path / "bad")]
    assert run.main(["report", *folders, f"--output_path={tmp_path / 'both'}"]) == 0
    page = (tmp_path / "both" / "report.md").read_text("utf-8")
    assert "| good | fixed | 100.0*" in page and "| bad | fixed | 50.0*" in page


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


def test_chat_endpoints_cannot_do_log_likelihoods(endpoint, data_dir, tmp_path, capsys):
    flags = ["--tasks=xstorycloze_sw", "--model=openai:m", f"--base_url={endpoint.url}"]
    assert run.main([*flags, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]) == 1
    assert "chat endpoints give no log-likelihood" in capsys.readouterr().out
    assert not endpoint.requests


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=mgms_sw"], "did you mean mgsm_sw"),
        (["--tasks=mgsm_te"], "no such file, needed by mgsm_te"),
        (["--tasks=mgsm_en", "--gen_kwargs=tokens=4"], "expected NAME=NUMBER"),
        (["--tasks=mgsm_en", "--judge=human"], "expected replay:FILE or openai:MODEL"),
        (["--tasks=mgsm_en", "--model=x"], "give one of --model and --responses"),
        (["evaluate"], "unknown command 'evaluate'"),
        ([], "run needs --tasks"),
    ],
)
def test_wrong_commands_say_what_is_wrong(flags, message, data_dir, tmp_path, write_jsonl, capsys):
    file = write_jsonl(tmp_path / "r.jsonl", _mgsm_responses())
    where = [f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}", f"--responses={file}"]
    assert run.main([*flags, *where]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "answer": "1"}, "line 1: field 'id' is None"),
        ({"id": "1", "question": "x"}, "line 1: no field 'answer'; mgsm needs question, answer"),
        ({"id": "1", "question": 3, "answer": "1"}, "line 1: field 'question' is 3, expected str"),
        ({"id": "1", "question": "x", "answer": True}, "field 'answer' is True"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_bad_rows_name_file_line_and_field(row, message, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "mgsm" / "en.jsonl", [row])
    with pytest.raises(DataError) as error:
        load(tasks.select(["mgsm_en"])[0], tmp_path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_pictures_stay_in_their_folder(tmp_path, write_jsonl):
    row = {"id": "1", "question": "?", "answer": "x", "images": ["../../secret.png"]}
    write_jsonl(tmp_path / "xgqa" / "de.jsonl", [row])
    with pytest.raises(DataError, match="outside the folder of xgqa"):
        load(tasks.select(["xgqa_de"])[0], tmp_path)


def test_a_missing_picture_costs_its_document_only(data_dir, tmp_path, write_jsonl):
    (data_dir / "xgqa" / "images" / "1.png").unlink()
    requests, failures = runner.make_requests(tasks.select(["xgqa_de"]), data_dir, profile="fixed")
    assert len(requests) == 6 and [f.doc_id for f in failures] == ["1", "4", "7"]
    assert "does not exist" in failures[0].reason


def test_limit_is_a_number_or_a_share(data_dir):
    task = tasks.select(["mgsm_en"])[0]
    assert len(load(task, data_dir, limit=4)) == 4
    assert len(load(task, data_dir, limit=0.1)) == 3


def test_stop_strings_are_cut():
    assert models.cut("18\nQuestion: more", ("Question:", "\n")) == "18"
    assert models.cut("18", ()) == "18"


def test_log_has_the_field_names_of_lm_eval(data_dir, tmp_path):
    _run_model(Counting(), ["mgsm_en"], data_dir, tmp_path)
    record = json.loads(
        (tmp_path / "responses" / "mgsm_en.jsonl").read_text("utf-8").splitlines()[0]
    )
    names = {
        "doc_id",
        "doc",
        "target",
        "arguments",
        "resps",
        "doc_hash",
        "prompt_hash",
        "target_hash",
    }
    assert names <= record.keys()
    assert record["arguments"]["gen_args_0"]["arg_1"]["until"][0] == "Question:"
    assert record["resps"] == [["The answer is 29."]]


def test_report_of_a_folder_without_results(tmp_path):
    with pytest.raises(DataError, match="is no output folder"):
        bench_report.read_results(tmp_path)
