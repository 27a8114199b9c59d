"""The style of all figures, and how they are saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pangea_jax.figures.text_render import fit_text, font_families

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


def fit_titles(figure: Figure) -> None:
    """Breaks titles of axes that are wider than their axes into lines. The layout places the axes for this."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        title = axes.get_title(loc="left")
        room = axes.bbox.width * 72 / figure.dpi
        size = axes.title.get_size()
        lines = [
            line
            for part in title.split("\n")
            for line in fit_text(part, room, size, min_size=size - 2, max_lines=3)[0]
        ]
        if axes.get_visible() and title and lines != title.split("\n"):
            axes.set_title("\n".join(lines), size=size - 2)


def name_ticks(axes: Axes, names: Sequence[str], room: float) -> float:
    """Writes names below 0, 1, ... of a horizontal axis: in lines, or upright if they are wider than their room.

    Args:
      room: width for a name, in points.

    Returns:
      The height of the names, in inches.
    """
    size, most = 8, 110
    broken = [fit_text(name, room - 5, size, min_size=size, max_lines=4)[0] for name in names]
    upright = any("".join(b).split() != "".join(n.split()).split() for b, n in zip(broken, names))
    if upright:
        lines = max(1, int(room / (1.2 * size)))
        broken = [fit_text(name, most, size, min_size=size, max_lines=lines)[0] for name in names]
    axes.set_xticks(range(len(names)), ["\n".join(b) for b in broken], rotation=90 * upright)
    return (most if upright else 1.2 * size * max(map(len, broken))) / 72


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


def label_points(
    axes: Axes, points: Sequence[tuple[float, float, str, str]], size: float = 7
) -> None:
    """Writes a label beside each point, so that no label hides a point or another label.

    Each takes the first free place on rings around its point; a thin line leads to those further away.
    The limits of the axes must be final, except for the layout.

    Args:
      points: (x, y, text, colour).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure = axes.figure
    renderer, pixels = FigureCanvasAgg(figure).get_renderer(), figure.dpi / 72
    figure.draw_without_rendering()  # the layout places the axes
    legend = axes.get_legend()
    dots = axes.transData.transform([(x, y) for x, y, *_ in points])
    radius, taken = 3 * pixels, [legend.get_window_extent(renderer)] if legend else []

    def is_free(box) -> bool:
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        inside = inside and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        near = dots.clip([box.x0, box.y0], [box.x1, box.y1]) - dots
        clear = (np.hypot(*near.T) >= radius).all()
        return inside and clear and not any(box.overlaps(other) for other in taken)

    for (x, y, text, colour), dot in zip(points, dots, strict=True):
        label = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", size=size, color=colour,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.4, shrinkA=0, shrinkB=2),
        )  # fmt: skip
        label.set_in_layout(False)
        extent = label.get_window_extent(renderer)
        for right, up in _rings():
            left, below = right < 0, up < 0
            corner = dot + pixels * np.array([right, up]) - extent.size * [left, below]
            box = Bbox.from_bounds(*corner, *extent.size)
            if is_free(box):
                break
        taken.append(box)
        label.set(ha="right" if left else "left", va="top" if below else "bottom")
        label.xyann = (right, up)
        label.arrow_patch.set_visible(np.hypot(right, up) > 12)


def _rings() -> list[tuple[float, float]]:
    """Offsets from a point, the nearest first, in points of type."""
    return [
        (5 * ring * np.cos(angle), 5 * ring * np.sin(angle))
        for ring in range(1, 11)
        for angle in np.pi * (np.arange(8 * ring) + 1) / (4 * ring)
    ]
