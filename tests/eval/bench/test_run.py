"""The command: responses kept and asked once, failures counted, reports that show the scores."""

import json
import random
import re
import types
from pathlib import Path

import pytest

from eval import run
from eval.bench import report, responses, results, tasks
from eval.bench.documents import DataError, limit_mark, load

NUMBERS = range(30)


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


def test_list_names_every_task(capsys):
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert set(tasks.ALL_TASKS) <= set(shown.split())
    assert max(map(len, shown.split("Tasks:")[1].splitlines())) <= 100


def test_the_docs_name_the_file_of_every_task():
    page = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text("utf-8")
    (block,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    entries = re.findall(r"^(\w+): (.*(?:\n  .*)*)", block, re.MULTILINE)
    known = {d.name: [subset.name for subset in d.subsets] for d in tasks.DATASETS.values()}
    assert {name: files.split() for name, files in entries} == known


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
    assert results["tasks"]["mgsm_en"]["version"] == tasks.DATASETS["mgsm"].version
    assert results["environment"]["packages"]["sacrebleu"]
    page = (out / "report.md").read_text("utf-8")
    assert "96.7 [" in page and "PANGEA-7B | published" in page
    assert "mgsm_bn, paper profile: the paper's strict pattern for Bengali" in page
    assert "data:image/svg+xml;base64" in (out / "report.html").read_text("utf-8")


def test_a_file_that_a_limit_has_cut_is_told(tmp_path, write_jsonl, capsys):
    rows = [{"id": str(i), "question": f"{i} + 1?", "answer": i} for i in NUMBERS]
    path = write_jsonl(tmp_path / "mgsm" / "en.jsonl", rows)
    file = write_jsonl(tmp_path / "r.jsonl", _mgsm_responses())
    flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={tmp_path}"]
    warnings = []
    for _ in range(2):
        assert run.main([*flags, f"--output_path={tmp_path / 'out'}"]) == 0
        warnings.append("warning: mgsm_en has only its first 30" in capsys.readouterr().out)
        limit_mark(path).touch()
    assert warnings == [False, True]


def test_missing_and_superfluous_responses_are_told(data_dir, tmp_path, write_jsonl, capsys):
    foreign = {"task": "mgsm_sw", "doc_id": "1", "response": "x"}
    responses = [*_mgsm_responses()[2:], foreign]
    file = write_jsonl(tmp_path / "r.jsonl", responses)
    flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}"]) == 1
    results = _results(tmp_path / "out")
    assert [f["doc_id"] for f in results["failures"]] == ["0", "1"]
    assert results["documents"] == {"mgsm_en": 30}
    assert results["tasks"]["mgsm_en"]["fixed"]["n"] == 28
    assert results["tasks"]["mgsm_en"]["fixed"]["score"] == 100  # missing is not wrong
    shown = capsys.readouterr().out
    assert "no score: mgsm_en 0, 1 (response: no response in r.jsonl)" in shown
    assert "1 responses in" in shown


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
    requests, _ = responses.make_requests(tasks.select(names), data_dir, profile="fixed")
    console = run.Console(quiet=True)
    log = responses.ResponseLog(output)
    return responses.run(model, requests, log, console=console)


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
    logs = [responses.ResponseLog(tmp_path / folder) for folder in ("whole", "killed")]
    for name in names:
        first, second = (sorted(log.read(name), key=_doc_id) for log in logs)
        assert first == second


def _doc_id(record):
    return record["doc_id"]


def test_longest_prompts_come_first(data_dir, tmp_path):
    model = Counting()
    _run_model(model, ["mgsm_en"], data_dir, tmp_path)
    log = responses.ResponseLog(tmp_path)
    lengths = [len(r["doc"]["question"]) for r in log.read("mgsm_en")]
    assert lengths == sorted(lengths, reverse=True)


def test_questions_about_the_same_pictures_come_together():
    asked = [("a", "p"), ("a", ""), ("abc", "q"), ("abcd", "p"), ("a", "pq"), ("b" * 9, "")]
    requests = [
        types.SimpleNamespace(prompt=types.SimpleNamespace(text=text), images=tuple(images))
        for text, images in asked
    ]
    found = [(r.prompt.text, "".join(r.images)) for r in responses.in_order(requests)]
    two, p, q, words = asked[4:5], [asked[3], asked[0]], asked[2:3], [asked[5], asked[1]]
    assert found == two + p + q + words


