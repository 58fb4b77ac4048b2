"""Curves of one or several training runs."""

import itertools
import math
import re
from typing import Dict, List, NamedTuple

from matplotlib.figure import Figure

from balanced_d2.analysis.metrics import Metrics
from balanced_d2.layers.class_counts import GROUPS
from balanced_d2.visualization.figure import COLORS, new_figure

# Styles for the lines of a panel; single values have only the marker.
LINES = ("o-", "s--", "^:", "d-.")


class _Panel(NamedTuple):
    title: str
    lines: Dict[str, str]
    """The metric of each line, by its label in the legend; "" for a single line."""


def draw_training(runs: Dict[str, Metrics]) -> Figure:
    """Draw loss terms, learning rate, AP, counts per bin and figures of class groups over the
    iterations.

    Each run has its own colour, and each line in a panel its own style.

    Args:
        runs: the metrics of each run, by its name.
    """
    panels = _panels(sorted({name for metrics in runs.values() for name in metrics}))
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.1 * columns, 2.3 * rows + 0.25 * math.ceil(len(runs) / 3))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid, panels):
        for color, metrics in enumerate(runs.values()):
            for line, name in zip(itertools.cycle(LINES), panel.lines.values()):
                values = metrics.get(name, {})
                axes.plot(
                    list(values),
                    list(values.values()),
                    line,
                    color=COLORS[color % len(COLORS)],
                    linewidth=1.3,
                    markersize=4 if len(values) < 20 else 0,
                )
        axes.set_title(panel.title, fontsize=9)
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.grid(color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1:
            samples = [
                axes.plot([], [], line, color="black", markersize=4)[0]
                for line, _ in zip(itertools.cycle(LINES), panel.lines)
            ]
            axes.legend(samples, list(panel.lines), fontsize=7)
    samples = [grid[0].plot([], [], color=COLORS[i % len(COLORS)])[0] for i in range(len(runs))]
    figure.legend(samples, list(runs), loc="outside upper center", ncols=3, fontsize=9)
    figure.supxlabel("iteration", fontsize=9)
    return figure


def _panels(names: List[str]) -> List[_Panel]:
    """The panels for the available metrics, in the order in which they are drawn."""
    losses = [name for name in names if name.startswith("loss")]
    total = [name for name in names if name == "total_loss"]
    panels = [_Panel(name, {"": name}) for name in (*total, *losses)]
    if "lr" in names:
        panels.append(_Panel("learning rate", {"": "lr"}))
    for name in names:
        if re.search(r"(^|/)AP$", name):
            lines = {part: name[:-2] + part for part in ("AP", "AP50", "AP75")}
            title = f"{name[:-3]} AP (%)" if "/" in name else "AP (%)"
            panels.append(_Panel(title, {k: v for k, v in lines.items() if v in names}))
            groups = dict(zip(GROUPS, (f"{name}{end}" for end in "rcf")))
            if groups["frequent"] in names or groups["rare"] in names:
                present = {group: each for group, each in groups.items() if each in names}
                panels.append(_Panel(title.replace("AP", "AP by class group"), present))
    for suffix, title in (("", "sampled"), ("_available", "available")):
        matches = [re.fullmatch(rf"roi_head/num_neg_bin(\d+){suffix}", name) for name in names]
        bins = {f"bin {match[1]}": match[0] for match in matches if match}
        if bins:
            panels.append(_Panel(f"negatives {title} per image", bins))
    for what, title in (("num", "positives per image"), ("score", "score of the right class")):
        ends = [re.escape(f"fast_rcnn/{what}_{group}") for group in GROUPS]
        found = [re.fullmatch(rf"(.*/)?({'|'.join(ends)})", name) for name in names]
        for stage in dict.fromkeys(match[1] or "" for match in found if match):
            of_stage = {group: f"{stage}fast_rcnn/{what}_{group}" for group in GROUPS}
            present = {group: name for group, name in of_stage.items() if name in names}
            where = f", {stage.rstrip('/')}" if stage else ""
            panels.append(_Panel(f"{title}{where}", present))
    return panels
