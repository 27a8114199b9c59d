"""Tables and figures show the right numbers."""

import io
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

from pangea_jax import languages
from pangea_jax.figures import style as fig
from pangea_jax.sample.answer_sheet import answer_sheet
from pangea_jax.sample.figures import plot_languages, plot_tasks
from pangea_jax.sample.loss_curve import plot_loss
from pangea_jax.sample.scores import BLIND, SCORES, AnswerExample, same_text, wilson_interval
from pangea_jax.sample.tables import results_table, timing_table

EIGHT = ("en", "ar", "es", "hi", "ru", "sw", "te", "zh")


def _results(codes=EIGHT):
    rng = np.random.default_rng(0)

    def scores():
        values = {s.metric: rng.uniform(s.chance, 1.0) for s in SCORES}
        floors = {BLIND + s.metric: s.chance + 0.004 for s in SCORES}
        return values | floors | {"n": 283}

    splits = {}
    for split in ("seen_artwork", "unseen_artwork"):
        rows = {code: scores() for code in codes}
        others = [row for code, row in rows.items() if code != "en"]
        mean = {name: float(np.mean([row[name] for row in others])) for name in others[0]}
        splits[split] = {"multilingual": mean, "languages": rows}
        if "en" in rows:
            splits[split]["english"] = rows["en"]
    examples = {code: 400 if code == "en" else 100 for code in codes}
    return {"splits": splits, "mixture": {"examples_per_language": examples}}


def _text(table, width=140):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def drawn(monkeypatch):
    """The saved figures, so that tests can inspect them."""
    figures = []
    save = fig.save

    def keep_and_save(figure, stem):
        figures.append(figure)
        return save(figure, stem)

    monkeypatch.setattr(fig, "save", keep_and_save)
    return figures


def _check_files(paths, name):
    png, svg = paths
    assert (png.name, svg.name) == (f"{name}.png", f"{name}.svg")
    with Image.open(png) as image:
        assert np.asarray(image.convert("L")).std() > 5
    root = ElementTree.parse(svg).getroot()
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20


def _texts(figure):
    return [t for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text().strip()]


