"""A chart of precision and recall over the score, with the best threshold of each class."""

from typing import Sequence

import numpy as np
from matplotlib.figure import Figure

from balanced_d2.evaluation.thresholds import ScoreCurve
from balanced_d2.visualization.figure import COLORS, GREY, new_figure

MAX_CLASSES = 20
MAX_NAME = 24


def draw_score_chart(curves: Sequence[ScoreCurve], title: str) -> Figure:
    """Draw precision, recall and F1 of all classes on the left, the best thresholds on the right.

    Of more than 20 classes, those with the most ground truth are shown. Classes of which nothing is
    found have no threshold and are left out.

    Args:
        curves: see :func:`balanced_d2.evaluation.thresholds.score_curves`.
        title: title of the whole figure.
    """
    *classes, total = curves
    known = [curve for curve in classes if curve.best is not None]
    shown = sorted(known, key=lambda curve: -curve.num_truth)[:MAX_CLASSES]
    figure = new_figure(11, max(4.2, 0.3 * len(shown) + 1.8))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=13, parse_math=False)
    left, right = figure.subplots(1, 2)

    for (name, values), color in zip(
        (("precision", total.precision), ("recall", total.recall), ("F1", total.f1)), COLORS
    ):
        # A threshold between two scores keeps the detections of the higher one.
        left.plot(
            [0, *total.scores[::-1]],
            [*values[-1:], *values[::-1]] if len(values) else [np.nan],
            color=color,
            label=name,
            drawstyle="steps-pre",
        )
    left.set(title="All classes", xlabel="minimum score", ylim=(0, 1.02))
    left.grid(color="#dddddd")
    left.legend(frameon=False)

    best = [curve.best or 0 for curve in shown]
    scores = [curve.scores[i] for curve, i in zip(shown, best)]
    bars = right.barh(range(len(shown)), scores, 0.7, color=COLORS[2])
    notes = [
        f"{cut_down(s)}: P {c.precision[i]:.2f}, R {c.recall[i]:.2f}, F1 {c.f1[i]:.2f}"
        for c, i, s in zip(shown, best, scores)
    ]
    right.bar_label(bars, notes, padding=3, color=GREY, fontsize=8)
    # Class names may contain dollar signs.
    right.set_yticks(range(len(shown)), [_short(c.name) for c in shown], parse_math=False)
    right.invert_yaxis()
    right.tick_params(axis="y", length=0)
    right.spines[["top", "right", "left"]].set_visible(False)
    left_out = f", the {MAX_CLASSES} most frequent of {len(known)}" * (len(known) > MAX_CLASSES)
    right.set(title=f"Score of the best F1{left_out}", xlabel="minimum score")
    right.set_xlim(0, 1.9 * max(scores, default=1) or 1)
    return figure


def cut_down(score: float) -> str:
    """A score as text, rounded down, so that a detection that has it is kept."""
    return f"{np.floor(1000 * score) / 1000:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
