"""A sweep as a page of Markdown: its scores, and only those statements that its intervals allow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.ablation import intervals
from eval.ablation.intervals import ENGLISH, NUM_LANGUAGES, OTHERS, Estimate, Sweep
from pangea_jax import languages
from pangea_jax.figures import markdown as md
from pangea_jax.sample.scores import BLIND, SCORES, Score

MISSING = "–"  # a run from before a score existed
WHO = {ENGLISH: "English", OTHERS: "the mean of the others"}
CAPTIONS = {
    "curve": "Scores at every point with their intervals. The paper's curve, if there is one, has its own axis.",
    "languages": "The score of every language at every point.",
    "popularity": "Share of the examples against score, both relative to English.",
    "examples": "Each language's score against its own number of examples.",
    "together": "The score of the languages that all sweeps share, against the examples of each language.",
}
TOGETHER = (
    "Every language of a sweep has the same number of examples. To compare sweeps, the score is the mean over the "
    "languages other than English that all of them have: {}. If it depends on the examples per language alone, the "
    "curves lie on each other, and more examples would help. If more languages have a lower curve, the model is too "
    "small for them, or they disturb each other."
)
ONE_SEED = (
    "Intervals (95 %) are Wilson's over the questions of the one seed. The mean over languages counts each "
    "picture once, not once a language. Another seed may differ by more than these intervals."
)
SEVERAL_SEEDS = (
    "Intervals (95 %) are Student's t over {} seeds. The seeds differ in the examples drawn and in the initial "
    "weights; the questions are the same. Differences are paired by seed."
)
FIXED = {
    "fixed_multilingual": "The other languages' examples are the same at every point, and so is the number of "
    "examples a step (checked). The total and the steps grow with English.",
    "separate": "Steps are in proportion to examples (checked).",
    "one_run": "Every point has the same chosen examples. Steps are in proportion to the share trained on (checked).",
}
HEAD = (
    "# Ablations\n\nThis page shows what the sample model tells about the paper's ablations (section 5). The sample "
    "model is small and has its own drawings and languages. The page shows what each design can tell, and how large "
    "the effects are here. It does not tell what Pangea-7B would do. Each section names the command that trained its "
    "runs. `python launch/sweep.py report` makes the page from their work directories.\n"
)


def summary(sweep: Sweep, figures: Mapping[str, str], *, heading: str = "#") -> str:
    """The page of one sweep.

    Args:
      figures: name -> path of the PNG, as the page refers to it.
      heading: "#" for a page of its own, "##" for a section of a page.
    """
    seeds = len(sweep.seeds)
    title = f"{sweep.ablation.removeprefix('ablate_')}, {sweep.design}".replace("_", " ")
    parts = [
        f"{heading} {_upper(title)}",
        f"```bash\n{sweep.command}\n```",
        f"{len(sweep.finished)} of {len(sweep.points)} points, "
        + ("one seed." if seeds == 1 else f"{seeds} seeds.")
        + (f" Not finished: {', '.join(sweep.missing)}." if sweep.missing else ""),
        *([f"**{sweep.note}**"] if sweep.note else []),
        f"**The question of this design.** {sweep.question}",
        (ONE_SEED if seeds == 1 else SEVERAL_SEEDS.format(seeds))
        + " No interval is corrected for the number of comparisons.",
    ]
    parts += [f"![{CAPTIONS[name]}]({path})" for name, path in figures.items()]
    for split in sweep.splits:
        parts += [f"{heading}# {_upper(split.replace('_', ' '))}", _scores_table(sweep, split)]
        parts += _tasks_table(sweep, split)
        parts += ["\n".join(f"- {line}" for line in findings(sweep, split))]
    same = "Every point has the same number of examples and of steps (checked)."
    checked = "" if sweep.note else f" {FIXED.get(sweep.design, same)}"
    text = f"The examples trained on with the first seed.{checked}"
    parts += [f"{heading}# Examples per language", text, _mixture_table(sweep)]
    return "\n\n".join(parts) + "\n"


def _scores_table(sweep: Sweep, split: str) -> str:
    metric = sweep.metric(split)
    titles = {metric: "", BLIND + metric: " blind", "exact_match": " exact"}
    columns = [
        (who, m)
        for who in WHO
        if any(intervals.scores(sweep, p, split, who, metric) for p in sweep.finished)
        for m in titles
        if sweep.has(split, m)
    ]
    names = [("English" if who == ENGLISH else "others") + titles[m] for who, m in columns]
    rows = []
    for point in sweep.finished:
        row = [_x(sweep, point)]
        for who, m in columns:
            values = intervals.scores(sweep, point, split, who, m)
            row.append(MISSING)
            if values:
                one = intervals.estimate(values, intervals.trials(sweep, split, who))
                low, high = max(0, 100 * one.low), min(100, 100 * one.high)
                row[-1] = f"{100 * one.mean:.1f}" + (f" [{low:.1f}, {high:.1f}]" * (m == metric))
        rows.append(row)
    return "\n".join(md.table([sweep.axis, *names], rows))


def _tasks_table(sweep: Sweep, split: str) -> list[str]:
    """The scores that `_scores_table` does not show, each with its floor; nothing if no run has them."""
    shown = (sweep.metric(split), "exact_match")
    tasks = [s for s in SCORES if s.metric not in shown and sweep.has(split, s.metric)]
    if not tasks:
        return []
    columns = [(who, task) for who in WHO for task in tasks]
    names = [f"{'English' if who == ENGLISH else 'others'}: {task.name}" for who, task in columns]
    rows = [
        [_x(sweep, point), *(_with_floor(sweep, point, split, who, task) for who, task in columns)]
        for point in sweep.finished
    ]
    chances = ", ".join(f"{task.name} {100 * task.chance:.0f} %" for task in tasks)
    text = f"The other kinds of questions, with their image-blind floors in brackets. Chance: {chances}."
    return [text, "\n".join(md.table([sweep.axis, *names], rows))]


def _with_floor(sweep: Sweep, point: str, split: str, who: str, task: Score) -> str:
    found = [
        intervals.scores(sweep, point, split, who, name)
        for name in (task.metric, BLIND + task.metric)
    ]
    score, floor = (
        f"{100 * sum(values) / len(values):.1f}" if values else MISSING for values in found
    )
    return MISSING if score == MISSING else f"{score} ({floor})"


def findings(sweep: Sweep, split: str) -> list[str]:
    """One sentence a fact. It names a direction only if the interval of the difference excludes 0."""
    lines, metric = [], sweep.metric(split)
    for who, name in WHO.items():
        points = [p for p in sweep.finished if intervals.scores(sweep, p, split, who, metric)]
        if sweep.has(split, BLIND + metric) and points:
            lines.append(_floor_sentence(sweep, split, who, name, points))
        if len(points) > 1 and sweep.design != "rotate":
            lines += _point_sentences(sweep, split, who, name, points)
    return lines + _popularity_sentences(sweep, split)


def _floor_sentence(sweep, split, who, name, points) -> str:
    above = [p for p in points if intervals.above_floor(sweep, p, split, who).sign > 0]
    rest = [p for p in points if p not in above]
    if not above:
        return f"{_upper(name)} is not shown to be above the image-blind floor at any point."
    sentence = f"{_upper(name)} is above the image-blind floor at {_list(sweep, above)}"
    return sentence + (f"; not shown at {_list(sweep, rest)}." if rest else ".")


def _point_sentences(sweep, split, who, name, points) -> list[str]:
    mean = {p: intervals.headline(sweep, p, split, who).mean for p in points}
    first, last = points[0], points[-1]
    change = intervals.compare(sweep, last, first, split, who)
    word = {1: "rises", -1: "falls", 0: "is not shown to change"}[change.sign]
    low, middle, high = (f"{100 * x:+.1f}" for x in (change.low, change.mean, change.high))
    lines = [
        f"From {_x(sweep, first)} to {_x(sweep, last)} {name} {word}: {middle} points [{low}, {high}]."
    ]
    if len(points) == 2:
        return lines
    against = {p: intervals.compare(sweep, p, last, split, who).sign for p in points[:-1]}
    for sign, comparative in ((1, "higher"), (-1, "lower")):
        those = [p for p in against if against[p] == sign]
        if those:
            lines.append(
                f"Compared with {_x(sweep, last)} it is {comparative} at {_list(sweep, those)}."
            )
    best = max(points, key=mean.get)
    others = [p for p in points if p != best]
    tied = [p for p in others if intervals.compare(sweep, best, p, split, who).sign <= 0]
    rank = f"not shown to differ from {_list(sweep, tied)}" if tied else "above every other point"
    lines.append(f"Its highest mean is at {_x(sweep, best)} ({100 * mean[best]:.1f} %), {rank}.")
    return lines


def _popularity_sentences(sweep: Sweep, split: str) -> list[str]:
    lines, natural = [], intervals.natural_point(sweep)
    pairs = intervals.relative(sweep, natural, split) if natural else {}
    if intervals.can_fit(pairs):
        found = intervals.fit(*zip(*pairs.values(), strict=True))
        lines.append(
            f"At the natural shares, share and score (both relative to English) have a Spearman's rho of "
            f"{_plain(found.rho)} over {len(pairs)} languages. On the fitted line, the score rises by "
            f"{_plain(found.slope)} percent of English for each percent of English in examples. {_verdict(found.rho)}"
        )
    if intervals.can_rank(sweep):
        table = intervals.by_examples(sweep, split)
        rho = intervals.within_rho(table)
        lines.append(
            f"Within a language, examples and score have a mean Spearman's rho of {_plain(rho)} over "
            f"{len(sweep.finished)} shares (bootstrap over {len(table)} languages). {_verdict(rho)}"
        )
    return lines


def _verdict(rho: Estimate) -> str:
    return {
        1: "More examples go with higher scores.",
        -1: "More examples go with lower scores.",
        0: "The interval of rho includes 0: no relation in rank is shown.",
    }[rho.sign]


def _mixture_table(sweep: Sweep) -> str:
    codes = sorted({c for run in sweep.runs for c in run.examples}, key=lambda c: (c != "en", c))
    head = [sweep.axis, "steps", "all", *(languages.get(code).english_name for code in codes)]
    rows = []
    for point in sweep.finished:
        run = sweep.at(point)[0]
        counts = [run.examples.get(code, 0) for code in codes]
        cells = (run.results["steps"], sum(counts), *counts)
        rows.append([_x(sweep, point), *(f"{n:,}" for n in cells)])
    return "\n".join(md.table(head, rows))


def _x(sweep: Sweep, point: str) -> str:
    if not sweep.is_ordered:
        return point.replace("_", " ")
    return f"{sweep.points[point]:g}" + (" %" if "%" in sweep.axis else "")


def _list(sweep: Sweep, points: Sequence[str]) -> str:
    return _list_names([_x(sweep, point) for point in points])


def _list_names(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _plain(one: Estimate) -> str:
    return f"{one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def write(sweep: Sweep, out_dir: Path) -> Path:
    """Writes the figures and `summary.md` into `out_dir`. Returns the path of the page."""
    page = out_dir / "summary.md"
    page.write_text(summary(sweep, _draw(sweep, out_dir, out_dir)), encoding="utf-8")
    return page


def write_document(sweeps: Sequence[Sweep], page: Path) -> None:
    """Writes one page of several sweeps, such as docs/ablations.md, and `figures/` beside it."""
    sections = []
    for sweep in sweeps:
        folder = f"{sweep.ablation.removeprefix('ablate_')}_{sweep.design}"
        figures = _draw(sweep, page.parent / "figures" / folder, page.parent)
        sections.append(summary(sweep, figures, heading="##"))
    together = [sweep for sweep in sweeps if sweep.ablation == NUM_LANGUAGES]
    if len(together) > 1:
        sections.append(_together(together, page.parent))
    page.write_text("\n".join([HEAD, *sections]), encoding="utf-8")


def _together(sweeps: Sequence[Sweep], page_folder: Path) -> str:
    """The section that compares sweeps with different numbers of languages."""
    from eval.ablation import curves  # here alone, as in `_draw`

    png = curves.draw_together(sweeps, page_folder / "figures" / "num_languages")
    codes = intervals.shared_languages(sweeps)
    parts = [
        "## Num languages, together",
        TOGETHER.format(_list_names([languages.get(code).english_name for code in codes])),
        f"![{CAPTIONS['together']}]({png.relative_to(page_folder).as_posix()})",
    ]
    for split in (s for s in sweeps[0].splits if all(s in sweep.splits for sweep in sweeps)):
        rows = []
        for sweep in sweeps:
            for examples, one in intervals.by_mean_examples(sweep, split, codes):
                low, high = max(0, 100 * one.low), min(100, 100 * one.high)
                score = f"{100 * one.mean:.1f} [{low:.1f}, {high:.1f}]"
                rows.append([str(len(sweep.languages)), f"{examples:,.0f}", score])
        head = ["languages", "examples per language", "score of the shared languages"]
        parts += [f"### {_upper(split.replace('_', ' '))}", "\n".join(md.table(head, rows))]
    return "\n\n".join(parts) + "\n"


def _draw(sweep: Sweep, folder: Path, page_folder: Path) -> dict[str, str]:
    """Draws into `folder`; name of a figure -> path of its PNG, relative to `page_folder`."""
    from eval.ablation import curves  # here alone: matplotlib is needed for nothing else

    drawn = curves.draw(sweep, folder)
    return {name: png.relative_to(page_folder).as_posix() for name, png in drawn.items()}
