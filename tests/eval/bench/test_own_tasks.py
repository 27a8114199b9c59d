"""Tasks of one's own: the example of the docs, each reader, and what is said about mistakes."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from eval import run
from eval.bench import inclusion, responses, tasks
from eval.bench.documents import DataError, load
from eval.bench.own_tasks import READERS, Template
from eval.bench.task import Failed
from tests.figures.pages import active_parts
from tests.figures.test_inert import ACTIVE, HOSTILE

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text("utf-8")
SECTION = PAGE.split("## A task of your own\n")[1].split("\n## ")[0]


def _block(language):
    return re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL).group(1)


@pytest.fixture
def example(tmp_path):
    """The files of the docs' example."""
    for suffix, language in (("yaml", "yaml"), ("jsonl", "jsonl"), ("py", "python")):
        (tmp_path / f"thai_quiz.{suffix}").write_text(_block(language), "utf-8")
    return tmp_path


class Scripted:
    """Answers each question right, but the last ones of a task, in the words of a Thai model."""

    name = "scripted"

    def __init__(self, wrong=0):
        self.wrong, self.prompts = wrong, []

    def generate(self, requests):
        for request in requests:
            self.prompts.append(request.prompt.with_marks())
            right = "ABCD".index(request.document.row["answer"])
            chosen = (right + 1) % 4 if int(request.document.id) > 20 - self.wrong else right
            yield request, f"คำตอบคือ {'กขคง'[chosen]}"


def _results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def test_the_example_of_the_docs_runs_in_every_command(example, monkeypatch, capsys):
    monkeypatch.chdir(example)
    monkeypatch.setattr(run, "_open_model", lambda args: Scripted(wrong=3))
    assert len(_block("yaml").splitlines()) <= 10 and len(_block("jsonl").splitlines()) == 20
    commands = [
        shlex.split(line)[2:]
        for line in _block("bash").splitlines()
        if line.startswith("python eval/run.py")
    ]
    assert len(commands) == 4
    for command in commands:
        assert run.main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "thai_quiz_th" in said and "no score changed" in said
    entry = _results(example / "OUT")["tasks"]["thai_quiz_th"]
    assert entry["fixed"]["score"] == 85 and entry["fixed"]["n"] == 20 and "paper" not in entry
    for folder in ("OUT", "REPORT"):
        page = (example / folder / "report.md").read_text("utf-8")
        assert "## Own tasks (not in PangeaBench)" in page
        assert re.search(r"\| scripted \| fixed \| – \| 85\.0 \[[\d.]+, [\d.]+\] n=20 \|", page)
        assert "| PANGEA-7B | published | – | – |" in page
        assert "languages.png" in page and (example / folder / "report.html").is_file()
    assert "thai_quiz" not in tasks.DATASETS and "own" not in tasks.GROUPS


def test_the_python_form_is_the_same_task(example, monkeypatch, capsys):
    monkeypatch.chdir(example)
    models = {}
    for form in ("yaml", "py"):
        models[form] = Scripted(wrong=2 if form == "py" else 5)
        monkeypatch.setattr(run, "_open_model", lambda args, form=form: models[form])
        flags = [f"--include=thai_quiz.{form}", "--tasks=own", f"--output_path={form}"]
        assert run.main(flags) == 0, capsys.readouterr().err
    assert models["yaml"].prompts == models["py"].prompts
    assert "A. เชียงใหม่\nB. กรุงเทพมหานคร\n" in "".join(models["py"].prompts)
    assert _results(example / "py")["tasks"]["thai_quiz_th"]["fixed"]["score"] == 90
    capsys.readouterr()
    assert run.main(["compare", "py", "yaml", "--include=thai_quiz.py"]) == 0
    assert "+15.0" in capsys.readouterr().out
    assert run.main(["compare", "py", "yaml"]) == 2
    assert "a task of your own needs --include=thai_quiz.py" in capsys.readouterr().err


def test_a_python_file_may_use_dataclasses(example):
    text = (example / "thai_quiz.py").read_text("utf-8")
    more = "@dataclasses.dataclass\nclass Other:\n    size: int = 3\n"
    head = "from __future__ import annotations\n\nimport dataclasses\n"
    (example / "thai_quiz.py").write_text(f"{head}{text}\n\n{more}", "utf-8")
    (dataset,) = inclusion.read([example / "thai_quiz.py"])
    assert dataset.name == "thai_quiz"


