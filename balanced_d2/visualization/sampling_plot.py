"""The IoU of sampled negatives, random and IoU-balanced: Libra R-CNN's figure 3."""

import csv
from typing import Dict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from balanced_d2.analysis.sampling import HARD_IOU, SampledNegatives
from balanced_d2.utils.files import replacing
from balanced_d2.visualization.figure import COLORS, GREY, new_figure

BIN_WIDTH = 0.025
LABELS = {"random": "random sampling", "iou_balanced": "IoU-balanced sampling"}


def histogram(negatives: SampledNegatives) -> Dict[str, np.ndarray]:
    """Counts of negatives by IoU.

    Returns:
        ``iou_low`` and ``iou_high``, the edges of each bin, and the counts in it: ``available``
        and one column for each negative sampler, by its name. Values outside the range of the
        negatives' IoU are not counted.
    """
    low, high = negatives.bin_edges[[0, -1]]
    edges = np.linspace(low, high, max(1, round((high - low) / BIN_WIDTH)) + 1)
    values = {"available": negatives.available, **negatives.sampled}
    counts = {name: np.histogram(of.ious, edges)[0] for name, of in values.items()}
    return {"iou_low": edges[:-1], "iou_high": edges[1:], **counts}


def write_histogram(negatives: SampledNegatives, path: str) -> None:
    """Write :func:`histogram` as CSV."""
    columns = histogram(negatives)
    with replacing(path) as file, open(file, "w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        for row in zip(*columns.values()):
            writer.writerow([f"{x:g}" if isinstance(x, float) else int(x) for x in row])


def draw_sampling(negatives: SampledNegatives, title: str) -> Figure:
    """Draw the distribution of IoU among the sampled negatives, for each sampler.

    The legend has the share of hard negatives. Dotted lines are the edges of the bins that
    IoU-balanced sampling samples evenly; the grey line is the distribution of all negatives.
    """
    columns = histogram(negatives)
    low, high = columns.pop("iou_low"), columns.pop("iou_high")
    available = columns.pop("available")
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    width = (high - low) / len(columns)
    for i, (name, counts) in enumerate(columns.items()):
        hard = negatives.sampled[name].hard
        axes.bar(
            low + i * width,
            counts / max(counts.sum(), 1),
            width,
            align="edge",
            color=COLORS[len(columns) - 1 - i],
            label=f"{LABELS.get(name, name)}: {hard:.0%} hard",
        )
    hard = negatives.available.hard
    axes.stairs(
        available / max(available.sum(), 1),
        [*low, high[-1]],
        color=GREY,
        label=f"all {len(negatives.available.ious):,} negatives: {hard:.0%} hard",
    )
    for edge in negatives.bin_edges:
        axes.axvline(edge, color=GREY, linestyle=":", linewidth=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(
        xlabel="largest IoU with ground truth",
        ylabel="share of negatives",
        title=title,
        xlim=negatives.bin_edges[[0, -1]],
    )
    axes.legend(title=f"hard: IoU > {HARD_IOU:g}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
