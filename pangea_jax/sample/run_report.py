"""What a person sees at the end of a run: figures in its folder, and tables on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pangea_jax.sample import answer_sheet, figures, loss_curve, tables
from pangea_jax.sample.scores import AnswerExample


def write(
    folder: Path,
    results: dict[str, Any],
    examples: Sequence[AnswerExample],
    title: str,
    console: Console,
) -> None:
    """Draws the loss, and the scores and example answers if the run has an evaluation.

    Args:
      folder: has metrics.jsonl.
      results: content of results.json.
      examples: for the answer sheet; none without an evaluation.
    """
    loss_curve.plot_loss(folder / "metrics.jsonl", folder)
    if examples:
        figures.plot_languages(results, folder, title)
        figures.plot_tasks(results, folder, title)
        heading = f"{title}: drawings by an artist never trained on"
        answer_sheet.answer_sheet(examples, folder / "sheet", heading)
        console.print(tables.results_table(results))
    console.print(tables.timing_table(results["timing"]))