def test_changed_settings_are_asked_again(data_dir, tmp_path):
    for overrides, expected in (({}, 30), ({}, 0), ({"max_new_tokens": 8}, 30)):
        requests, _ = responses.make_requests(
            tasks.select(["mgsm_en"]), data_dir, profile="fixed", overrides=overrides
        )
        model = Counting()
        log = responses.ResponseLog(tmp_path)
        responses.run(model, requests, log, console=run.Console(quiet=True))
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


def test_rescore_says_what_changed_and_why(data_dir, tmp_path, write_jsonl, read_jsonl, capsys):
    file = write_jsonl(tmp_path / "r.jsonl", _mgsm_responses(wrong=()))
    out = tmp_path / "out"
    flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
    run.main([*flags, f"--output_path={out}"])
    assert run.main(["rescore", str(out)]) == 0
    assert "no score changed" in capsys.readouterr().out
    assert read_jsonl(out / "rescored.jsonl") == []
    # An older version had missed one of the answers, and read another one in another form.
    samples = out / "samples" / "mgsm_en.jsonl"
    rows = sorted(read_jsonl(samples), key=lambda row: int(row["doc_id"]))
    rows[3]["fixed"] |= {"filtered_resps": [None]}
    rows[3]["fixed"]["metrics"]["exact_match"] = 0.0
    rows[4]["fixed"] |= {"filtered_resps": ["4.0"]}
    write_jsonl(samples, rows)
    results = _results(out)
    results["tasks"]["mgsm_en"]["version"] = 1
    results["tasks"]["mgsm_en"]["fixed"]["score"] = 96.7
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert run.main(["rescore", str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "96.7" in said and "100.0" in said and "version 1 to 2" in said
    changed = {row["doc_id"]: row for row in read_jsonl(out / "rescored.jsonl")}
    first, second = changed["3"], changed["4"]
    assert (len(changed), first["read_before"], first["score_before"]) == (2, None, 0)
    assert (first["profile"], first["read"], first["score"]) == ("fixed", "3", 1)
    assert (second["read_before"], second["read"]) == ("4.0", "4")


def test_rescore_is_of_the_last_run(data_dir, tmp_path, write_jsonl):
    file = write_jsonl(tmp_path / "r.jsonl", _mgsm_responses(wrong=range(3, 30)))
    out = tmp_path / "out"
    flags = ["--tasks=mgsm_en", f"--responses={file}", f"--data_dir={data_dir}"]
    flags += [f"--output_path={out}"]
    run.main(flags)
    assert run.main([*flags, "--limit=6"]) == 0
    before = _results(out)
    assert before["tasks"]["mgsm_en"]["fixed"]["score"] == 50
    assert run.main(["rescore", str(out)]) == 0
    assert _results(out) == before


def test_a_corrected_file_of_responses_is_read_again(data_dir, tmp_path, write_jsonl, capsys):
    flags = ["--tasks=mgsm_en", f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]
    for wrong, n in ((NUMBERS, 30), ((), 30), ((), 20)):
        file = write_jsonl(tmp_path / "r.jsonl", _mgsm_responses(wrong=wrong)[:n])
        run.main([*flags, f"--responses={file}"])
        entry = _results(tmp_path / "out")["tasks"]["mgsm_en"]["fixed"]
        assert (entry["score"], entry["n"]) == (0 if wrong else 100, n)
    assert "were not used" not in capsys.readouterr().out


def test_files_that_say_nothing(data_dir, tmp_path, write_jsonl, capsys):
    file = write_jsonl(tmp_path / "r.jsonl", [])
    (data_dir / "mgsm" / "en.jsonl").write_text("\n")
    flags = [f"--responses={file}", f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]
    assert run.main(["--tasks=mgsm_en", *flags]) == 2
    assert "en.jsonl: no documents; delete the file" in capsys.readouterr().err
    half = {"task": "mgsm_sw", "doc_id": "0", "response": "18 \ud83d"}
    file.write_text(json.dumps(half) + "\n")
    assert run.main(["--tasks=mgsm_sw", *flags]) == 2
    assert "r.jsonl, line 1: half a character" in capsys.readouterr().err


def test_compare_is_of_the_last_runs(data_dir, tmp_path, write_jsonl, capsys):
    folders = []
    for name in ("a", "b", "c"):
        responses = _mgsm_responses() + _mgsm_responses("sw")
        file = write_jsonl(tmp_path / f"{name}.jsonl", responses)
        folders.append(str(tmp_path / name))
        for chosen in ("mgsm_en,mgsm_sw", "mgsm_en", "mgsm_sw" if name == "c" else "mgsm_en"):
            flags = [f"--tasks={chosen}", f"--responses={file}", f"--data_dir={data_dir}"]
            run.main([*flags, f"--output_path={folders[-1]}"])
    capsys.readouterr()
    assert run.main(["compare", *folders[:2]]) == 0
    shown = capsys.readouterr().out
    assert "│ en " in shown and "│ mul " not in shown
    assert run.main(["compare", *folders[1:]]) == 2
    assert "have no scored document in common" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=mgms_sw"], "did you mean mgsm_sw"),
        (["--tasks=mgsm_te"], "no such file, needed by mgsm_te"),
        (["--tasks=mgsm_en", "--gen_kwargs=tokens=4"], "expected NAME=NUMBER"),
        (["--tasks=mgsm_en", "--judge=human"], "expected replay:FILE or openai:MODEL"),
        (["--tasks=mgsm_en", "--model=x"], "give either --model or --responses"),
        (["--tasks=mgsm_en", "--gen_kwargs=max_new_tokens=0"], "max_new_tokens (1 or more)"),
        (["--tasks=mgsm_en", "--gen_kwargs=temperature=nan"], "temperature (0 or more)"),
        (["evaluate"], "unknown command 'evaluate'"),
        (["run", "there", "--tasks=mgsm_en"], "run does not take a folder, but got there"),
        (["rescore", "there"], "rescore does not take --data_dir"),
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


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("cvqa_ke-sw", {"answer": "E"}, "line 2: answer 'E' is not one of the letters 'AB'"),
        ("mmmlu_sw", {"answer": "AB"}, "line 2: answer 'AB' is not one of the letters 'AB'"),
        ("mmmlu_sw", {"options": ["x", 3]}, "line 2: field 'options' is ['x', 3], expected a list"),
        ("xstorycloze_sw", {"answer": 2}, "line 2: answer 2 is not in [0, 1]"),
        (
            "xchat_en",
            {"rubric": {"criteria": "c"}},
            "line 2: the rubric has no 'score1_description'",
        ),
        ("mgsm_en", {"answer": "many"}, "line 2: answer: expected a number such as 2,125"),
        ("maxm_en", {"answers": []}, "line 2: field 'answers' is empty, expected at least one"),
        ("xmmmu_en", {"options": []}, "line 2: a multiple-choice question without options"),
        ("mgsm_en", {"images": "a.png"}, "line 2: field 'images' is 'a.png', expected a list"),
    ],
)
def test_rows_that_cannot_be_scored_are_told_before_a_model_is_asked(
    name, changed, message, tmp_path, write_jsonl
):
    rubric = {"criteria": "c"} | {f"score{i}_description": "d" for i in range(1, 6)}
    row = {"question": "x", "options": ["x", "y"], "answer": "A", "subject": "law", "images": []}
    row |= {"system_prompt": "x", "input": "x", "reference_answer": "x", "rubric": rubric}
    row |= {"sentences": ["x"] * 4, "endings": ["x", "y"], "answers": ["x"]}
    row |= {"question_type": "multiple-choice"}
    if name.startswith(("xstory", "mgsm")):
        row["answer"] = 1
    dataset, _, subset = name.partition("_")
    rows = [{"id": "0"} | row, {"id": "1"} | row | changed]
    write_jsonl(tmp_path / dataset / f"{subset}.jsonl", rows)
    (task,) = tasks.select([name])
    with pytest.raises(DataError) as error:
        load(task, tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--judge=replay:nowhere", "nowhere"),
        ("--tasks=mgsm_te", "te.jsonl: no such file"),
        ("--output_path=/dev/null/out", "/dev/null/out"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_opened(
    flag, message, data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "_open_model", lambda args: pytest.fail("the model was opened"))
    flags = ["--tasks=mgsm_en", "--model=m", f"--data_dir={data_dir}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}", flag]) == 2
    assert message in capsys.readouterr().err


def test_results_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.environment()["git_hash"] is None


def test_pictures_stay_in_their_folder(tmp_path, write_jsonl):
    row = {"id": "1", "question": "?", "answer": "x", "images": ["../../secret.png"]}
    write_jsonl(tmp_path / "xgqa" / "de.jsonl", [row])
    with pytest.raises(DataError, match="outside the folder of xgqa"):
        load(tasks.select(["xgqa_de"])[0], tmp_path)


def test_a_missing_picture_costs_its_document_only(data_dir, tmp_path, write_jsonl):
    (data_dir / "xgqa" / "images" / "1.png").unlink()
    requests, failures = responses.make_requests(
        tasks.select(["xgqa_de"]), data_dir, profile="fixed"
    )
    assert len(requests) == 6 and [f.doc_id for f in failures] == ["1", "4", "7"]
    assert "does not exist" in failures[0].reason


@pytest.mark.parametrize("limit", ["-3", "2.5", "0", "all"])
def test_wrong_limits(limit, capsys):
    with pytest.raises(SystemExit):
        run.main(["--tasks=mgsm_en", f"--limit={limit}"])
    assert f"{limit!r} is not a number of documents or a share below 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--concurrency=0", "--retries=-1", "--timeout=0", "--timeout=nan"]
)
def test_wrong_numbers(flag, capsys):
    with pytest.raises(SystemExit):
        run.main(["--tasks=mgsm_en", flag])
    assert f"argument {flag.split('=')[0]}: '{flag.split('=')[1]}' is no" in capsys.readouterr().err


