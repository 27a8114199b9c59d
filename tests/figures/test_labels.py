"""Labels of points hide neither one another nor a point."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pangea_jax.figures import style as fig


def test_labels_of_crowded_points_do_not_overlap():
    random = np.random.default_rng(0)
    places = random.normal(50, 4, (18, 2)).tolist()
    figure = Figure(figsize=(3.4, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*places, strict=True), "o", ms=5)
    axes.margins(0.1)
    axes.set_title("two\nlines")
    fig.label_points(axes, [(x, y, f"l{i}", fig.BLUE) for i, (x, y) in enumerate(places)])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    boxes = [label.get_window_extent(renderer) for label in axes.texts]
    assert len(boxes) == 18
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    dots = axes.transData.transform(places)
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