def test_there_is_nothing_to_fetch(example, capsys):
    flags = [f"--include={example / 'thai_quiz.yaml'}", "--tasks=thai_quiz"]
    assert run.main(["fetch", *flags]) == 0
    said = capsys.readouterr().out
    assert "thai_quiz_th: nothing to fetch; its documents are in" in said
    assert run.main(["fetch", *flags[:1], "--tasks=thai_quiz,mgsm_en"]) == 2
    assert "fetch needs --data_dir for mgsm_en" in capsys.readouterr().err


def test_the_paper_did_not_score_them(example, capsys):
    flags = [f"--include={example}", "--tasks=thai_quiz", f"--output_path={example / 'o'}"]
    assert run.main([*flags, "--profile=paper", "--model=sample"]) == 2
    assert "thai_quiz_th has no paper scores" in capsys.readouterr().err


RUBRIC = {"criteria": "Good?"} | {f"score{i}_description": str(i) for i in range(1, 6)}
BASE = {
    "task": "mine",
    "language": "en",
    "dataset_kwargs": {"data_files": "mine.jsonl"},
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
}
CHOICE = BASE | {"reader": "letter", "doc_to_choice": "choices"}
ROW = {"question": "Q?", "choices": ["cat", "dog"], "answer": "B"}


def _own(folder, values, rows):
    """The task of these keys (a YAML may be JSON) and rows."""
    (folder / "mine.yaml").write_text(json.dumps(values), "utf-8")
    lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "mine.jsonl").write_text(lines, "utf-8")
    (dataset,) = inclusion.read([folder / "mine.yaml"])
    return dataset


def _score(dataset, folder, response, reply=None):
    with tasks.included([dataset]):
        (task,) = tasks.select(["own"])
        (request,), failures = responses.make_requests([task], None, profile="fixed")
        assert not failures
        return request, dataset.score(request.document, response, task.subset, "fixed", reply)


@pytest.mark.parametrize(
    ("keys", "answer", "response", "metrics"),
    [
        ({"reader": "letter"}, "B", "The answer is B.", {"acc": 1, "unreadable": 0}),
        ({"reader": "letter"}, 1, "A", {"acc": 0, "unreadable": 0}),
        ({"reader": "letter"}, "dog", "It must be the dog", {"acc": 1, "unreadable": 0}),
        ({"reader": "letter", "doc_to_choice": ["no", "yes"]}, "yes", "(B)", {"acc": 1}),
        ({"reader": "truth"}, True, "That is not true.", {"acc": 0, "unreadable": 0}),
        ({"reader": "truth"}, False, "False", {"acc": 1}),
        ({"reader": "number"}, "2,125", "So it is 2125 in all", {"exact_match": 1}),
        ({"reader": "number"}, 18.5, "eighteen", {"exact_match": 0, "unreadable": 1}),
        ({"reader": "short"}, ["a cat", "kitten"], "It is a cat.", {"exact_match": 1, "f1": 1}),
        ({"reader": "short"}, "black cat", "a cat", {"exact_match": 0, "f1": 2 / 3}),
        ({"reader": "caption"}, ["a dog runs"], "A dog runs.", {"rouge_l": 1}),
        ({"reader": "translation"}, "ein Hund rennt", "ein Hund rennt", {"chrf": 1}),
        ({"output_type": "multiple_choice"}, "B", [-5.0, -1.0], {"acc": 1, "acc_norm": 1}),
        ({"output_type": "multiple_choice"}, 0, [-5.0, -1.0], {"acc": 0, "acc_norm": 0}),
        ({"reader": "judge", "rubric": RUBRIC}, "It is.", "x", {"points": 0.75, "grade": 4}),
    ],
)
def test_readers(tmp_path, keys, answer, response, metrics):
    needs_choices = keys.get("reader") == "letter" or "output_type" in keys
    values = BASE | ({"doc_to_choice": "choices"} if needs_choices else {}) | keys
    dataset = _own(tmp_path, values, [ROW | {"answer": answer}])
    reply = "Fine. [RESULT] 4" if dataset.judged else None
    request, scored = _score(dataset, tmp_path, response, reply)
    assert {name: scored.metrics[name] for name in metrics} == pytest.approx(metrics)
    assert dataset.metric == READERS[dataset.declared.reader].metrics[0]
    if "output_type" in keys:
        assert request.choices == (" cat", " dog") and not request.generation.chat
        assert isinstance(_score(dataset, tmp_path, [-1.0])[1], Failed)
    if dataset.judged:
        asked = dataset.judge_request(request.document, "My answer")
        assert "Score 3: 3" in asked.user and "It is." in asked.user and "My answer" in asked.user
        assert isinstance(_score(dataset, tmp_path, "x", "no grade")[1], Failed)


