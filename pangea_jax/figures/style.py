"""The style of all figures, and how they are saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangea_jax.figures.text_render import font_families

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008): distinct in grey and with every common form of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#007A5A", "#D55E00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
INK, MUTED, FAINT = "#1A1A1A", "#6B6B6B", "#D9D9D9"
SERIES = (BLUE, ORANGE, SKY, PURPLE)
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, MUTED, INK)
PNG_DPI = 160


def style():
    """Context manager: make and save figures inside it."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.family": list(font_families()),
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "axes.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9.5,
            "axes.titlelocation": "left",
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#E8E8E8",
            "grid.linewidth": 0.6,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "text.hinting": "no_hinting",  # lines are broken by unhinted widths
            "svg.fonttype": "path",  # the viewer needs neither our fonts nor text shaping
            "svg.hashsalt": "pangea_jax",
        }
    )


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Writes `stem`.png and `stem`.svg and returns their paths. Equal figures give equal bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    figure.savefig(png, dpi=PNG_DPI, facecolor="white")
    figure.savefig(svg, facecolor="white", metadata={"Date": None})
    return png, svg


def write_cells(
    axes: Axes, texts: Sequence[Sequence[str]], white: np.ndarray, *, size: float, below: float = 0
) -> None:
    """Writes `texts` [rows, columns] into the cells of a heat map, in white where `white` is true.

    Args:
      size: of the letters, in points.
      below: distance of the text from the centre of its cell, in rows.
    """
    for row, column in np.ndindex(white.shape):
        if text := texts[row][column]:
            ink = "white" if white[row, column] else INK
            axes.text(column, row + below, text, ha="center", va="center", size=size, color=ink)
