"""No figure of the project has a text outside of its canvas, or two texts that overlap."""

import json

import numpy as np
import pyarrow as pa
import pytest

from eval.ablation import curves, intervals
from eval.bench import report
from eval.bench.tasks import ALL_TASKS, DATASETS
from pangea_jax import languages
from pangea_jax.figures import composition
from pangea_jax.figures import style as fig
from pangea_jax.sample import figures
from pangea_jax.sample.answer_sheet import answer_sheet
from pangea_jax.sample.loss_curve import plot_loss
from pangea_jax.sample.scores import BLIND, SCORES, AnswerExample
from tests.figures.extents import problems

LONG = "Pangea-7B-hf of a colleague, fine-tuned on pictures of the market in Zanzibar, " * 3
EIGHT = ("en", "ar", "es", "hi", "ru", "sw", "te", "zh")
ALL = tuple(languages.EMOJI)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they are handed over to be saved."""
    found = {}

    def keep(figure, stem):
        found[stem.name] = figure
        return stem, stem

    monkeypatch.setattr(fig, "save", keep)
    return found


def check(drawn):
    assert drawn
    with fig.style():
        found = {name: problems(figure) for name, figure in drawn.items()}
    assert not any(found.values()), json.dumps(found, indent=1, ensure_ascii=False)


def scores(codes, metrics=None):
    """A split of results.json with these languages, and the mean of those but English."""
    random = np.random.default_rng(len(codes))
    names = metrics or [score.metric for score in SCORES]
    rows = {
        code: {name: float(random.uniform(0, 1)) for name in names}
        | {BLIND + name: 0.1 for name in names}
        | {"n": 283}
        for code in codes
    }
    split = {"languages": rows, "english": rows.get("en"), "multilingual": None}
    if others := [row for code, row in rows.items() if code != "en"]:
        split["multilingual"] = {k: float(np.mean([row[k] for row in others])) for k in others[0]}
    return split


@pytest.mark.parametrize(
    ("codes", "title", "splits"),
    [(("sw",), "40 % English", 1), (("en", "sw"), LONG, 4), (EIGHT, LONG, 2), (ALL, LONG, 3)],
    ids=str,
)
def test_scores(tmp_path, drawn, codes, title, splits):
    names = ("seen_artwork", "unseen_artwork", "seen_and_turned_artwork", "dev_artwork")[:splits]
    results = {
        "splits": {name: scores(codes) for name in names},
        "mixture": {"examples_per_language": dict.fromkeys(codes, 1_000_000)},
    }
    figures.plot_languages(results, tmp_path, title)
    figures.plot_tasks(results, tmp_path, title)
    check(drawn)


@pytest.mark.parametrize(
    ("losses", "validation", "examples"),
    [
        ([2.5], 1, 1),
        ([11.945, 11.9, 11.865], 3, 16),
        (np.geomspace(12, 0.01, 500), 10, 1_000_000),
        (np.full(30, 1.5), 0, 0),
        ([9.0, 4.0, 2.1], 3, 16),
        (np.geomspace(12, 0.2, 60), 10, 16),
        ([None, None], 0, 1),
    ],
    ids=["one", "few", "many", "constant", "a decade", "two decades", "none"],
)
def test_losses(tmp_path, drawn, losses, validation, examples):
    lines = [
        {"step": 7 * i, "loss": loss, "learning_rate": 1e-5 * i, "examples": examples * (i + 1)}
        for i, loss in enumerate(losses)
    ]
    for line in lines[-1 :: -max(1, len(lines) // validation)] if validation else ():
        line["validation/loss"] = line["loss"] and line["loss"] + 0.03
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(path, tmp_path)
    check(drawn)


@pytest.mark.parametrize("count", [1, 5])
def test_sheet(tmp_path, drawn, count):
    picture = np.zeros((8, 8, 3), np.uint8)
    examples = [
        AnswerExample(picture, "pt", LONG, "a" * 90, "resposta " * 20, f"unseen_artwork_{n}")
        for n in range(count)
    ]
    answer_sheet(examples, tmp_path / "sheet", LONG)
    check(drawn)


@pytest.mark.parametrize(("codes", "sources"), [(1, 1), (2, 40), (39, 3)])
def test_composition(tmp_path, drawn, codes, sources):
    names = sorted(languages.PANGEAINS)[:codes]
    rows = [
        (f"category number {s % 7}", f"{'a_source_with_a_long_name_' * (s % 3)}{s}", code)
        for s in range(sources)
        for code in names
    ]
    rows += rows[:1] * 12_345
    columns = zip(*rows, strict=True)
    index = pa.table(dict(zip(("category", "source", "language"), map(list, columns), strict=True)))
    composition.write_figure(composition.Composition(index.combine_chunks()), tmp_path)
    check(drawn)


def benchmark(name, datasets):
    """Results of eval/run.py with random scores in all tasks of some data sets."""
    random = np.random.default_rng(len(datasets))
    tasks, found = {}, {}
    for dataset in datasets:
        for task in (task for task in ALL_TASKS.values() if task.dataset.name == dataset):
            entry = {"score": float(random.uniform(0, 100)), "interval": [5.0, 95.0], "n": 10}
            about = {
                "dataset": dataset,
                "subset": task.subset.name,
                "language": task.subset.language,
            }
            tasks[task.name] = about | {"fixed": entry, "paper": entry}
        both = {"en": entry, "mul": entry}
        found[dataset] = {"fixed": both, "paper": both}
    return {
        "name": name,
        "model": name,
        "profile": "fixed",
        "config": {"limit": 10},
        "documents": dict.fromkeys(tasks, 20),
        "tasks": tasks,
        "datasets": found,
        "failures": [],
    }


@pytest.mark.parametrize(("count", "models"), [(1, 1), (1, 2), (2, 1), (3, 2), (4, 1), (14, 2)])
def test_benchmarks(drawn, count, models):
    datasets, names = tuple(DATASETS)[:count], (LONG, "runs/mine/adapter")[-models:]
    runs = [benchmark(name, datasets) for name in names]
    with fig.style():
        drawn["languages"] = report.plot_languages(runs)
        points = report.plot_datasets(runs)
    assert (points is None) == (count == len(names) == 1)
    if points:
        drawn["datasets"] = points
        assert (points.axes[0].name == "polar") == (count >= 4)
    check(drawn)


def sweep(name, design, points, codes, seeds=1, note="", splits=("seen_artwork", "unseen_artwork")):
    runs = []
    for seed in range(seeds):
        for k, (point, x) in enumerate(points.items()):
            examples = {c: 10 * 2 ** ((i + k) % len(points)) for i, c in enumerate(codes)}
            results = {
                "splits": {split: scores(codes) for split in splits},
                "mixture": {"examples_per_language": examples},
                "steps": 100,
            }
            runs.append(intervals.Run(point, x, seed, results))
    fields = dict(command="c", design=design, question="q", runs=tuple(runs), note=note)
    return intervals.Sweep(
        None, name, axis="English among the examples (%)", points=points, **fields
    )


NOTE = "Shortened runs: samples_100 saw 320 of its 16,000 examples, so the points differ less than their names say."
SHARES = {f"en_{x:03}": float(x) for x in (0, 20, 40, 60, 80, 100)}
METHODS = {f"no_{word}": float(i) for i, word in enumerate(("tiles", "newline", "vision_training"))}
ROTATED = {f"rotate_{k:02}": float(k) for k in range(8)}
ALPHAS = {"alpha_000": 0.0, "alpha_050": 0.5, "alpha_100": 1.0}
SWEEPS = {
    "shares": ("ablate_en_ratio", "fixed_total", SHARES),
    "one point": ("ablate_en_ratio", "fixed_total", {"en_040": 40.0}),
    "methods": ("ablate_loss_mask", "all", METHODS),
    "one method": ("ablate_loss_mask", "all", {"only_the_answers_of_the_last_turn": 0.0}),
    "nine methods": (
        "ablate_own",
        "all",
        {f"a_long_name_of_method_{i}": float(i) for i in range(9)},
    ),
    "samples": (
        "ablate_num_samples",
        "separate",
        {f"s_{x}": float(x) for x in (1, 5, 10, 50, 100)},
    ),
    "rotated": ("ablate_language_popularity", "rotate", ROTATED),
    "alpha": ("ablate_language_popularity", "alpha", ALPHAS),
}


@pytest.mark.parametrize("kind", SWEEPS)
@pytest.mark.parametrize(("codes", "note"), [(("sw", "id"), ""), (ALL, NOTE)], ids=["2", "38"])
def test_sweeps(tmp_path, drawn, codes, kind, note):
    curves.draw(sweep(*SWEEPS[kind], codes, seeds=1 + 2 * bool(note), note=note), tmp_path)
    check(drawn)


@pytest.mark.parametrize("splits", [1, 3])
def test_sweeps_with_other_splits(tmp_path, drawn, splits):
    names = ("seen_artwork", "a_split_with_a_long_name", "xgqa")[:splits]
    for kind in ("nine methods", "alpha"):
        curves.draw(sweep(*SWEEPS[kind], EIGHT, splits=names), tmp_path / kind)
        check(drawn)


@pytest.mark.parametrize("number", [2, 4])
def test_sweeps_together(tmp_path, drawn, number):
    points = {f"examples_{x}": float(x) for x in (100, 125, 400, 1000)}
    sweeps = [
        sweep("ablate_num_languages", f"languages_{n}", points, ALL[: 8 + 5 * n])
        for n in range(number)
    ]
    curves.draw_together(sweeps, tmp_path)
    check(drawn)
