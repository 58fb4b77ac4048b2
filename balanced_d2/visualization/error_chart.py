"""A chart of where a detector loses AP."""

from typing import Optional, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from balanced_d2.evaluation.errors import KINDS, Analysis
from balanced_d2.visualization.figure import COLORS, GREY, new_figure
from balanced_d2.visualization.fonts import use_font_for

MAX_CLASSES = 20
MAX_NAME = 24
INCHES_PER_BAR = 0.27
NONE = "-"


def draw_error_chart(analysis: Analysis, title: str) -> Figure:
    """Draw AP by class and by size on the left, and what each kind of error costs on the right.

    The worst classes come first; if there are more than 20, only the 20 worst are shown. Classes
    without ground truth have no AP and are left out.

    Args:
        analysis: see :func:`balanced_d2.evaluation.errors.analyze_errors`.
        title: title of the whole figure; AP and AP50 are appended.

    Returns:
        The figure, for ``savefig``. It does not affect the state of ``matplotlib.pyplot``.
    """
    classes = [result for result in analysis.classes if result.ap["all"] is not None]
    shown = sorted(classes, key=lambda result: result.ap["all"] or 0)[:MAX_CLASSES]
    use_font_for((title, *(result.name for result in shown)))
    total = analysis.total

    rows = [len(shown) + 2.5, len(total.ap) + 2.5]
    figure = new_figure(11, max(INCHES_PER_BAR * sum(rows) + 1, 4.5))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    scores = f"AP {total.ap['all']:.1f}, AP50 {analysis.ap50:.1f}"
    figure.suptitle(f"{title}: {scores}", fontsize=13)
    grid = figure.add_gridspec(2, 2, height_ratios=rows, wspace=0.06)
    ap_unit = "AP, IoU 0.50 to 0.95 (%)\nin brackets: boxes of ground truth"

    axes = figure.add_subplot(grid[0, 0])
    labels = [f"{_short(result.name)} ({result.num_boxes['all']})" for result in shown]
    _draw_bars(axes, labels, [result.ap["all"] for result in shown], COLORS[0])
    left_out = f": the {MAX_CLASSES} worst of {len(classes)}" if len(classes) > MAX_CLASSES else ""
    axes.set(title=f"AP by class{left_out}", xlim=(0, 100))

    axes = figure.add_subplot(grid[1, 0])
    labels = [f"{size} ({total.num_boxes[size]})" for size in total.ap]
    _draw_bars(axes, labels, list(total.ap.values()), COLORS[0])
    axes.set(title="AP by size", xlabel=ap_unit, xlim=(0, 100))

    axes = figure.add_subplot(grid[:, 1])
    labels = [f"{kind}\n{meaning}" for kind, meaning in KINDS.items()]
    costs = [error.lost for error in analysis.errors]
    _draw_bars(axes, labels, costs, COLORS[1], [f" ({error.number})" for error in analysis.errors])
    axes.set(
        title="AP50 lost by each kind of error",
        xlabel=f"AP50 lost (points)\nin brackets: errors at score ≥ {analysis.threshold:g}",
        xlim=(0, max(*costs, 1) * 1.3),
    )
    return figure


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def _draw_bars(
    axes: Axes,
    labels: Sequence[str],
    values: Sequence[Optional[float]],
    color: str,
    notes: Optional[Sequence[str]] = None,
) -> None:
    """Draw horizontal bars, the first at the top, each with its value and a note."""
    bars = axes.barh(range(len(values)), [value or 0 for value in values], 0.7, color=color)
    numbers = [NONE if value is None else f"{value:.1f}" for value in values]
    texts = [n + note for n, note in zip(numbers, notes or [""] * len(numbers), strict=True)]
    axes.bar_label(bars, texts, padding=3, color=GREY)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