def test_languages_pictures_and_settings(tmp_path):
    files = {"no": "mine.jsonl", "en": "mine.jsonl"}
    keys = CHOICE | {"dataset_kwargs": {"data_files": files}, "doc_to_image": "photo"}
    keys |= {"description": "Look. ", "metadata": {"version": 2.0}, "task_alias": "Mine"}
    keys |= {"generation_kwargs": {"max_gen_toks": 5, "until": "\n", "do_sample": False}}
    del keys["language"]
    (tmp_path / "p").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "p" / "a.png")
    dataset = _own(
        tmp_path, keys, [ROW | {"photo": "p/a.png", "id": 7}, ROW | {"photo": ["p/a.png"]}]
    )
    # `no` without quotes is a truth value in most YAML.
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    text = text.replace('{"no"', "{no")
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    (dataset,) = inclusion.read([tmp_path / "mine.yaml"])
    assert [(s.name, s.column) for s in dataset.subsets] == [("no", "mul"), ("en", "en")]
    assert (dataset.version, dataset.title) == (2, "Mine")
    with tasks.included([dataset]):
        names = [task.name for task in tasks.select(["lang:no", "mine"]) if "mine" in task.name]
        assert names == ["mine_no", "mine_en"]
        requests, _ = responses.make_requests(tasks.select(["mine"]), None, profile="fixed")
    assert [r.document.id for r in requests] == ["7", "2"] * 2
    assert requests[0].prompt.with_marks() == "<image>\nLook. Q?"
    assert requests[0].images == (tmp_path / "p" / "a.png",)
    settings = requests[0].generation
    assert (settings.max_new_tokens, settings.until, settings.chat) == (5, ("\n",), True)


def test_templates():
    row = {"q": " a ", "o": ["x", "y"], "m": {"s": 3}}
    text = "{{q}}|{{ q.strip() }}|{{q | trim}}|{{o[1]}}|{{m.s}}\n{{o}}"
    assert Template.parse(text).fill(row) == " a |a|a|y|3\nA. x\nB. y"
    for wrong in ("{{o[2]}}", "{{m.t}}", "{{z}}", "{{m}}"):
        with pytest.raises(ValueError, match=r"\{\{"):
            Template.parse(wrong).fill(row)
    for code in (
        "{{''.__class__}}",
        "{{q|length}}",
        "{{1+1}}",
        "{% for x in o %}",
        "{{f(q)}}",
        "{# c #}",
    ):
        with pytest.raises(ValueError, match=r"an expression|a block"):
            Template.parse(code)


