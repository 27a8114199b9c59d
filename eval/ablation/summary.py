"""A sweep in words and numbers: what its intervals allow to say, and no more. Markdown."""

from collections.abc import Mapping
from pathlib import Path

from eval.ablation import curves, intervals
from eval.ablation.intervals import ENGLISH, FLOOR, OTHERS, Estimate, Sweep
from pangea_jax import languages

WHO = {ENGLISH: "English", OTHERS: "the mean of the others"}
CAPTIONS = {
    "curve": "Score at every point, with intervals; the paper's own curve, where it has one, on an axis of its own.",
    "languages": "Every language at every point.",
    "popularity": "Share of the examples against score, both relative to English.",
    "examples": "Each language's score against its own number of examples.",
}


def summary(sweep: Sweep, figures: Mapping[str, str], *, heading: str = "#") -> str:
    """The page of one sweep.

    Args:
      figures: name -> path of the PNG as the page is to refer to it.
      heading: "#" for a page of its own, more where it is part of one.
    """
    seeds = len(sweep.seeds)
    parts = [
        f"{heading} {_title(sweep)}",
        f"```bash\n{sweep.command}\n```",
        f"{len(sweep.finished)} of {len(sweep.points)} points, "
        + ("one seed." if seeds == 1 else f"{seeds} seeds.")
        + (f" Not finished: {', '.join(sweep.missing)}." if sweep.missing else ""),
        f"**The question of this design.** {sweep.question}",
        _intervals(sweep),
    ]
    parts += [f"![{CAPTIONS[name]}]({path})" for name, path in figures.items()]
    for split in sweep.splits:
        parts += [f"{heading}# {_split(split)}", _scores_table(sweep, split)]
        parts += ["\n".join(f"- {line}" for line in findings(sweep, split))]
    parts += [f"{heading}# Examples per language", _mixture_text(sweep), _mixture_table(sweep)]
    return "\n\n".join(parts) + "\n"


def _title(sweep: Sweep) -> str:
    return _upper(f"{sweep.ablation.removeprefix('ablate_')}, {sweep.design}".replace("_", " "))


def _split(split: str) -> str:
    return split.replace("_", " ").capitalize()


def _intervals(sweep: Sweep) -> str:
    if len(sweep.seeds) == 1:
        kind = (
            "Intervals (95 %) are Wilson's over the questions of the one seed; the mean over languages counts its "
            "pictures, not pictures times languages. Another seed may differ by more than they say."
        )
    else:
        kind = (
            f"Intervals (95 %) are Student's t over {len(sweep.seeds)} seeds: examples drawn and initial weights "
            "vary, the questions asked do not. Differences are paired by seed."
        )
    return kind + " Each holds for itself; none is corrected for the number of comparisons."


def _scores_table(sweep: Sweep, split: str) -> str:
    metric = sweep.metric(split)
    who = [
        w for w in WHO if any(intervals.scores(sweep, p, split, w, metric) for p in sweep.finished)
    ]
    names = [metric] + [m for m in (FLOOR + metric, "exact_match") if sweep.has(split, m)]
    titles = {metric: "", FLOOR + metric: " blind", "exact_match": " exact"}
    head = [sweep.axis] + [
        ("English" if w == ENGLISH else "others") + titles[m] for w in who for m in names
    ]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for point in sweep.finished:
        cells = [_x(sweep, point)]
        for w in who:
            for m in names:
                values = intervals.scores(sweep, point, split, w, m)
                one = (
                    intervals.estimate(values, intervals.trials(sweep, split, w))
                    if values
                    else None
                )
                cells.append("" if one is None else _score(one, interval=m == metric))
        lines.append(_row(cells))
    return "\n".join(lines)


def findings(sweep: Sweep, split: str) -> list[str]:
    """One sentence a fact. A direction is stated only where the interval of a difference excludes 0."""
    lines = []
    for who, name in WHO.items():
        points = [
            p for p in sweep.finished if intervals.scores(sweep, p, split, who, sweep.metric(split))
        ]
        if sweep.has(split, FLOOR + sweep.metric(split)) and points:
            lines.append(_floor_sentence(sweep, split, who, name, points))
        if len(points) > 1 and sweep.design != "rotate":
            lines += _point_sentences(sweep, split, who, name, points)
    return lines + _popularity_sentences(sweep, split)


def _floor_sentence(sweep, split, who, name, points) -> str:
    gaps = {p: intervals.above_floor(sweep, p, split, who) for p in points}
    above = [p for p in points if gaps[p].sign > 0]
    rest = [p for p in points if gaps[p].sign <= 0]
    sentence = f"{_upper(name)} is above the image-blind floor at {_list(sweep, above)}"
    if not above:
        sentence = f"{_upper(name)} is nowhere shown to be above the image-blind floor"
    return sentence + (f"; not shown at {_list(sweep, rest)}." if rest and above else ".")