def _check_nothing_is_cut_off(figure):
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    width, height = figure.get_size_inches()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_wilson_interval_equals_the_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def _cells(text, start):
    """The cells of the only line that begins with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {start} ")]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_the_table_has_every_language_its_floors_and_chance():
    results = _results()
    text = _text(results_table(results))
    both = list(results["splits"].values())
    assert _cells(text, "Swahili (sw)") == [
        "Swahili (sw)",
        *(
            " / ".join(f"{100 * s['languages']['sw'][score.metric]:3.0f}" for s in both).strip()
            for score in SCORES
        ),
        "100",
    ]
    mean = [100 * split["multilingual"]["yes_no_accuracy"] for split in both]
    assert f"{mean[0]:3.0f} / {mean[1]:3.0f}".strip() in _cells(text, "mean of 7 others")
    floors = ["0 /   0", "10 /  10", "25 /  25", "50 /  50", "50 /  50"]
    assert _cells(text, "image-blind floor")[1:6] == floors
    assert _cells(text, "chance")[1:6] == ["0", "10", "25", "50", "50"]
    assert _cells(text, "English (en)")[-1] == "400"
    assert text.index("English (en)") < text.index("mean of") < text.index("Arabic (ar)")
    assert "seen artwork / unseen artwork" in text and "283 questions" in text


@pytest.mark.parametrize("codes", [EIGHT, languages.EMOJI], ids=len)
def test_the_table_fits_100_columns(codes):
    results = _results(codes)
    for split in results["splits"].values():
        for row in (*split["languages"].values(), split["multilingual"]):
            row |= {name: 1.0 for name in row if name != "n"} | {BLIND + "exact_match": 1.0}
    results["mixture"]["examples_per_language"] = dict.fromkeys(codes, 1_000_000)
    wide = _text(results_table(results))
    assert max(map(len, wide.splitlines())) <= 100
    # Nothing is left out at that width.
    assert _text(results_table(results), 100).split() == wide.split()
    assert "…" not in wide and len(_cells(wide, "English (en)")) == 7


def test_a_run_from_before_a_score_existed_has_dashes_and_figures(tmp_path, drawn):
    results = _results()
    for split in results["splits"].values():
        for row in (*split["languages"].values(), split["multilingual"]):
            for score in SCORES[2:]:
                del row[score.metric], row[BLIND + score.metric]
    del results["mixture"]
    text = _text(results_table(results))
    for start in ("Swahili (sw)", "mean of 7 others", "image-blind floor"):
        assert _cells(text, start)[3:] == ["– /   –"] * 3
    assert "examples" not in text
    _check_files(plot_languages(results, tmp_path, "Old"), "languages")
    _check_files(plot_tasks(results, tmp_path, "Old"), "tasks")
    assert [len(axes.patches) for axes in drawn[1].axes] == [4, 4]


def test_a_run_without_english_has_a_table_and_a_figure(tmp_path):
    results = _results(("sw", "hi"))
    assert "English" not in _text(results_table(results))
    _check_files(plot_languages(results, tmp_path, "No English"), "languages")
    _check_files(plot_tasks(results, tmp_path, "No English"), "tasks")


@pytest.mark.parametrize("value", [None, 1.5, float("nan")])
def test_a_wrong_score_is_named(value):
    results = _results()
    results["splits"]["seen_artwork"]["languages"]["hi"]["rank_accuracy"] = value
    with pytest.raises(ValueError, match="'seen_artwork', 'hi': rank_accuracy is"):
        results_table(results)


def test_timing_table():
    text = _text(
        timing_table(
            {
                "train step": {"seconds": 61.23, "share": 0.75},
                "total": {"seconds": 81.6, "share": 1.0},
            }
        )
    )
    assert "61.2" in text and "75.0%" in text and "81.6" in text


@pytest.mark.parametrize("codes", [EIGHT, languages.EMOJI], ids=len)
def test_bars_are_as_long_as_the_scores(tmp_path, drawn, codes):
    results = _results(codes)
    _check_files(plot_languages(results, tmp_path, "Test"), "languages")
    (figure,) = drawn
    for axes, metric in zip(figure.axes, ("rank_accuracy", "exact_match"), strict=True):
        lengths = sorted(bar.get_width() for bar in axes.patches)
        splits = results["splits"].values()
        rows = [row for s in splits for row in (*s["languages"].values(), s["multilingual"])]
        assert lengths == pytest.approx(sorted(100 * row[metric] for row in rows))
    _check_nothing_is_cut_off(figure)
    names = [text.get_text() for text in figure.axes[0].texts]
    assert names[0] == "English" and f"mean of {len(codes) - 1} others" in names
    assert {languages.get(code).english_name for code in codes} <= set(names)
    assert f"{100 * 400 / (400 + 100 * (len(codes) - 1)):.1f} %" in names


def test_the_figure_of_the_kinds_of_questions_shows_every_score_floor_and_chance(tmp_path, drawn):
    results = _results()
    _check_files(plot_tasks(results, tmp_path, "Test"), "tasks")
    (figure,) = drawn
    splits = list(results["splits"].values())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["English", "mean of 7 others"]
    for axes, who in zip(figure.axes, ("english", "multilingual"), strict=True):
        found = [bar.get_width() for bar in axes.patches]
        assert found == pytest.approx([100 * s[who][t.metric] for s in splits for t in SCORES])
        marks = [part.get_segments() for part in axes.collections]
        upright = [m[0][0][0] for m in marks if m[0][0][0] == m[0][1][0]]
        floors = [100 * s[who][BLIND + t.metric] for s in splits for t in SCORES]
        assert sorted(upright) == pytest.approx(
            sorted([*floors, *(100 * t.chance for t in SCORES[1:])])
        )
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [score.title for score in SCORES]
    _check_nothing_is_cut_off(figure)


def test_the_same_results_give_the_same_files(tmp_path):
    first = [path.read_bytes() for path in plot_languages(_results(), tmp_path / "a", "Test")]
    second = [path.read_bytes() for path in plot_languages(_results(), tmp_path / "b", "Test")]
    assert first == second


def test_more_splits_than_colours_is_an_error(tmp_path):
    results = _results()
    one = results["splits"]["seen_artwork"]
    results["splits"] = {f"split_{i}": one for i in range(5)}
    with pytest.raises(ValueError, match="5 splits"):
        plot_languages(results, tmp_path, "Test")


def test_the_loss_curve_has_the_logged_values(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    loss = [*np.linspace(5, 1, 100), None]
    lines = [
        {"step": i, "loss": value, "learning_rate": 1e-3 * i, "examples": 32 * (i + 1)}
        for i, value in enumerate(loss)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 101}]))
    _check_files(plot_loss(path, tmp_path), "loss")
    upper, lower = drawn[0].axes
    raw, smooth = (line.get_ydata() for line in upper.lines)
    assert raw[:100] == pytest.approx(loss[:100]) and np.isnan(raw[100])
    assert smooth[50] == pytest.approx(raw[49:52].mean(), abs=0.03)
    assert lower.lines[0].get_ydata()[-1] == pytest.approx(0.1)
    (top,) = upper.child_axes
    assert top.get_xlim() == pytest.approx((0, 3200))
    _check_nothing_is_cut_off(drawn[0])


def test_few_steps_make_one_line_without_a_legend(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 2 + i / 100}) + "\n" for i in range(9)))
    plot_loss(path, tmp_path)
    (axes,) = drawn[0].axes
    assert len(axes.lines) == 1 and not drawn[0].legends
    assert axes.get_ylim()[0] > 1.9  # the axis fits the data


def test_a_long_title_is_not_cut_off(tmp_path, drawn):
    title = "A long title of a run of the sample model with many words " * 3
    plot_languages(_results(), tmp_path, title)
    _check_nothing_is_cut_off(drawn[0])
    assert drawn[0].texts[0].get_text().split() == title.split()


def test_unusable_metrics_are_an_error_that_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected JSON"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no line has a loss"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path)


def _example(answer, truth="قطة", language="ar", **fields):
    picture = np.zeros((8, 8, 3), np.uint8)
    fields = {"picture": picture, "question": "ما هذا؟", "split": "unseen_artwork"} | fields
    return AnswerExample(answer=answer, truth=truth, language=language, **fields)


def test_the_sheet_shows_question_answer_and_truth(tmp_path, drawn):
    examples = [
        _example("قطة"),
        _example("كلب"),
        _example("  caf\u0065\u0301", "café", "fr", question="Quel est cet animal ?"),
        _example("\x00\U00012000" * 40, "猫", "zh", question="图片里是什么"),
        _example("", "பூனை", "ta", question="இது என்ன? " * 20),
    ]
    _check_files(answer_sheet(examples, tmp_path / "sheet", "Test"), "sheet")
    texts = [text.get_text() for text in _texts(drawn[0])]
    assert texts.count("✓") == 2 and texts.count("✗") == 3
    assert {"قطة", "كلب", "ما هذا؟", "猫", "பூனை", "(nothing)", "Arabic · العربية"} <= set(texts)
    assert any(text.startswith("2 of 5 right") for text in texts)
    _check_nothing_is_cut_off(drawn[0])


def test_texts_of_a_card_do_not_run_into_the_next(tmp_path, drawn):
    long = "une très longue réponse qui ne finit pas " * 5
    examples = [_example(long, long, "fr", question=long, split=str(i % 2)) for i in range(8)]
    answer_sheet(examples, tmp_path / "sheet", "Test")
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in _texts(drawn[0])]
    pictures = [axes.get_window_extent() for axes in drawn[0].axes]
    overlaps = [
        (one, other)
        for i, one in enumerate(boxes)
        for other in pictures + [box for box in boxes[:i] if abs(box.x0 - one.x0) > 20]
        if one.overlaps(other)
    ]
    assert not overlaps


@pytest.mark.parametrize(
    ("text", "same"), [(" cafe\u0301\n", True), ("caf\u00e9", True), ("cafe", False)]
)
def test_texts_are_the_same_up_to_unicode_form_and_outer_blanks(text, same):
    assert same_text(text, "caf\u00e9") is same
    assert _example(text, "caf\u00e9", "fr").is_right is same


def test_a_bad_example_is_named(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        answer_sheet([], tmp_path / "sheet", "Test")
    wrong = _example("a", picture=np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"picture of example 1 is uint8 \[8, 8\]"):
        answer_sheet([_example("a"), wrong], tmp_path / "sheet", "Test")
    with pytest.raises(ValueError, match=r"the truth of example 0 \(ar\): U\+12000"):
        answer_sheet([_example("a", "\U00012000")], tmp_path / "sheet", "Test")


def write_metrics(folder, losses, validation=()):
    """metrics.jsonl with these losses, and a validation at some of the steps."""
    lines = [
        {"step": step, "loss": loss, "learning_rate": 1e-3, "examples": 4 * (step + 1)}
        for step, loss in enumerate(losses)
    ]
    for step, value in validation:
        lines[step]["validation/loss"] = value
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_axis_shows_a_small_change_and_both_curves(tmp_path, drawn):
    losses = np.linspace(11.945, 11.865, 10).tolist()
    plot_loss(write_metrics(tmp_path, losses, [(4, 11.9), (9, 11.88)]), tmp_path)
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert (11.945 - 11.865) / (high - low) > 0.7
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["training", "validation", "best: 11.88 after step 10"]
    points = {len(line.get_xdata()) for line in axes.get_lines()}
    assert points == {10, 2, 1}


def test_a_large_change_is_drawn_on_a_logarithmic_axis(tmp_path, drawn):
    plot_loss(write_metrics(tmp_path, [12.0, 6.0, 2.0, 1.9]), tmp_path)
    assert drawn[0].axes[0].get_yscale() == "log"
    plot_loss(write_metrics(tmp_path, [3.0, 2.0]), tmp_path)
    assert drawn[1].axes[0].get_yscale() == "linear"
