"""Reports do not flatter: what is partial is marked beside each score, and no interval is a point."""

import json

import numpy as np
import pytest

from eval import run
from eval.bench import marks, report, scoring
from eval.bench.metrics import bootstrap
from eval.bench.task import Document, Scored
from eval.bench.tasks import ALL_TASKS

IDS = tuple(range(30))


def _rows(language="en", wrong=(), ids=IDS):
    where = f"mgsm_{language}"
    texts = {i: f"The answer is {i + (i in wrong)}." for i in ids}
    return [{"task": where, "doc_id": str(i), "response": text} for i, text in texts.items()]


def _run(folder, data_dir, write_jsonl, rows, *flags, tasks="mgsm_en,mgsm_sw"):
    file = write_jsonl(folder.parent / f"{folder.name}.jsonl", rows)
    words = [f"--tasks={tasks}", f"--responses={file}", f"--data_dir={data_dir}"]
    code = run.main([*words, f"--output_path={folder}", *flags])
    return code, json.loads((folder / "results.json").read_text("utf-8"))


CASES = {
    "limit": (
        ["--limit=5"],
        0,
        "†",
        "† only the first documents of a task were asked (--limit=5).",
    ),
    "settings": (
        ["--gen_kwargs=max_new_tokens=8"],
        0,
        "‡",
        "‡ asked with other generation settings than the task's own (--gen_kwargs=max_new_tokens=8).",
    ),
    "missing": (
        [],
        2,
        "§",
        "§ some documents have no score and are left out of the mean; n counts",
    ),
    "all": (["--limit=5", "--gen_kwargs=temperature=1"], 2, "†‡§", "(--limit=5)"),
}


@pytest.mark.parametrize(("flags", "missing", "signs", "legend"), CASES.values(), ids=CASES)
def test_every_score_has_its_sign(
    data_dir, tmp_path, write_jsonl, capsys, flags, missing, signs, legend
):
    rows = _rows(wrong=(4,))[missing:] + _rows("sw", wrong=(4,))[missing:]
    folder = tmp_path / "out"
    code, results = _run(folder, data_dir, write_jsonl, rows, *flags)
    assert code == (1 if missing else 0)
    printed = capsys.readouterr().out
    page, html = ((folder / f"report.{end}").read_text("utf-8") for end in ("md", "html"))
    n = (5 if "--limit=5" in flags else 30) - missing
    score = f"{100 * (n - 1) / n:.1f}{signs} ["
    # Main table: two profiles and two columns; each of the two tables by language: two profiles.
    for text, least in ((page, 8), (html, 8), (printed, 4)):
        assert text.count(score) >= least // 2 and f"] n={n}" in text.replace("\n", " ")
    assert f"All documents together: {100 * (n - 1) / n:.1f}{signs}." in page
    assert f"*{signs} |" in page.split("## Text")[1].split("##")[0]  # AVG
    for text in (page, html.replace("&#x27;", "'"), " ".join(printed.split())):
        assert legend[:60] in text
    figure = report.plot_languages([results])
    assert figure.axes[0].get_title().endswith(f" {signs}")
    assert legend[:30] in figure.get_supxlabel()
    figure.draw_without_rendering()
    drawn = figure._supxlabel.get_window_extent()
    assert drawn.x1 <= figure.bbox.x1
    assert {marks.of_task(results, name, "fixed") for name in results["tasks"]} == {signs}


def test_what_is_whole_has_no_sign(data_dir, tmp_path, write_jsonl, capsys):
    rows = _rows(wrong=(4,)) + _rows("sw")
    # A limit that cuts nothing, and the task's own setting.
    flags = ["--limit=30", "--gen_kwargs=max_new_tokens=256"]
    _, results = _run(tmp_path / "out", data_dir, write_jsonl, rows, *flags)
    text = (tmp_path / "out" / "report.md").read_text("utf-8") + capsys.readouterr().out
    assert not {*"†‡§"} & {*text} and marks.legend([results]) == []


def test_only_the_touched_tasks_have_a_sign(data_dir, tmp_path, write_jsonl):
    _, results = _run(tmp_path / "out", data_dir, write_jsonl, _rows() + _rows("sw")[1:])
    page = (tmp_path / "out" / "report.md").read_text("utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| out | fixed |"))
    assert "100.0 [" in row and "100.0§ [" in row and "n=30" in row and "n=29" in row
    assert marks.of_dataset(results, "mgsm", "fixed", "en") == ""
    assert marks.of_dataset(results, "mgsm", "fixed") == "§"


def test_a_file_that_fetch_has_cut_is_marked(data_dir, tmp_path, write_jsonl):
    (data_dir / "mgsm" / "sw.jsonl.limited").touch()
    _, results = _run(tmp_path / "out", data_dir, write_jsonl, _rows() + _rows("sw"))
    assert [marks.of_task(results, f"mgsm_{c}", "fixed") for c in ("en", "sw")] == ["", "†"]
    assert "files cut by fetch --limit" in marks.legend([results])[0]


def test_results_of_earlier_versions_are_marked(data_dir, tmp_path, write_jsonl):
    _, results = _run(tmp_path / "out", data_dir, write_jsonl, _rows() + _rows("sw"), "--limit=4")
    for name in ("limited", "changed", "left_out", "name", "include"):
        del results["config"][name]
    del results["name"]
    assert marks.of_task(results, "mgsm_en", "fixed") == "†"
    (tmp_path / "out" / "results.json").write_text(json.dumps(results), "utf-8")
    assert run.main(["report", str(tmp_path / "out"), f"--output_path={tmp_path / 'r'}"]) == 0