def _point_sentences(sweep, split, who, name, points) -> list[str]:
    mean = {p: intervals.headline(sweep, p, split, who).mean for p in points}
    first, last = points[0], points[-1]
    best = max(points, key=lambda p: mean[p])
    change = intervals.compare(sweep, last, first, split, who)
    word = {1: "rises", -1: "falls", 0: "is not shown to change"}[change.sign]
    lines = [f"From {_x(sweep, first)} to {_x(sweep, last)} {name} {word}: {_points(change)}."]
    against = {p: intervals.compare(sweep, p, last, split, who) for p in points[:-1]}
    for sign, comparative in ((1, "higher"), (-1, "lower")):
        those = [p for p in against if against[p].sign == sign]
        if those and len(points) > 2:
            lines.append(
                f"Compared with {_x(sweep, last)} it is {comparative} at {_list(sweep, those)}."
            )
    tied = [
        p for p in points if p != best and intervals.compare(sweep, best, p, split, who).sign <= 0
    ]
    if len(points) > 2:
        lines.append(
            f"Its highest mean is at {_x(sweep, best)} ({100 * mean[best]:.1f} %)"
            + (
                f", not shown to differ from {_list(sweep, tied)}."
                if tied
                else ", above every other point."
            )
        )
    return lines


def _popularity_sentences(sweep: Sweep, split: str) -> list[str]:
    if sweep.ablation != "ablate_language_popularity":
        return []
    lines, natural = [], curves.natural_point(sweep)
    pairs = intervals.relative(sweep, natural, split) if natural else {}
    if len(pairs) >= 4:
        found = intervals.fit(*zip(*pairs.values(), strict=True))
        lines.append(
            f"At the natural shares, over {len(pairs)} languages, share and score relative to English: Spearman's "
            f"rho {_plain(found.rho)}; the fitted line rises by {_plain(found.slope)} percent of English in score "
            f"for each percent of English in examples. {_verdict(found.rho)}"
        )
    if sweep.design == "rotate" and curves.can_rank(sweep):
        table = intervals.by_examples(sweep, split)
        rho = intervals.within_rho(table)
        lines.append(
            f"Within a language, over {len(sweep.finished)} shares, examples and score: mean Spearman's rho "
            f"{_plain(rho)} over {len(table)} languages (bootstrap over languages). {_verdict(rho)}"
        )
    return lines


def _verdict(rho: Estimate) -> str:
    return {
        1: "More examples go with higher scores.",
        -1: "More examples go with lower scores.",
        0: "The interval of rho includes 0: no relation in rank is shown.",
    }[rho.sign]


def _mixture_text(sweep: Sweep) -> str:
    equal = {
        "fixed_multilingual": "The other languages' examples are the same at every point (checked), and so are "
        "examples a step; total and steps grow with English.",
        "separate": "Steps are in proportion to examples (checked).",
        "one_run": "Chosen were the same examples at every point, and steps are in proportion to the share trained on "
        "(checked).",
    }.get(sweep.design, "Every point has the same number of examples and of steps (checked).")
    return f"As drawn, with the first seed. {equal}"


def _mixture_table(sweep: Sweep) -> str:
    codes = sorted({c for run in sweep.runs for c in run.examples}, key=lambda c: (c != "en", c))
    head = [sweep.axis, "steps", "all", *(languages.get(code).english_name for code in codes)]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for point in sweep.finished:
        run = sweep.at(point)[0]
        counts = [run.examples.get(code, 0) for code in codes]
        cells = [run.results["steps"], sum(counts), *counts]
        lines.append(_row([_x(sweep, point), *(f"{n:,}" for n in cells)]))
    return "\n".join(lines)


def _x(sweep: Sweep, point: str) -> str:
    if sweep.ablation not in curves.ORDERED:
        return point.replace("_", " ")
    return f"{sweep.points[point]:g}" + (" %" if "%" in sweep.axis else "")


def _list(sweep, points) -> str:
    names = [_x(sweep, point) for point in points]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _score(one: Estimate, *, interval: bool) -> str:
    text = f"{100 * one.mean:.1f}"
    low, high = max(0, 100 * one.low), min(100, 100 * one.high)
    return f"{text} [{low:.1f}, {high:.1f}]" if interval else text


def _points(one: Estimate) -> str:
    return f"{100 * one.mean:+.1f} points [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def _plain(one: Estimate) -> str:
    return f"{one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _row(cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def write(sweep: Sweep, out_dir: Path) -> Path:
    """Figures and `summary.md` into `out_dir`; returns the page."""
    figures = {name: path.name for name, path in curves.draw(sweep, out_dir).items()}
    page = out_dir / "summary.md"
    page.write_text(summary(sweep, figures), encoding="utf-8")
    return page


def write_document(sweeps: list[Sweep], page: Path) -> None:
    """One page of several sweeps, such as docs/ablations.md, figures in `figures/` beside it."""
    sections = []
    for sweep in sweeps:
        stem = f"{sweep.ablation.removeprefix('ablate_')}_{sweep.design}"
        folder = page.parent / "figures" / stem
        figures = curves.draw(sweep, folder)
        paths = {name: path.relative_to(page.parent).as_posix() for name, path in figures.items()}
        sections.append(summary(sweep, paths, heading="##"))
    head = (
        "# Ablations\n\nWhat the sample model shows of the paper's ablations (section 5), with its drawings, its "
        "languages and its size: what a design can tell, and how large an effect is here. It does not tell what "
        "Pangea-7B would do. Each section stands with the command that trained its runs; the page is made from their "
        "work directories by `python launch/sweep.py report`.\n"
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join([head, *sections]), encoding="utf-8")
