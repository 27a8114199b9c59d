"""What is wrong with the texts of a figure, measured with matplotlib's renderer."""

import itertools

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.legend import Legend
from matplotlib.text import Text

PIXELS = 0.5  # rounding of extents


def problems(figure) -> list[str]:
    """Texts outside of the canvas, and pairs of texts that overlap. The figure was drawn or saved before."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    # That of an annotation would also cover its arrow.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in shown(figure)]
    width, height = figure.bbox.size
    found = [
        f"{text!r} is outside of the canvas: {box.extents.round(1)} of {width:.0f} x {height:.0f}"
        for text, box in boxes
        if min(box.x0, box.y0) < -PIXELS or box.x1 > width + PIXELS or box.y1 > height + PIXELS
    ]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        if across > PIXELS and down > PIXELS:
            found.append(f"{one!r} and {other!r} overlap by {across:.1f} x {down:.1f}")
    return found


def shown(figure) -> list[Text]:
    """All texts that are drawn, the labels of ticks within the limits included."""
    found: list[Text] = []
    for axes in _all_axes(figure):
        if not axes.get_visible():
            continue
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_visible():
                    ticks = axis._update_ticks()
                    found += [label for tick in ticks for label in (tick.label1, tick.label2)]
                    found += [axis.label, axis.get_offset_text()]
        found += [axes.title, axes._left_title, axes._right_title, *axes.texts]
        found += _of_legends([axes.get_legend()])
    found += [*figure.texts, *_of_legends(figure.legends)]
    found += [text for text in (figure._suptitle, figure._supxlabel) if text]
    found = list({id(text): text for text in found}.values())
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def _all_axes(figure) -> list[Axes]:
    return [axes for top in figure.axes for axes in (top, *top.child_axes)]


def _of_legends(legends: list[Legend | None]) -> list[Text]:
    return [text for legend in legends if legend for text in legend.get_texts()]
