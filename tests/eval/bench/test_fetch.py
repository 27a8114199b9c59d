"""Rows as the hub has them become documents that every task can ask about and score."""

import base64
import io
import math

import pytest
from PIL import Image
from rich.console import Console

from eval.bench import documents, fetch, tasks
from eval.bench.documents import load
from eval.bench.task import Scored


def _png(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = {"bytes": _png(), "path": None}
RUBRIC = {"criteria": "c"} | {f"score{i}_description": "d" for i in range(1, 6)}
# Task: (a row of the hub, a right response, part of the prompt).
HUB = {
    "xchat_hi": (
        {"task": "ocr", "instance_idx": 0, "system_prompt": "S", "input": "I", "reference_answer": "R"}
        | {"score_rubric": RUBRIC, "image": PICTURE},
        None,
        "S\n\nI",
    ),
    "m_llavabench_ur": (
        {"question_id": 7, "text": "Q", "caption": ["a", "b"], "gpt_answer": "G"}
        | {"category": "conv", "image": PICTURE},
        None,
        "Q",
    ),
    "cvqa_ind-id": (
        {"ID": "1", "Subset": "('Indonesian', 'Indonesia')", "Question": "Apa?", "Label": 2}
        | {"Options": ["w", "x", "y", "z"], "Translated Question": "What?", "image": PICTURE},
        "C",
        "Question: Apa? \n\n Options: A. w\nB. x\nC. y\nD. z \n\n Answer with the option's letter",
    ),
    "marvl_sw": (
        {"id": "sw-1", "image": PICTURE, "conversations": [
            {"value": "Does the content of the image support the given text? Text: Kuna paka.\n"
             "Options: (a) false (b) true"},
            {"value": "true"},
        ]},
        "(b) true",
        "Text: Kuna paka.\nOptions: (a) false (b) true. Answer with the option directly.",
    ),
    "xm100_quz": (
        {"image_id": "a1", "caption": "Huk runa", "image": PICTURE},
        "huk runa",
        "Provide a one-sentence caption for the provided image in Quechua.",
    ),
    "xgqa_bn": (
        {"question": "কে?", "answer": "man", "image_id": "1", "image": PICTURE},
        "Man.",
        "কে? Answer the question using a single word or phrase in English.",
    ),
    "maxm_he": (
        {"question": "מי?", "answers": ["כלב"], "image_id": "1", "image": PICTURE},
        "כלב",
        "a concise answer. מי?\nAnswer the question using a single word or phrase in Hebrew.",
    ),
    "xmmmu_id": (
        {"id": "v_1", "question": "<image 2> lalu <image 1>?", "options": "['a\n b', 'c']"}
        | {"answer": "B", "question_type": "multiple-choice"}
        | {"image_1": {"bytes": _png("blue")}, "image_2": PICTURE, "image_3": None},
        "(B)",
        "<image> lalu <image>?\nA. a  b\nB. c\nAnswer with the option letter from",
    ),
    "m3exam_th": (
        {"question_text": "ดู (image)[p1.png]", "background_description": ["(image)[bg.png]"]}
        | {"options": ["1. ก", "2. ข"], "answer_text": "2", "subject_category": "math"}
        | {"image_0": base64.b64encode(_png("blue")).decode(), "image_1": PICTURE, "image_2": "None"},
        "B",
        "\n\n\n<image>\nดู <image>\n(A) ก\n(B) ข\nคำตอบ:",
    ),
    "tydiqa_sw": (
        {"id": "swahili-1-1", "context": "C", "question": "Q", "answers": {"text": ["Dar", "Dar"]}},
        "Dar",
        "Kifungu: C\nSwali: Q\nJibu:",
    ),
    "flores_en-ja": (
        {"id": 3, "sentence_eng_Latn": "A cat.", "sentence_jpn_Jpan": "猫。"},
        "猫。",
        "English sentence to Japanese.\nA cat.",
    ),
    "xstorycloze_my": (
        {f"input_sentence_{i}": f"S{i}." for i in range(1, 5)}
        | {"sentence_quiz1": "x", "sentence_quiz2": "y", "answer_right_ending": 2},
        [-2.0, -1.0],
        "S1. S2. S3. S4.",
    ),
    "mgsm_te": (
        {"question": "ఎన్ని?", "answer": None, "answer_number": 2125},
        "సమాధానం 2,125.",
        "ప్రశ్న: ఎన్ని?\nదశలవారీగా సమాధానం:",
    ),
    "mmmlu_yo": (
        {"Question": "Q", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "D", "Subject": "college_law"},
        [-4.0, -4.0, -4.0, -1.0],
        "about college law (Yoruba).\n\nQ\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
    ),
    "mmmlu_en": (
        {"question": "Q", "choices": ["1", "2"], "answer": 1, "subject": "virology"},
        [-4.0, -1.0],
        "about virology.\n\nQ\nA. 1\nB. 2\nAnswer:",
    ),
}  # fmt: skip


def _fetch(name, folder, rows):
    task = tasks.select([name])[0]
    code = fetch.fetch([task], folder, console=Console(quiet=True), load=lambda source: iter(rows))
    return task, code


def test_every_data_set_is_here():
    assert {tasks.ALL_TASKS[name].dataset.name for name in HUB} == set(tasks.DATASETS)


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("profile", ["paper", "fixed"])
def test_hub_rows_become_documents(name, profile, tmp_path):
    row, response, expected = HUB[name]
    task, code = _fetch(name, tmp_path, [row])
    assert code == 0
    (document,) = load(task, tmp_path)
    prompt = task.dataset.prompt(document, task.subset, profile)
    if not (name == "m3exam_th" and profile == "paper"):
        assert expected in prompt.text
    for path in document.images:
        assert (tmp_path / task.dataset.name / path).is_file()
    if response is not None:
        scored = task.dataset.score(document, response, task.subset, profile, None)
        assert isinstance(scored, Scored)
        assert scored.metrics[task.dataset.metric] == pytest.approx(1.0)


def test_pictures_follow_their_marks(tmp_path):
    for name in ("xmmmu_id", "m3exam_th"):
        task, _ = _fetch(name, tmp_path, [HUB[name][0]])
        (document,) = load(task, tmp_path)
        prompt = task.dataset.prompt(document, task.subset, "fixed")
        folder = tmp_path / task.dataset.name
        colours = [Image.open(folder / path).getpixel((0, 0)) for path in prompt.images]
        expected = [(255, 0, 0), (0, 0, 255)]  # red, blue: the order of the marks in the text
        assert colours == (expected if name == "xmmmu_id" else expected[::-1])


def test_paper_prompt_of_m3exam_has_one_mark(tmp_path):
    task, _ = _fetch("m3exam_th", tmp_path, [HUB["m3exam_th"][0]])
    (document,) = load(task, tmp_path)
    prompt = task.dataset.prompt(document, task.subset, "paper")
    assert prompt.text.count("<image>") == 1 and len(prompt.images) == 2


def test_a_picture_in_two_languages_is_stored_once(tmp_path):
    for name in ("xgqa_bn", "xgqa_de"):
        _fetch(name, tmp_path, [HUB["xgqa_bn"][0]])
    assert len(list((tmp_path / "xgqa" / "images").iterdir())) == 1


def test_a_broken_source_costs_only_its_own_task(tmp_path, capsys):
    chosen = tasks.select(["mgsm_te", "xgqa_bn"])
    rows = {"juletxara/mgsm": [HUB["mgsm_te"][0]], "neulab/PangeaBench-xgqa": [{"question": "?"}]}
    console = Console(soft_wrap=True)
    code = fetch.fetch(
        chosen, tmp_path, console=console, load=lambda source: iter(rows[source.path])
    )
    assert code == 1
    shown = capsys.readouterr().out
    assert "mgsm_te: 1 documents" in shown
    assert "row 0 has no field 'answer'; it has question" in shown
    assert not (tmp_path / "xgqa" / "bn.jsonl").exists()


def test_a_source_of_several_tasks_is_read_once(tmp_path, capsys):
    """One whose rows are broken costs itself only, one that has its rows is written though the source breaks."""
    row, read = HUB["cvqa_ind-id"][0] | {"Translated Options": ["w", "x", "y", "z"]}, []
    hidden = row | {"Subset": "('Swahili', 'Kenya')", "Label": -1}

    def rows(source):
        read.append(source)
        yield from [row, hidden, row | {"ID": "2"}]
        raise ConnectionError("gone")

    names = "cvqa_ind-id", "cvqa_translated-ind-id", "cvqa_ke-sw", "cvqa_in-ta"
    chosen, console = tasks.select(names), Console(soft_wrap=True)
    assert fetch.fetch(chosen, tmp_path, console=console, limit=1, load=rows) == 1
    assert len(read) == 1
    shown = capsys.readouterr().out
    assert "cvqa_ind-id: 1 documents, not all" in shown
    assert "cvqa_translated-ind-id: 1 documents, not all" in shown
    assert "this copy hides its answers" in shown and "ConnectionError: gone" in shown
    written = {path.name for path in (tmp_path / "cvqa").glob("*.jsonl")}
    assert written == {"ind-id.jsonl", "translated-ind-id.jsonl"}


def test_hidden_labels_are_no_option(tmp_path, capsys):
    row = HUB["cvqa_ind-id"][0] | {"Label": -1}
    task = tasks.select(["cvqa_ind-id"])
    console = Console(soft_wrap=True)
    assert fetch.fetch(task, tmp_path, console=console, load=lambda source: iter([row])) == 1
    assert "this copy hides its answers" in capsys.readouterr().out


def test_limit_and_files_that_are_there(tmp_path):
    """A file that a limit has cut is written again where more rows are asked for."""
    (task,) = tasks.select(["mgsm_te"])
    asked = []

    def rows(source):
        asked.append(source)
        return iter([HUB["mgsm_te"][0]] * 5)

    for limit, there, again in ((2, 2, True), (1, 2, False), (3, 3, True), (None, 5, True)):
        asked.clear()
        fetch.fetch([task], tmp_path, console=Console(quiet=True), limit=limit, load=rows)
        assert (len(load(task, tmp_path)), bool(asked)) == (there, again)
        assert documents.rows_fetched(documents.task_file(task, tmp_path)) == (
            there if there < 5 else math.inf
        )


def test_files_with_all_rows_are_not_asked_for_again(tmp_path):
    """Though a limit was given that takes them all."""
    (task,) = tasks.select(["mgsm_te"])
    quiet = Console(quiet=True)
    fetch.fetch(
        [task], tmp_path, console=quiet, limit=1, load=lambda source: iter([HUB["mgsm_te"][0]])
    )
    for limit in (None, 1, 2):
        fetch.fetch(
            [task],
            tmp_path,
            console=quiet,
            limit=limit,
            load=lambda source: pytest.fail("asked again"),
        )


@pytest.mark.parametrize("limit", [0.5, 2.5])
def test_fetch_takes_a_number_of_rows(tmp_path, limit):
    with pytest.raises(documents.DataError, match=f"--limit={limit}: fetch takes a number of rows"):
        fetch.fetch(tasks.select(["mgsm_te"]), tmp_path, console=Console(quiet=True), limit=limit)


def test_a_picture_that_is_cut_short_is_not_there(tmp_path, monkeypatch):
    def killed(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch.save_picture(_png(), tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "images").glob("*.png"))
    assert Image.open(tmp_path / fetch.save_picture(_png(), tmp_path)).size == (6, 4)


def test_rows_come_through_the_datasets_package(tmp_path):
    """A data set in a local folder stands for one on the hub: same call, pictures stay encoded."""
    datasets = pytest.importorskip("datasets", reason="datasets is in requirements-eval.txt")
    rows = {"question": ["কে?"], "answer": ["man"], "image": [PICTURE]}
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string")}
        | {"image": datasets.Image()}
    )
    stored = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "hub").mkdir()
    stored.to_parquet(tmp_path / "hub" / "bn-0.parquet")
    source = fetch.Source(str(tmp_path / "hub"), None, "train")
    (row,) = fetch.load_from_hub(source)
    assert row["image"]["bytes"] == PICTURE["bytes"]
    task, code = _fetch("xgqa_bn", tmp_path, [row])
    assert code == 0 and load(task, tmp_path)[0].row["answer"] == "man"