YAML_MISTAKES = {
    "unknown key": ({"doc_to_txt": "x"}, "unknown key 'doc_to_txt'; did you mean doc_to_text?"),
    "code": ({"process_docs": "x"}, "key 'process_docs' of lm-eval is not read here"),
    "type": ({"doc_to_text": 3}, "key 'doc_to_text' is 3, expected a text"),
    "reader": ({"reader": "regex"}, "key 'reader' is 'regex', expected one of letter, truth"),
    "no reader": ({"reader": None}, "key 'reader' is None, expected a text"),
    "metric": ({"metric_list": [{"metric": "bleu"}]}, "expected metrics of the reader letter: acc"),
    "expression": ({"doc_to_text": "{{a + b}}"}, "key 'doc_to_text': {{a + b}} is an expression"),
    "language": ({"language": "xx"}, "unknown language tag 'xx'"),
    "name": ({"task": "a b"}, "key 'task' is 'a b', expected up to 100 letters"),
    "taken": ({"task": "mgsm"}, "the task name 'mgsm' is taken by PangeaBench; choose another"),
    "group": ({"task": "own"}, "the task name 'own' is taken by PangeaBench"),
    "file": ({"dataset_kwargs": {"data_file": "x"}}, "dataset_kwargs has 'data_file', expected data_files"),
    "split": ({"dataset_kwargs": {"data_files": {"train": "x"}}}, "has no split 'test'; name one of train"),
    "choices": ({"doc_to_choice": [1, 2]}, "key 'doc_to_choice' is [1, 2], expected texts"),
    "setting": ({"generation_kwargs": {"max_tokens": 3}}, "has 'max_tokens', expected max_gen_toks"),
    "tokens": ({"generation_kwargs": {"max_gen_toks": 0}}, "key 'max_gen_toks' is 0"),
    "rubric": ({"rubric": RUBRIC}, "expected none without a judge"),
    "kind": ({"output_type": "loglikelihood"}, "expected generate_until or multiple_choice"),
    "metrics": ({"metric_list": "acc"}, "key 'metric_list' is 'acc', expected a list such as [{metric: acc}]"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), YAML_MISTAKES.values(), ids=YAML_MISTAKES)