def test_limit_is_a_number_or_a_share(data_dir):
    task = tasks.select(["mgsm_en"])[0]
    assert len(load(task, data_dir, limit=4)) == 4
    assert len(load(task, data_dir, limit=0.1)) == 3


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
        report.read_results(tmp_path)


@pytest.mark.parametrize(
    "likelihoods",
    [
        "[1e100, -1]",
        "[" + "9" * 400 + ", -1]",
        "[Infinity, -1]",
        "[NaN, -1]",
        "[true, -1]",
        "[null, -1]",
        "[[-1], -1]",
        "[-1]",
        "5",
        '{"a": 1}',
        '"-1, -2"',
    ],
)
def test_a_log_likelihood_that_is_none_costs_only_its_document(data_dir, tmp_path, likelihoods):
    lines = [
        f'{{"task": "xstorycloze_sw", "doc_id": "{i}", "response": {likelihoods if i == 2 else "[-3, -2.5]"}}}'
        for i in range(4)
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    flags = ["--tasks=xstorycloze_sw", f"--responses={tmp_path / 'r.jsonl'}"]
    flags += [f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]
    assert run.main(flags) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["tasks"]["xstorycloze_sw"]["fixed"]["n"] == 3
    assert results["tasks"]["xstorycloze_sw"]["fixed"]["score"] == 100
    (failure,) = results["failures"]
    assert failure["doc_id"] == "2" and "expected 2 log-likelihoods" in failure["reason"]


@pytest.mark.parametrize(
    "response",
    ["9" * 5_000, "[" * 100_000, '"\\ud800"', "[1", '{"a": ' * 50_000],
)
def test_a_line_that_cannot_be_read_is_named(data_dir, tmp_path, capsys, response):
    line = '{"task": "mgsm_en", "doc_id": "0", "response": '
    (tmp_path / "r.jsonl").write_text(f'{line}"18"}}\n{line}{response}}}\n')
    flags = ["--tasks=mgsm_en", f"--responses={tmp_path / 'r.jsonl'}"]
    assert run.main([*flags, f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "r.jsonl, line 2" in said and len(said) < 400 and said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output_path", "--data_dir", "--responses"])
def test_an_address_as_a_folder_is_refused(data_dir, tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    flags = {"--output_path": "out", "--data_dir": data_dir, "--responses": "r.jsonl"}
    flags[flag] = "hdfs://node/run"
    assert run.main(["--tasks=mgsm_en", *(f"{name}={value}" for name, value in flags.items())]) == 2
    said = capsys.readouterr().err
    assert f"{flag}: " in said and "hdfs:// is not supported" in said and said.count("\n") == 1
    assert not (tmp_path / "hdfs:").exists()