@pytest.mark.parametrize(("wrong", "value"), [((), 100), (range(30), 0)])
def test_no_interval_is_a_point(data_dir, tmp_path, write_jsonl, wrong, value):
    rows = _rows(wrong=wrong) + _rows("sw", wrong=wrong) + _rows("bn", wrong=wrong)
    _, results = _run(
        tmp_path / "out", data_dir, write_jsonl, rows, tasks="mgsm_en,mgsm_sw,mgsm_bn"
    )
    wanted = [88.65, 100] if value else [0, 11.35]  # Wilson for 30 of 30
    entries = [results["tasks"]["mgsm_en"]["fixed"]]
    entries += [results["datasets"]["mgsm"]["fixed"][column] for column in ("en", "mul")]
    for entry in entries:
        assert entry["score"] == value and entry["interval"] == pytest.approx(wanted, abs=0.01)


def _scores(task, values):
    dataset = ALL_TASKS[task].dataset
    made = {
        str(i): (Document(str(i), {}), Scored("", {dataset.metric: v}, (v, 1.0)))
        for i, v in enumerate(values)
    }
    return scoring.TaskScores(ALL_TASKS[task], "fixed", made)


def test_intervals_of_scores_that_are_all_the_same():
    """Wilson (1927): 1 of 1 is 20.7 to 100, and half of ten 23.7 to 76.3."""
    found = scoring.intervals([_scores("xm100_en", [1.0]), _scores("xm100_sw", [0.5] * 10)])
    assert found["en"] == pytest.approx((20.65, 100), abs=0.01) == found["EN"]
    assert found["sw"] == pytest.approx((23.66, 76.34), abs=0.01) == found["MUL"]
    # The column of one subset that varies and one that does not is wider than the bootstrap alone.
    varied, same = _scores("mgsm_sw", [0, 1] * 15), _scores("mgsm_bn", [1.0] * 30)
    draws = scoring.draws([varied, same])
    plain = bootstrap.interval(draws["MUL"])
    low, high = scoring.intervals([varied, same])["MUL"]
    assert low == pytest.approx(plain[0] - 11.35 / 2, abs=0.01) and high == plain[1]
    ratio = _scores("m_llavabench_en", [1.0] * 5)
    ratio.scored = {k: (d, Scored("", {}, (8.0, 10.0))) for k, (d, _) in ratio.scored.items()}
    assert np.isnan(scoring.intervals([ratio])["en"]).all()


def test_compare_says_what_it_leaves_out(data_dir, tmp_path, write_jsonl, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    _run(a, data_dir, write_jsonl, _rows()[3:] + _rows("sw"), tasks="mgsm_en,mgsm_sw")
    flags = ["--limit=20", "--gen_kwargs=temperature=1", "--profile=paper"]
    rows = _rows(wrong=range(0)) + _rows("bn")
    _run(b, data_dir, write_jsonl, rows, *flags, tasks="mgsm_en,mgsm_bn")
    capsys.readouterr()
    assert run.main(["compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert f"left out, only in {a}: mgsm_sw" in said and f"left out, only in {b}: mgsm_bn" in said
    assert "mgsm_en: 17 documents compared; " in said
    assert f"10 scored in {a} only" in said and f"3 scored in {b} only" in said
    assert f"3 without a score in {a}" in said
    assert "different --limit: none and 20" in said
    assert "different --gen_kwargs: none and temperature=1" in said
    assert "different --profile: fixed and paper" in said
    assert "[-18.4, +18.4]" in said  # all equal: Wilson for 0 of 17
    assert run.main(["compare", str(a), str(a)]) == 0
    assert "left out" not in capsys.readouterr().out


def test_models_have_names(data_dir, tmp_path, write_jsonl, capsys):
    folders = [tmp_path / x / "run" for x in ("one", "two")]
    for folder in folders:
        folder.parent.mkdir()
        _run(folder, data_dir, write_jsonl, _rows(), tasks="mgsm_en")
    words = ["report", *map(str, folders), f"--output_path={tmp_path / 'both'}"]
    assert run.main(words) == 0
    page = (tmp_path / "both" / "report.md").read_text("utf-8")
    for folder in folders:
        assert f"| run ({folder}) | fixed | 100.0" in page
    assert run.main([*words, "--name=Mine", "--name=Theirs"]) == 0
    page = (tmp_path / "both" / "report.md").read_text("utf-8")
    assert "| Mine | fixed | 100.0" in page and "| Theirs | fixed |" in page and "| run" not in page
    assert run.main([*words, "--name=Mine"]) == 2
    assert "report got 1 --name for 2 folders" in capsys.readouterr().err
    assert run.main(["report", str(folders[0]), str(folders[0]), words[-1]]) == 0
    page = (tmp_path / "both" / "report.md").read_text("utf-8")
    assert f"| run ({folders[0]}) | fixed" in page and f"| run ({folders[0]}) 2 | fixed" in page
    _, results = _run(folders[0], data_dir, write_jsonl, _rows(), "--name=Mine", tasks="mgsm_en")
    assert (results["name"], results["model"]) == ("Mine", "run")
    assert run.main(["rescore", str(folders[0])]) == 0
    page = (folders[0] / "report.md").read_text("utf-8")
    assert "| Mine | fixed | 100.0" in page and "| run |" not in page
    assert run.main(["compare", *map(str, folders), "--name=x"]) == 2
    assert "compare does not take --name" in capsys.readouterr().err