def test_mistakes_of_a_yaml_are_told_in_a_sentence(tmp_path, capsys, changed, message):
    with pytest.raises(DataError) as error:
        _own(tmp_path, CHOICE | changed, [ROW])
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "mine.yaml"))
    assert run.main(["--list", f"--include={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "key", ["task", "dataset_kwargs", "doc_to_text", "doc_to_target", "doc_to_choice"]
)
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(DataError, match=f"no key '{key}'"):
        _own(tmp_path, {k: v for k, v in CHOICE.items() if k != key}, [ROW])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: mine\ntask: yours\n", "line 2: key 'task' stands twice"),
        ("task: !function utils.f\n", "line 1: a tag such as !function means code"),
        ("task: !!python/object/apply:os.system ['touch made']\n", "line 1: a tag such as"),
        ("- task\n", "expected keys such as task and doc_to_text"),
        ("task: [\n", "line 2: "),
        ("task: mine\nlanguage: th\n\treader: letter\n", "line 3: found character '\\t'"),
        ("dataset_kwargs: {data_files: q.jsonl\ntask: mine\n", "line 2: expected ',' or '}'"),
        ("[" * 5_000, "no YAML"),
        ("a: \xff\n", "unknown key 'a'"),
        ("1: x\n", "line 1: key 1 is no text"),
    ],
)
def test_what_is_no_yaml_of_a_task(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    with pytest.raises(DataError) as error:
        inclusion.read([tmp_path / "mine.yaml"])
    assert message in str(error.value) and "mine.yaml" in str(error.value)
    assert not (tmp_path / "made").exists()


DATA_MISTAKES = {
    "placeholder": ({"question": None}, "field 'question' is None, expected str or int"),
    "choices": ({"choices": "cat, dog"}, "field 'choices' is 'cat, dog', expected list"),
    "one choice": ({"choices": ["cat"]}, "1 choices, expected 2 to 10"),
    "no texts": ({"choices": ["cat", 2]}, "field 'choices' is ['cat', 2], expected a list of texts"),
    "answer": ({"answer": "E"}, "answer 'E' is none of the choices; expected a letter of AB"),
    "number": ({"answer": 2}, "answer 2 is none of the choices"),
    "both": ({"choices": ["B", "A"]}, "answer 'B' could be two choices"),
    "kind": ({"answer": True}, "field 'answer' is True, expected str or int"),
    "id": ({"id": "1"}, "id '1' occurs twice"),
    "empty id": ({"id": ""}, "field 'id' is '', expected a text"),
    "picture": ({"images": ["no.png"]}, "picture 'no.png' does not exist in"),
    "outside": ({"images": ["../a.png"]}, "picture '../a.png' is outside the folder of mine"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), DATA_MISTAKES.values(), ids=DATA_MISTAKES)
def test_mistakes_of_the_data_name_file_line_and_field(tmp_path, changed, message):
    dataset = _own(tmp_path, CHOICE, [ROW, ROW | changed])
    with tasks.included([dataset]), pytest.raises(DataError) as error:
        load(tasks.select(["mine"])[0], None)
    assert str(error.value).startswith(f"{tmp_path / 'mine.jsonl'}, line 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("keys", "rows", "message"),
    [
        ({}, "\n", "mine.jsonl: no documents; data_files, or files of a class, names a JSONL file"),
        ({"dataset_kwargs": {"data_files": "q.jsonl"}}, [ROW], "q.jsonl: no such file, needed by mine_en; data_files"),
        ({}, json.dumps([ROW]), "line 1: expected a JSON object, got list; a file has one object per line"),
        ({}, [ROW] * 6 + [{"choices": ["a", "b"], "answer": "A"}], "line 7: no field 'question'"),
        ({}, [{"choices": ["a", "b"], "answer": "A"}], "line 1: no field 'question'; mine needs"),
        ({"doc_to_text": "{{question.en}}"}, [ROW], "line 1: no 'en' in {{question.en}}"),
        ({"doc_to_image": "photo"}, [ROW], "line 1: field 'photo' is missing or empty"),
        ({"reader": "truth", "doc_to_choice": None}, [ROW], "line 1: field 'answer' is 'B', expected bool"),
        ({"reader": "number", "doc_to_choice": None}, [ROW], "line 1: expected a number such as"),
        ({"reader": "short", "doc_to_choice": None}, [ROW | {"answer": []}], "the answer is []"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_the_yaml(tmp_path, keys, rows, message):
    values = {k: v for k, v in (CHOICE | keys).items() if v is not None}
    dataset = _own(tmp_path, values, rows)
    with tasks.included([dataset]), pytest.raises(DataError) as error:
        load(tasks.select(["mine"])[0], None)
    assert message in str(error.value)


def test_a_yaml_names_its_reader(tmp_path):
    with pytest.raises(DataError, match="no key 'reader'; expected one of letter, truth"):
        _own(tmp_path, {k: v for k, v in CHOICE.items() if k != "reader"}, [ROW])


@pytest.mark.parametrize("code", ["latin-1", "utf-16"])
def test_files_that_are_no_utf8_are_named_with_the_line(tmp_path, code):
    line = json.dumps(ROW | {"question": "é"}, ensure_ascii=False)
    dataset = _own(tmp_path, CHOICE, [ROW])
    written = line.encode(code)
    before = b"" if code == "utf-16" else json.dumps(ROW).encode() + b"\n"
    (tmp_path / "mine.jsonl").write_bytes(before + written)
    number = before.count(b"\n") + 1
    with tasks.included([dataset]), pytest.raises(DataError) as error:
        load(tasks.select(["mine"])[0], None)
    wanted = f"{tmp_path / 'mine.jsonl'}, line {number}: not UTF-8 text"
    assert str(error.value).startswith(wanted) and "save the file as UTF-8" in str(error.value)
    (tmp_path / "mine.yaml").write_bytes("task_alias: é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"mine\.yaml: .* at byte 12; save the file as UTF-8"):
        inclusion.read([tmp_path / "mine.yaml"])


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    dataset = _own(tmp_path, CHOICE, [ROW])
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW), "utf-8-sig")
    with tasks.included([dataset]):
        assert len(load(tasks.select(["mine"])[0], None)) == 1


SCORE = "    def score("
CODE_MISTAKES = {
    "no score": ((SCORE, "    def points("), "thai_quiz.py: class ThaiQuiz has no method score"),
    "no fields": (("    fields = ", "    field = "), "fields of class ThaiQuiz is missing, expected fields of"),
    "fields": (('{"question": str, "choices": list, "answer": str}', '["question"]'), "is ['question'], expected"),
    "generation": (("Generation(max_new_tokens=16)", "16"), "generation of class ThaiQuiz is 16, expected such as"),
    "files": (('{"th": "thai_quiz.jsonl"}', '"thai_quiz.jsonl"'), "ThaiQuiz needs files, as in"),
    "language": (('{"th":', '{"thai":'), "unknown language tag 'thai'"),
    "import": (("from eval.bench.reading", "from eval.bench.readings"), "line 2: ModuleNotFoundError: "),
    "syntax": (("class ThaiQuiz(OwnTask):", "class ThaiQuiz(OwnTask)"), "line 6: SyntaxError: "),
    "exit": (("class ThaiQuiz", "raise SystemExit(3)\n\n\nclass ThaiQuiz"), "line 6: SystemExit: 3"),
    "prompt raises": (("row['question']", "row['frage']"), "line 16: KeyError: 'frage'; correct the file (document"),
    "prompt gives a text": (("document.images)", "document.images).text"), "in ThaiQuiz.prompt gave"),
    "score raises": (("read = letter(", "read = 1 / 0 or ("), "line 20: ZeroDivisionError: division by zero"),
    "score": (("return self.mean_score(read, acc=read == row[\"answer\"], unreadable=read is None)", "return 1.0"),
              " in ThaiQuiz.score gave 1.0, expected Scored or Failed"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CODE_MISTAKES.values(), ids=CODE_MISTAKES)
def test_mistakes_of_a_class_are_told_in_a_sentence(example, monkeypatch, capsys, change, message):
    text = (example / "thai_quiz.py").read_text("utf-8")
    assert text.count(change[0]) == 1
    (example / "thai_quiz.py").write_text(text.replace(*change), "utf-8")
    monkeypatch.setattr(run, "_open_model", lambda args: Scripted())
    flags = [f"--include={example / 'thai_quiz.py'}", "--tasks=thai_quiz"]
    assert run.main([*flags, f"--output_path={example / 'out'}", "--model=sample"]) == 2
    said = capsys.readouterr().err
    assert message in said and "thai_quiz.py" in said and "Traceback" not in said
    assert sum("eval/run.py: " in line or "run.py: " in line for line in said.splitlines()) == 1


def test_a_class_may_have_an_abstract_base(example):
    text = (example / "thai_quiz.py").read_text("utf-8")
    text = text.replace(
        "class ThaiQuiz(OwnTask)", "class Base(OwnTask):\n    pass\n\n\nclass ThaiQuiz(Base)"
    )
    (example / "thai_quiz.py").write_text(text, "utf-8")
    (dataset,) = inclusion.read([example / "thai_quiz.py"])
    assert dataset.name == "thai_quiz"


def test_files_that_cannot_be_included(tmp_path, capsys):
    _own(tmp_path, CHOICE, [ROW])
    (tmp_path / "twice.yaml").write_text((tmp_path / "mine.yaml").read_text("utf-8"))
    with pytest.raises(DataError, match="'mine' is taken by another file of --include"):
        inclusion.read([tmp_path])
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "task.py").write_text("raise SystemError('never run')")
    with pytest.raises(DataError, match=r"no \.yaml file in this folder; name Python files one by"):
        inclusion.read([tmp_path / "code"])
    with pytest.raises(DataError, match=r"task\.py, line 1: SystemError: never run"):
        inclusion.read([tmp_path / "code" / "task.py"])
    (tmp_path / "code" / "task.py").write_text("x = 1")
    with pytest.raises(DataError, match=r"no task in it; expected a class derived from .*OwnTask"):
        inclusion.read([tmp_path / "code" / "task.py"])
    for name, message in (("gone.yaml", "no such file"), ("mine.jsonl", r"expected a \.yaml or")):
        with pytest.raises(DataError, match=message):
            inclusion.read([tmp_path / name])
    for address in ("gs://bucket/x.yaml", str(tmp_path / "gone.yaml")):
        assert run.main(["--list", f"--include={address}"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_titles_and_answers_are_inert(tmp_path, write_jsonl, capsys, text):
    text = text.encode("utf-8", "replace").decode()[:2_000]
    _own(tmp_path, CHOICE | {"task_alias": text}, [ROW | {"id": f"a{text}"}, ROW | {"id": "b"}])
    file = write_jsonl(tmp_path / "r.jsonl", [{"task": "mine_en", "doc_id": "b", "response": text}])
    flags = [f"--include={tmp_path / 'mine.yaml'}", "--tasks=mine", f"--responses={file}"]
    assert run.main([*flags, f"--output_path={tmp_path / 'out'}", f"--name={text}"]) == 1
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    markdown = (tmp_path / "out" / "report.md").read_text("utf-8")
    printed = "".join(capsys.readouterr())
    assert "<" not in markdown and not ACTIVE.search(markdown + page + printed)
    assert "script" not in active_parts(page)[0]
