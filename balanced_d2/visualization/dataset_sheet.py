"""An inspection as one picture: for a report, or a chat."""

import textwrap
from typing import List, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from balanced_d2.analysis.inspection import Inspection
from balanced_d2.visualization.crops import NUMBER, Group
from balanced_d2.visualization.dataset_charts import Chart, dataset_charts
from balanced_d2.visualization.figure import COLORS, GREY, new_figure

# All in inches. What is drawn decides how high the sheet is, so parts are placed by hand.
WIDTH = 13.0
MARGIN = 0.3
COLUMN = (WIDTH - 3 * MARGIN) / 2
LABELS = 1.75  # left of the bars
BAR = 0.16
LINE = 0.19
TILE = (WIDTH - MARGIN) / NUMBER - MARGIN / 3

MAX_ROWS = 20
MAX_NAME = 26
SMALL, MEDIUM, LARGE = 7.5, 9, 11  # points


class _Sheet:
    """A figure that is filled from the top."""

    def __init__(self, height: float):
        self.height, self.top = height, 0.0
        self.figure = new_figure(WIDTH, height)
        self.figure.set_layout_engine("none")

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes at x from the left and y below what has been filled."""
        bottom = self.height - self.top - y - height
        return self.figure.add_axes(
            (x / WIDTH, bottom / self.height, width / WIDTH, height / self.height)
        )

    def text(self, x: float, y: float, text: str, size: float, **options) -> None:
        place = (x / WIDTH, 1 - (self.top + y) / self.height)
        # Names may contain dollar signs.
        self.figure.text(*place, text, va="top", fontsize=size, parse_math=False, **options)


def draw_dataset_sheet(found: Inspection, groups: Sequence[Group], title: str) -> Figure:
    """Draw the charts, two in a row, then the cut-outs, then the advice.

    Args:
        groups: see :func:`balanced_d2.visualization.crops.crop_groups`.
        title: title of the whole figure.
    """
    charts = [_shortened(chart) for chart in dataset_charts(found)]
    pairs = [charts[i : i + 2] for i in range(0, len(charts), 2)]
    pair_heights = [max(map(_height, pair)) for pair in pairs]
    group_height = TILE + 0.95
    lines = _advice_lines(found)
    advice_height = 0.4 + LINE * len(lines) + MARGIN
    sheet = _Sheet(0.7 + sum(pair_heights) + group_height * len(groups) + advice_height)
    sheet.text(MARGIN, 0.2, title, 14)
    sheet.top += 0.7
    for pair, height in zip(pairs, pair_heights):
        for column, chart in enumerate(pair):
            _draw_chart(sheet, MARGIN + column * (COLUMN + MARGIN), chart)
        sheet.top += height
    for group in groups:
        _draw_group(sheet, group)
        sheet.top += group_height
    sheet.text(MARGIN, 0, "What follows", LARGE, weight="bold")
    for i, line in enumerate(lines):
        sheet.text(MARGIN, 0.32 + i * LINE, line, MEDIUM)
    return sheet.figure


def _advice_lines(found: Inspection) -> List[str]:
    lines = [
        line
        for number, advice in enumerate(found.advice, 1)
        for line in textwrap.wrap(f"{number}. {advice}.", 175, subsequent_indent="    ")
    ]
    return lines or ["Nothing: the figures are unremarkable."]


def _shortened(chart: Chart) -> Chart:
    """The chart with no more rows than can be read: the first and the last."""
    if len(chart.rows) <= MAX_ROWS:
        return chart
    return chart._replace(rows=[*chart.rows[: MAX_ROWS // 2], *chart.rows[-MAX_ROWS // 2 :]])


def _note(chart: Chart) -> List[str]:
    return textwrap.wrap(chart.note, 120)


def _bars_height(chart: Chart) -> float:
    return max(0.5, len(chart.rows) * (BAR * len(chart.series) + 0.07))


def _height(chart: Chart) -> float:
    return 0.75 + LINE * len(_note(chart)) + _bars_height(chart)


def _draw_chart(sheet: _Sheet, x: float, chart: Chart) -> None:
    sheet.text(x, 0, chart.title, LARGE, weight="bold")
    notes = _note(chart)
    for i, line in enumerate(notes):
        sheet.text(x, 0.27 + i * LINE, line, SMALL, color=GREY)
    top = 0.35 + LINE * len(notes)
    axes = sheet.axes(x + LABELS, top, COLUMN - LABELS, _bars_height(chart))
    places, num = np.arange(len(chart.rows)), len(chart.series)
    for i, name in enumerate(chart.series):
        bars = axes.barh(
            places + (i - (num - 1) / 2) * 0.86 / num,
            [values[i] for _, values, _ in chart.rows],
            0.86 / num,
            color=COLORS[i % len(COLORS)],
            label=name,
        )
        texts = [text[i] for _, _, text in chart.rows]
        axes.bar_label(bars, texts, padding=3, color=GREY, fontsize=SMALL)
    labels = [_cut(label, MAX_NAME) for label, _, _ in chart.rows]
    axes.set_yticks(places, labels, fontsize=MEDIUM, parse_math=False)
    axes.set_ylim(len(chart.rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    largest = max([value for _, values, _ in chart.rows for value in values], default=0)
    axes.set_xlim(0, 1.25 * largest or 1)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    if num > 1:
        legend = axes.legend(fontsize=SMALL, frameon=False, loc="lower right")
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_group(sheet: _Sheet, group: Group) -> None:
    sheet.text(MARGIN, 0, group.title, LARGE, weight="bold")
    for i, crop in enumerate(group.crops[:NUMBER]):
        x = MARGIN + i * (TILE + MARGIN / 3)
        axes = sheet.axes(x, 0.3, TILE, TILE)
        axes.set_axis_off()
        missing = np.full((1, 1, 3), 238, np.uint8)
        axes.imshow(missing if crop.picture is None else crop.picture)
        for line, text in enumerate((crop.label, crop.note)):
            place = (x + TILE / 2, 0.34 + TILE + 0.16 * line)
            sheet.text(*place, _cut(text, MAX_NAME), SMALL, ha="center")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
