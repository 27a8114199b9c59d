"""xChatBench end to end: published responses and judgements give the published table."""

import collections
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import run
from eval.bench.metrics import language_rule
from eval.bench.tasks import xchat

RUN = Path(run.__file__)
MODELS = (
    "pangea-7b",
    "gemini-1.5-pro",
    "llava-v1.6-vicuna-7b-hf",
    "mblip-bloomz-7b",
    "paligemma-3b-mix-448",
)


@pytest.fixture(scope="module")
def stored(bench, read_jsonl, write_jsonl, tmp_path_factory):
    """model -> (file of responses, file of judge's replies)."""
    rows = collections.defaultdict(lambda: ([], []))
    for row in read_jsonl(bench / "xchat" / "judged_responses.jsonl.gz"):
        where = {
            "task": f"xchat_{row['lang']}",
            "doc_id": f"{row['task']}/{row['instance_idx']}",
        }
        responses, replies = rows[row["model"]]
        responses.append(where | {"response": row["response"] or ""})
        replies.append(where | {"reply": row["feedback"]})
    folder = tmp_path_factory.mktemp("stored")
    return {
        model: (
            write_jsonl(folder / model / "responses.jsonl", responses),
            write_jsonl(folder / model / "replies.jsonl", replies),
        )
        for model, (responses, replies) in rows.items()
    }


def _flags(stored, data, output, model):
    responses, replies = stored[model]
    return [
        "--tasks="
        + ",".join(f"xchat_{code}" for code in ("en", "es", "hi", "id", "ja", "ko", "zh")),
        "--profile=paper",
        f"--responses={responses}",
        f"--judge=replay:{replies}",
        f"--data_dir={data}",
        f"--output_path={output}",
    ]


@pytest.mark.parametrize("model", MODELS)
def test_table_2_is_reproduced(model, stored, xchat_data, golden, tmp_path):
    assert run.main(_flags(stored, xchat_data, tmp_path, model)) == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    expected = golden("xchat_scores.json")[model]
    scores = results["datasets"]["xchat"]["paper"]
    en, mul = expected["published_table2_en_mul"]
    # v3 of the paper prints PANGEA's score without the language rule, 35.8; with it, as for all others, 35.6.
    assert [round(scores[column]["score"], 1) for column in ("en", "mul")] == [en, mul]
    assert scores["mul"]["score"] == pytest.approx(expected["mul_penalised"], abs=1e-4)
    for code, row in expected["per_language"].items():
        if code != "rw":
            task = results["tasks"][f"xchat_{code}"]["paper"]
            assert task["n"] == 50
            assert task["score"] == pytest.approx(row["penalised"])
            assert 100 * task["metrics"]["raw_points"] == pytest.approx(row["raw"])


def test_the_command_as_a_user_types_it(stored, xchat_data, tmp_path):
    flags = _flags(stored, xchat_data, tmp_path, "pangea-7b")
    command = [sys.executable, str(RUN), *flags, "--limit=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "xChatBench" in done.stdout
    assert "329 responses" in done.stdout  # of 350, 21 were asked for
    for name in ("results.json", "report.md", "report.html", "languages.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_langdetect_labels(bench, golden, read_jsonl):
    rows = read_jsonl(bench / "xchat" / "judged_responses.jsonl.gz")
    expected = golden("xchat_langdetect.jsonl.gz")
    for row, label in list(zip(rows, expected, strict=True))[::7]:
        detected = label["detected"]
        if detected == "unknown":
            with pytest.raises(language_rule.NoLanguageError):
                language_rule.langdetect_label(row["response"] or "")
        else:
            assert language_rule.langdetect_label(row["response"]) == detected


def test_paper_language_rule_takes_the_most_frequent_label(monkeypatch):
    labels = ["ja", "zh-cn", "zh-tw", "zh-cn", "ko", "zh-cn", "ja", "zh-tw", "ko"]
    monkeypatch.setattr(language_rule, "langdetect_label", lambda text, seed: labels[seed])
    assert language_rule.is_langdetect_language("...", "zh")
    assert not language_rule.is_langdetect_language("...", "ja")


def test_fixed_language_rule_sees_kinyarwanda(bench, read_jsonl):
    rows = read_jsonl(bench / "xchat" / "judged_responses.jsonl.gz")
    own = [r["response"] for r in rows if r["model"] == "mblip-bloomz-7b" and r["lang"] == "rw"]
    assert sum(language_rule.is_language(text, "rw") for text in own) > 40
    assert not any(language_rule.is_langdetect_language(text, "rw") for text in own)


def test_published_grades(bench, read_jsonl):
    rows = list(read_jsonl(bench / "xchat" / "judged_responses.jsonl.gz"))
    assert [xchat.paper_grade(row["feedback"]) for row in rows] == [row["score"] for row in rows]
    # Three were recorded from a phrase inside the feedback, one stands for no feedback at all.
    fixed = [xchat.read_grade(row["feedback"]) == row["score"] for row in rows]
    assert fixed.count(False) == 4


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("It is good. [RESULT] 4", 4),
        ("Far from a score of 5.\n\n[RESULT] 2", 2),
        ("So the score is\n\n**Score: 3/5**", 3),
        ("[SCORE] (1)", 1),
        ("Result: 5 out of 5.", 5),
        ("It deserves a score of 1 under the given rubric.\n\n1", 1),
        ("It is fine.\n\n**3**\n", 3),
        ("It is fine.\n\n7", None),
        ("[RESULT] 7", None),
        ("[RESULT] 4 because it is good", None),
        ("No Feedback", None),
        ("", None),
    ],
)
def test_grades(reply, grade):
    assert xchat.read_grade(reply) == grade


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("It is good. [RESULT] 4", 4),
        # The first score counts, if a space, a bracket or the end follows it.
        ("It misses a score of 3 or higher. [RESULT] 1", 3),
        ("It gets a score of 4 because it lacks depth. [RESULT] 3", 4),
        ("Like a score 2 response or above.\n\n[RESULT] 1", 2),
        ("Below a Score 2. [RESULT] 1", 1),
        ("It has a score of 1 under the given rubric.\n\n1", 1),
        ("[RESULT]: (4) and more", 4),
        ("Score: 3/5, I think", 3),
        # A 5 counts only at the end.
        ("To achieve a score of 5 according to the rubric.\n\n[RESULT] 4", 4),
        ("It deserves a score of 5 for this.\n\n[RESULT] 5", 5),
        ("It deserves a score of 5 for this", 5),
        ("GPT-4 has a score of 74 here. [RESULT] 3", 3),
        ("[RESULT] " + "9" * 5000, None),
        ("No Feedback", 1),
        ("", None),
    ],
)
def test_published_grades_are_the_first(reply, grade):
    assert xchat.paper_grade(reply) == grade


@pytest.mark.parametrize(
    "text", ["score " * 2000, "score" + " " * 10000, "[RESULT] " + "\ud800(" * 4000, "\n*" * 5000]
)
def test_grades_of_long_replies_are_fast(text):
    start = time.perf_counter()
    assert xchat.read_grade(text) is xchat.paper_grade(text) is None
    assert time.perf_counter() - start < 0.1
