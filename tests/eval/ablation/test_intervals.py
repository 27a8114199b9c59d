"""Statistics equal published values, and reports claim only what intervals show."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from eval.ablation import curves, intervals, paper, summary
from eval.ablation.intervals import ENGLISH, OTHERS, SweepError
from pangea_jax.work import paths
from tests.launch.conftest import call

CODES = ("en", "es", "sw", "ru", "ar", "hi", "zh", "ko")
SHARES = {"en_000": 0.0, "en_040": 40.0, "en_100": 100.0}
N = 140


def rows(score, codes=CODES, blind=0.1):
    """One split in which language c scores `score(c)`."""
    languages = {
        code: {
            "exact_match": 0.5 * score(code),
            "rank_accuracy": score(code),
            "image_blind_exact_match": 0.0,
            "image_blind_rank_accuracy": blind,
            "n": N,
        }
        for code in codes
    }
    others = [row for code, row in languages.items() if code != "en"]
    mean = {k: float(np.mean([row[k] for row in others])) for k in others[0]}
    return {
        "english": languages.get("en"),
        "multilingual": mean | {"n": N * len(others)},
        "languages": languages,
    }


def results(score, examples, steps=None):
    return {
        "splits": {"seen_artwork": rows(score), "unseen_artwork": rows(score)},
        "mixture": {"examples_per_language": examples, "num_examples": sum(examples.values())},
        "steps": sum(examples.values()) // 8 if steps is None else steps,
    }


def english_share(share, total=8000):
    english = round(total * share / 100)
    return {"en": english} | dict.fromkeys(CODES[1:], (total - english) // 7)


def write_sweep(folder, points, runs, *, name="ablate_en_ratio", design="fixed_total"):
    """runs: (point, seed) -> results.json, or None where there is none."""
    plan = {
        "ablation": name,
        "command": f"python launch/sweep.py --config=configs/{name}.py --workdir=runs/x",
        "design": design,
        "question": "What is asked?",
        "axis": "English among the examples (%)",
        "points": points,
        "runs": [{"name": f"{p}_seed{s}", "point": p, "seed": s} for p, s in runs],
    }
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(plan))
    for (point, seed), value in runs.items():
        run = folder / f"{point}_seed{seed}"
        run.mkdir(exist_ok=True)
        if value is not None:
            (run / "results.json").write_text(json.dumps(value))
    return folder


def en_sweep(folder, seeds=3):
    """English rises from chance to 70 %; the others hold 40 %, and fall to chance at 100 % English."""
    level = {"en_000": (0.10, 0.40), "en_040": (0.68, 0.41), "en_100": (0.70, 0.10)}
    runs = {
        (point, seed): results(
            lambda code, pair=level[point], seed=seed: pair[code != "en"] + 0.01 * (seed - 1),
            english_share(share, 7000),
        )
        for seed in range(seeds)
        for point, share in SHARES.items()
    }
    return write_sweep(folder, SHARES, runs)


def test_one_seed_has_wilsons_interval():
    # Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263.
    one = intervals.estimate([81 / 263], 263)
    assert (round(one.low, 4), round(one.high, 4)) == (0.2553, 0.3662)


def test_several_seeds_have_students():
    values = [0.30, 0.33, 0.36]
    one = intervals.estimate(values, 10)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert one.mean == pytest.approx(0.33)
    assert (one.low, one.high) == pytest.approx((low, high))
    paired = intervals.difference(values, [0.20, 0.24, 0.25], 10)
    expected = stats.ttest_rel(values, [0.20, 0.24, 0.25]).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))
    assert paired.sign == 1
    assert intervals.difference([0.2, 0.5], [0.3, 0.4], 10).sign == 0


def test_difference_of_one_seed_is_newcombes():
    # Newcombe (1998), Statistics in Medicine 17:873, table II, method 10, contrast (a).
    low, high = intervals.newcombe(56 / 70, 70, 48 / 80, 80)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
    gap = intervals.difference([56 / 70], [42 / 70], 70)
    assert (gap.low, gap.high) == intervals.newcombe(56 / 70, 70, 42 / 70, 70)
    assert gap.sign == 1


def test_fit_finds_a_line_and_its_rank_order():
    x = np.arange(1.0, 9.0)
    found = intervals.fit(x, 3 + 2 * x)
    assert found.slope.mean == pytest.approx(2)
    assert found.intercept == pytest.approx(3)
    assert found.rho.mean == pytest.approx(1)
    assert found.rho.sign == 1
    noise = np.array([3, 1, 4, 1.5, 9, 2.6, 5, 3.5])
    found = intervals.fit(x, noise)
    assert found.rho.mean == pytest.approx(stats.spearmanr(x, noise).statistic)
    assert found.rho.low < 0 < found.rho.high
    # Bonett and Wright: tanh(atanh(r) +- 1.96 sqrt((1 + r^2 / 2) / (n - 3))).
    r = found.rho.mean
    half = 1.959964 * math.sqrt((1 + r * r / 2) / 5)
    assert found.rho.high == pytest.approx(math.tanh(math.atanh(r) + half))
    with pytest.raises(SweepError, match="at least 4"):
        intervals.fit(x[:3], noise[:3])


def test_rank_within_a_language_ignores_how_hard_it_is():
    """Across languages share and score are opposed, within each they agree."""
    shares = [1, 2, 4, 8]
    table = {
        code: [(100 * s, 0.9 - 0.1 * i + 0.01 * s) for s in shares] for i, code in enumerate(CODES)
    }
    rho = intervals.within_rho(table)
    assert (rho.mean, rho.low, rho.high) == pytest.approx((1, 1, 1))
    flat = {code: [(s, 0.1) for s in shares] for code in CODES}
    assert intervals.within_rho(flat).sign == 0
    mixed = dict(table, es=[(100 * s, -s) for s in shares], sw=[(100 * s, -s) for s in shares])
    assert intervals.within_rho(mixed).mean == pytest.approx((6 - 2) / 8)
    with pytest.raises(SweepError, match="en has 1 different"):
        intervals.within_rho({"en": [(5, 0.1), (5, 0.2), (5, 0.3)]})


def test_relative_to_english(tmp_path):
    shares = {
        "en": 4000,
        "es": 200,
        "sw": 400,
        "ru": 600,
        "ar": 800,
        "hi": 500,
        "zh": 1000,
        "ko": 500,
    }
    score = {code: 0.8 * n / 4000 for code, n in shares.items()}
    runs = {("alpha_100", 0): results(score.get, shares)}
    name = "ablate_language_popularity"
    folder = write_sweep(tmp_path / "s", {"alpha_100": 1.0}, runs, name=name, design="alpha")
    sweep = intervals.load(folder)
    pairs = intervals.relative(sweep, "alpha_100", "unseen_artwork")
    assert "en" not in pairs
    assert pairs["es"] == pytest.approx((5.0, 5.0))
    assert pairs["zh"] == pytest.approx((25.0, 25.0))
    page = summary.write(sweep, tmp_path / "out").read_text()
    assert "Spearman's rho of 1.00" in page
    assert "More examples go with higher scores" in page
    assert "popularity.png" in page


def test_summary_says_what_the_intervals_allow(tmp_path):
    sweep = intervals.load(en_sweep(tmp_path / "sweep"))
    lines = summary.findings(sweep, "unseen_artwork")
    text = "\n".join(lines)
    assert "English is above the image-blind floor at 40 % and 100 %; not shown at 0 %." in text
    assert "From 0 % to 100 % English rises: +60.0 points" in text
    assert "From 0 % to 100 % the mean of the others falls: -30.0 points" in text
    assert "Compared with 100 % it is higher at 0 % and 40 %." in text
    page = summary.summary(sweep, {"curve": "curve.png"})
    assert "3 of 3 points, 3 seeds." in page
    assert "Student's t over 3 seeds" in page
    assert "What is asked?" in page
    assert "| 40 % | 875 | 7,000 | 2,800 | 600 |" in page
    assert "68.0 [65.5, 70.5]" in page  # mean 0.68, sd 0.01, t(2) = 4.303


def test_one_seed_claims_less(tmp_path):
    """41 % against 40 % of 140 pictures is no difference."""
    sweep = intervals.load(en_sweep(tmp_path / "sweep", seeds=1))
    text = "\n".join(summary.findings(sweep, "unseen_artwork"))
    assert "Its highest mean is at 40 % (40.0 %), not shown to differ from 0 %." in text
    page = summary.summary(sweep, {})
    assert "Wilson's over the questions of the one seed" in page
    one = intervals.headline(sweep, "en_000", "unseen_artwork", OTHERS)
    assert (one.low, one.high) == intervals.wilson_interval(0.39, N)


def test_figures_are_drawn(tmp_path):
    for seeds in (1, 3):
        sweep = intervals.load(en_sweep(tmp_path / f"{seeds}", seeds))
        drawn = curves.draw(sweep, tmp_path / f"out{seeds}")
        assert set(drawn) == {"curve", "languages"}
        for path in drawn.values():
            assert path.read_bytes().startswith(b"\x89PNG")
            assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")[:2000]


def test_the_curve_shows_the_numbers(tmp_path):
    sweep = intervals.load(en_sweep(tmp_path / "s"))
    seen, unseen, paper = (axes for axes in curves.plot_curve(sweep).axes if axes.get_visible())
    lines = [line.get_ydata().tolist() for line in unseen.get_lines()]
    assert any(np.allclose(line, [10, 68, 70]) for line in lines if len(line) == 3)
    assert any(np.allclose(line, [40, 41, 10]) for line in lines if len(line) == 3)
    assert [line.get_ydata().tolist() for line in paper.get_lines()][1] == [
        35.2, 38.1, 38.7, 38.5, 38.5, 33.0
    ]  # fmt: skip
    assert "own axis" in paper.get_ylabel()
    assert seen.get_xlabel() == sweep.axis


def test_rotated_sweep(tmp_path):
    """Every language at every share: its score follows its examples alone."""
    shares = [10, 20, 40, 80, 160, 320, 640, 1280]
    points = {f"rotate_{k:02d}": float(k) for k in range(8)}
    runs = {}
    for k, point in enumerate(points):
        examples = {code: shares[(i + k) % 8] for i, code in enumerate(CODES)}
        runs[point, 0] = results(
            lambda code, own=examples: 0.1 + 0.2 * math.log10(own[code]), examples
        )
    name = "ablate_language_popularity"
    sweep = intervals.load(write_sweep(tmp_path / "s", points, runs, name=name, design="rotate"))
    table = intervals.by_examples(sweep, "unseen_artwork")
    assert [n for n, _ in table["sw"]] == shares
    drawn = curves.draw(sweep, tmp_path)
    assert set(drawn) == {"languages", "examples"}
    text = "\n".join(summary.findings(sweep, "unseen_artwork"))
    assert "mean Spearman's rho of 1.00 [1.00, 1.00] over 8 shares" in text
    assert "From" not in text


@pytest.mark.parametrize(
    ("design", "examples", "steps", "says"),
    [
        ("fixed_total", english_share(40, 6000), None, "has examples 5998, expected 7000"),
        ("fixed_total", english_share(40, 7000), 7, "has steps 7"),
        ("fixed_multilingual", english_share(40, 7000), None, "has other languages' examples"),
        ("separate", english_share(40, 7000), None, "has examples 7000, expected 2800"),
        ("one_run", english_share(40, 7000), None, "has steps 875, expected 350"),
    ],
)
def test_unequal_runs_are_refused(design, examples, steps, says, tmp_path):
    runs = {
        ("en_040", 0): results(lambda code: 0.3, examples, steps),
        ("en_100", 0): results(lambda code: 0.3, english_share(100, 7000)),
    }
    with pytest.raises(SweepError, match="en_040 with seed 0 " + says):
        intervals.load(write_sweep(tmp_path / "s", SHARES, runs, design=design))


def test_incomplete_sweeps(tmp_path):
    with pytest.raises(SweepError, match="expected the --workdir"):
        intervals.load(tmp_path)
    runs = {("en_040", 0): None}
    with pytest.raises(SweepError, match=r"no run of .* is finished"):
        intervals.load(write_sweep(tmp_path / "s", SHARES, runs))
    runs = {("en_040", 0): results(lambda c: 0.3, english_share(40, 7000)), ("en_100", 0): None}
    sweep = intervals.load(write_sweep(tmp_path / "t", SHARES, runs))
    assert sweep.missing == ("en_100_seed0",)
    assert "Not finished: en_100_seed0" in summary.summary(sweep, {})


def test_scores_of_pangeabench(tmp_path):
    """A run that does not evaluate itself is scored by eval/run.py into a folder of its own."""
    task = lambda score, n: {"score": score, "interval": [0, 100], "n": n}  # noqa: E731
    bench = {
        "profile": "fixed",
        "tasks": {
            "xgqa_en": {"dataset": "xgqa", "language": "en", "fixed": task(60.0, 900)},
            "xgqa_ko": {"dataset": "xgqa", "language": "ko", "fixed": task(40.0, 500)},
            "xgqa_zh": {"dataset": "xgqa", "language": "zh", "fixed": task(50.0, 500)},
        },
        "datasets": {"xgqa": {"fixed": {"en": {"score": 60.0}, "mul": {"score": 45.0}}}},
    }
    run = results(lambda code: 0.3, english_share(40, 7000)) | {"splits": {}}
    folder = write_sweep(tmp_path / "s", {"en_040": 40.0}, {("en_040", 0): run})
    place = folder / "en_040_seed0" / "pangeabench"
    place.mkdir()
    (place / "results.json").write_text(json.dumps(bench))
    sweep = intervals.load(folder)
    assert sweep.splits == ("xgqa",)
    assert intervals.headline(sweep, "en_040", "xgqa", OTHERS).mean == pytest.approx(0.45)
    assert intervals.trials(sweep, "xgqa", ENGLISH) == 900
    assert intervals.trials(sweep, "xgqa", OTHERS) == 500
    page = summary.write(sweep, tmp_path / "out").read_text()
    assert "45.0 [" in page
    assert "blind" not in page.split("Examples per language")[0].split("Xgqa")[1]


def test_a_page_of_several_sweeps(tmp_path):
    sweep = intervals.load(en_sweep(tmp_path / "s"))
    page = tmp_path / "docs" / "ablations.md"
    summary.write_document([sweep, sweep], page)
    text = page.read_text()
    assert text.count("## En ratio, fixed total") == 2
    assert (page.parent / "figures" / "en_ratio_fixed_total" / "curve.png").exists()
    assert "(figures/en_ratio_fixed_total/curve.png)" in text


def with_tasks(split, values, blind):
    """The split with the scores of further kinds of questions in every row."""
    extra = values | {f"image_blind_{metric}": floor for metric, floor in blind.items()}
    rows = [*split["languages"].values(), split["multilingual"]]
    for row in [*rows, *([split["english"]] if split["english"] else [])]:
        row |= extra
    return split


def test_further_kinds_of_questions_have_a_table_and_old_runs_a_dash(tmp_path):
    folder = en_sweep(tmp_path / "old", seeds=1)
    old = summary.summary(intervals.load(folder), {})
    assert "other kinds of questions" not in old
    path = folder / "en_040_seed0" / "results.json"
    values = {"letter_accuracy": 0.62, "yes_no_accuracy": 0.8, "two_pictures_accuracy": 0.55}
    blind = {"letter_accuracy": 0.25, "yes_no_accuracy": 0.5, "two_pictures_accuracy": 0.49}
    mixed = json.loads(path.read_text())
    for split in mixed["splits"].values():
        with_tasks(split, values, blind)
    path.write_text(json.dumps(mixed))
    sweep = intervals.load(folder)
    page = summary.summary(sweep, {})
    new = "62.0 (25.0) | 80.0 (50.0) | 55.0 (49.0)"
    assert page.count(f"| 40 % | {new} | {new} |") == 2
    assert page.count("| 0 % | – | – | – | – | – | – |") == 2
    assert "Chance: letter 25 %, yes or no 50 %, two pictures 50 %." in page
    lines = [line for line in page.splitlines() if line not in old.splitlines()]
    assert not any("image-blind floor at" in line for line in lines)  # all else is as before
    assert curves.draw(sweep, tmp_path / "figures").keys() == {"curve", "languages"}


NESTED = {8: CODES, 10: (*CODES, "fr", "de")}


def languages_sweep(folder, number, level, seeds=2):
    """A sweep of `ablate_num_languages`: language c scores `level(c, examples)`."""
    points = {"examples_100": 100.0, "examples_400": 400.0}
    runs = {
        (point, seed): {
            "splits": {
                "unseen_artwork": rows(
                    lambda code, n=n, seed=seed: level(code, n) + 0.02 * seed, NESTED[number]
                )
            },
            "mixture": {"examples_per_language": dict.fromkeys(NESTED[number], int(n))},
            "steps": int(n) * number // 8,
        }
        for point, n in points.items()
        for seed in range(seeds)
    }
    name, design = "ablate_num_languages", f"languages_{number}"
    return intervals.load(write_sweep(folder, points, runs, name=name, design=design))


def test_sweeps_of_several_numbers_of_languages_are_compared_over_those_they_share(tmp_path):
    """The two languages that only the larger sweep has score 0, so the plain mean would be lower."""
    few = languages_sweep(tmp_path / "8", 8, lambda code, n: n / 1000)
    more = languages_sweep(
        tmp_path / "10", 10, lambda code, n: 0.0 if code in ("fr", "de") else n / 2000
    )
    shared = tuple(sorted(set(CODES) - {"en"}))
    assert intervals.shared_languages([more, few]) == shared
    one, two = intervals.by_mean_examples(more, "unseen_artwork", shared)
    assert (one[0], two[0]) == (100, 400)
    assert (one[1].values, two[1].values) == (
        pytest.approx((0.05, 0.07)),
        pytest.approx((0.2, 0.22)),
    )
    assert two[1].mean == pytest.approx(0.21)
    (axes,) = curves.plot_together([few, more]).axes
    lines = {len(line.get_xdata()): [] for line in axes.get_lines()}
    for line in axes.get_lines():
        lines[len(line.get_xdata())].append((line.get_linestyle(), line.get_ydata()))
    drawn = [values for style, values in lines[2] if style == "-" and values[0] != values[1]]
    np.testing.assert_allclose(drawn, [[11, 41], [6, 21]], atol=1e-9)
    dotted = [values for style, values in lines[2] if style == ":"]
    means = [[11, 41], [100 * (7 * 0.06 + 2 * 0.01) / 9, 100 * (7 * 0.21 + 2 * 0.01) / 9]]
    np.testing.assert_allclose(dotted, means, atol=1e-9)


def test_the_page_of_several_sweeps_lays_their_curves_over_each_other(tmp_path):
    level = lambda code, n: n / 1000  # noqa: E731
    sweeps = [languages_sweep(tmp_path / f"{n}", n, level) for n in NESTED]
    page = tmp_path / "docs" / "languages.md"
    summary.write_document(sweeps, page)
    text = page.read_text()
    assert "## Num languages, together" in text
    assert "Arabic, Spanish, Hindi, Korean, Russian, Swahili and Chinese" in text
    assert "(figures/num_languages/together.png)" in text
    assert (page.parent / "figures" / "num_languages" / "together.png").exists()
    assert text.count("| 8 | 400 | 41.0 [") == 1
    summary.write_document(sweeps[:1], page)
    assert "together" not in page.read_text()


def test_a_sweep_of_languages_whose_points_have_other_examples_is_refused(tmp_path):
    folder = tmp_path / "8"
    languages_sweep(folder, 8, lambda code, n: 0.3)
    path = folder / "examples_100_seed0" / "results.json"
    value = json.loads(path.read_text())
    value["mixture"]["examples_per_language"]["en"] = 300
    path.write_text(json.dumps(value))
    with pytest.raises(
        SweepError, match="examples_100 with seed 0 has examples 1000, expected 800"
    ):
        intervals.load(folder)


def test_published_points():
    curves = paper.curves("ablate_num_samples")
    assert set(curves) == {"M3Exam", "xGQA", "xMMMU", "MaXM"}
    assert curves["xGQA"][5.5] == (68.0, 62.5)
    assert paper.curves("ablate_loss_mask") == {}
    best = max(paper.EN_RATIO, key=lambda x: paper.EN_RATIO[x][1])
    assert best == 40  # the share the paper keeps


def test_statistics_and_pages_import_no_matplotlib():
    code = "import sys, eval.ablation.summary; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_point_is_drawn_as_marks_and_so_is_its_legend(tmp_path):
    sweep = intervals.load(en_sweep(tmp_path / "s"))
    sweep = dataclasses.replace(sweep, ablation="ablate_own", points={"en_040": 0.4})
    (legend,) = curves.plot_curve(sweep).legends
    assert all(line.get_linestyle() == "None" for line in legend.get_lines())
    assert not legend.get_patches()


def test_shortened_runs_get_a_note_and_are_no_error(tmp_path):
    """As with --config.steps=20 on sets of 1,600 and 16,000 examples."""
    seen = {"num_examples": 320, "examples_per_language": dict.fromkeys(CODES, 40)}
    runs = {
        (name, 0): results(flat, dict.fromkeys(CODES, total // 8), steps=20) | {"seen": seen}
        for name, total in (("samples_010", 1600), ("samples_100", 16000))
    }
    points = {"samples_010": 10.0, "samples_100": 100.0}
    names = {"name": "ablate_num_samples", "design": "separate"}
    sweep = intervals.load(write_sweep(tmp_path, points, runs, **names))
    assert sweep.note.startswith("Shortened runs: samples_100 saw 320 of its 16,000 examples")
    assert sweep.runs[0].examples == dict.fromkeys(CODES, 40)
    page = summary.summary(sweep, {})
    assert sweep.note in page and "(checked)" not in page


def sized(folder, examples, steps, *, design="separate", command="", name="ablate_num_samples"):
    """A sweep whose points chose and saw these numbers of examples."""
    runs = {}
    for (point, _), (drawn, seen), one in zip(SIZES.items(), examples, steps, strict=True):
        run = results(flat, dict.fromkeys(CODES, drawn // 8), steps=one)
        seen = {"num_examples": seen, "examples_per_language": dict.fromkeys(CODES, seen // 8)}
        runs[point, 0] = run | {"seen": seen}
    write_sweep(folder, SIZES, runs, name=name, design=design)
    plan = json.loads((folder / "sweep.json").read_text())
    plan["command"] += command
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


SIZES = {"samples_010": 10.0, "samples_100": 100.0}


def test_flags_that_make_the_points_equal_get_a_note_and_figures(tmp_path):
    """--config.mixture.num_examples gives each point the same number, which the design varies."""
    flag = " --config.mixture.num_examples=320"
    same = ((320, 320), (320, 320)), (20, 20)
    sweep = intervals.load(sized(tmp_path / "s", *same, command=flag))
    assert sweep.note.startswith("Changed runs (--config.mixture.num_examples=320): samples_010")
    assert "has examples 320, expected 32 as in samples_100" in sweep.note
    page = summary.write(sweep, tmp_path / "s").read_text()
    assert sweep.note in page and "(checked)" not in page
    assert (tmp_path / "s" / "curve.png").is_file()
    with pytest.raises(
        SweepError, match="expected 32 as in samples_100: these are not runs of one"
    ):
        intervals.load(sized(tmp_path / "t", *same))


def test_the_first_points_of_one_run_are_not_shortened(tmp_path):
    """With --points: a tenth of one long run has seen a tenth of the examples."""
    folder = sized(tmp_path, ((1600, 160), (1600, 1600)), (10, 100), design="one_run")
    assert intervals.load(folder).note == ""
    (folder / "samples_100_seed0" / "results.json").unlink()
    sweep = intervals.load(folder)
    assert sweep.note == "" and sweep.finished == ("samples_010",)
    half = sized(tmp_path / "cut", ((1600, 160), (1600, 800)), (10, 50), design="one_run")
    assert "samples_100 saw 800 of its 1,600 examples, so the points" in intervals.load(half).note


def test_tables_and_figures_have_the_examples_that_were_seen(tmp_path):
    """A run of 20 of 100 steps saw a fifth of what was drawn."""
    sweep = intervals.load(sized(tmp_path, ((1600, 320), (16000, 3200)), (20, 200)))
    page = summary.summary(sweep, {})
    assert "| 10 % | 20 | 320 |" in page and "| 100 % | 200 | 3,200 |" in page
    assert "1,600 |" not in page
    texts = [text.get_text() for text in curves.plot_languages(sweep).axes[0].texts]
    assert {"40", "400"} <= set(texts) and not {"200", "2,000"} & set(texts)
    table = intervals.by_examples(sweep, "unseen_artwork")
    assert [n for n, _ in table["sw"]] == [40, 400]


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_tiny_sweep_of_shares_is_drawn(tmp_path, level):
    """English scores nothing, or all languages have the same share and score: no line can be fitted."""
    run = results(lambda code: level, dict.fromkeys(CODES, 1))
    name, points = "ablate_language_popularity", {"alpha_100": 1.0}
    folder = write_sweep(tmp_path, points, {("alpha_100", 0): run}, name=name, design="alpha")
    sweep = intervals.load(folder)
    page = summary.write(sweep, folder).read_text()
    assert "popularity.png" in page and "Spearman" not in page


def test_a_last_incomplete_batch_is_no_difference(tmp_path):
    """40 and 400 examples in batches of 16: 2 and 25 steps."""
    runs = {}
    for name, total in (("samples_010", 40), ("samples_100", 400)):
        full = total // 16 * 16
        seen = {"num_examples": full, "examples_per_language": {"en": full}}
        drawn = dict.fromkeys(CODES, total // 8)
        runs[name, 0] = results(flat, drawn, steps=full // 16) | {"seen": seen}
    points = {"samples_010": 10.0, "samples_100": 100.0}
    names = {"name": "ablate_num_samples", "design": "separate"}
    sweep = intervals.load(write_sweep(tmp_path, points, runs, **names))
    assert sweep.note == ""


def flat(code):
    return 0.5


def test_a_sweep_in_a_bucket_is_reported_there(bucket, tmp_path):
    local, remote = en_sweep(tmp_path / "a"), paths.path(f"{bucket.url}/sweep")
    paths.store(remote).put(f"{local}/", f"{remote}/", recursive=True)
    with pytest.raises(intervals.SweepError, match=r"no gs://pangea/none/sweep\.json: expected"):
        intervals.load(paths.path(f"{bucket.url}/none"))
    summary.write(intervals.load(local), local)
    page = f"{bucket.url}/page/ablations.md"
    for words in ([remote], [remote, f"--page={page}"]):
        done = call("launch/sweep.py", "report", *map(str, words))
        assert done.returncode == 0, done.stderr
    assert f"written: {page}" in done.stdout
    assert paths.sizes(remote).keys() == paths.sizes(local).keys()
    for name in ("summary.md", *(n for n in paths.sizes(local) if n.endswith(".png"))):
        assert paths.read_bytes(remote / name) == (local / name).read_bytes(), name
    assert {"ablations.md", "figures"} == paths.children(paths.path(f"{bucket.url}/page"))
