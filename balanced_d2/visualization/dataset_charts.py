"""The bar charts of an inspection, as text and numbers: the page and the sheet draw the same."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from balanced_d2.analysis.inspection import Inspection
from balanced_d2.analysis.sampling import HARD_IOU

MAX_CLASSES = 30
"""Of more classes, the most and the least frequent are drawn."""
SIZE_EDGES = (0, 8, 16, 32, 64, 128, 256, 512, np.inf)
NUMBER_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, np.inf)
OVERLAP_EDGES = (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0001)


class Chart(NamedTuple):
    """Rows of bars, one bar for each series."""

    title: str
    note: str
    """What is drawn, and the figures that a reader takes along."""
    series: List[str]
    rows: List[Tuple[str, List[float], List[str]]]
    """Label, values from 0 to 1, and their texts."""


def dataset_charts(found: Inspection) -> List[Chart]:
    """All charts that the data allow."""
    charts = [_classes(found), *_levels(found), _sizes(found), _per_image(found), _overlaps(found)]
    if found.negatives is not None:
        charts.append(_negatives(found))
    return charts


def _classes(found: Inspection) -> Chart:
    counts, names = found.counts, found.data.classes
    order = np.argsort(-counts.class_boxes.sum(axis=0), kind="stable")
    note = "Boxes of each class, in brackets the images that have it."
    if len(order) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        order = np.concatenate([order[:half], order[-half:]])
        note += f" Of {len(names):,} classes, the {half} most and the {half} least frequent."
    present = counts.class_boxes[0][counts.class_boxes[0] > 0]
    if len(present) > 1:
        ratio = present.max() / present.min()
        note += f" In {found.data.splits[0]}, the most frequent has {ratio:,.0f} times the boxes of"
        note += " the rarest."
    largest = max(counts.class_boxes.max(initial=0), 1)
    rows = [
        (
            names[k],
            (counts.class_boxes[:, k] / largest).tolist(),
            [f"{b:,} ({i:,})" for b, i in zip(counts.class_boxes[:, k], counts.class_images[:, k])],
        )
        for k in order
    ]
    return Chart("Classes", note, found.data.splits, rows)


def _levels(found: Inspection) -> List[Chart]:
    levels = found.levels
    if len(levels.names) < 2:
        return []
    ends = [*levels.starts[1:], np.inf]
    labels = [
        f"{name}: {_range(start, end)} px"
        for name, start, end in zip(levels.names, levels.starts, ends)
    ]
    note = (
        f"Share of the boxes on each level of the pyramid, with images of {found.min_size} pixels "
        f"(INPUT.MIN_SIZE_TEST), {levels.rule}. A size is the square root of the area."
    )
    of_level = levels.of(found.sizes)
    # An unused level is worth seeing.
    return [_shares(found, "Levels of the pyramid", note, labels, of_level, cut=False)]


def _sizes(found: Inspection) -> Chart:
    edges = np.array(SIZE_EDGES)
    note = f"Share of the boxes by their size as the network sees it, at {found.min_size} pixels."
    if len(found.sizes):
        low, middle, high = np.percentile(found.sizes, [5, 50, 95])
        note += f" 5th percentile {low:.0f}, median {middle:.0f}, 95th percentile {high:.0f}."
    labels = [f"{_range(a, b)} px" for a, b in zip(edges[:-1], edges[1:])]
    return _shares(found, "Sizes of boxes", note, labels, _bins(found.sizes, edges))


def _per_image(found: Inspection) -> Chart:
    edges, numbers = np.array(NUMBER_EDGES), found.counts.per_image
    labels = [_whole_range(a, b) for a, b in zip(edges[:-1], edges[1:])]
    note = f"Share of the images by their number of boxes: {numbers.mean():.1f} on average, "
    note += f"{numbers.max():,} at most."
    return _shares(
        found, "Boxes in an image", note, labels, _bins(numbers, edges), found.data.image_splits
    )


def _overlaps(found: Inspection) -> Chart:
    edges = np.array(OVERLAP_EDGES)
    labels = [f"IoU {a:g} to {min(b, 1):g}" for a, b in zip(edges[:-1], edges[1:])]
    same = found.class_overlaps
    share = float((same > 0.5).mean()) if len(same) else 0.0
    note = (
        "Share of the boxes by their largest overlap with another box of the image. "
        f"{100 * share:.1f} % overlap one of their own class by more than 0.5."
    )
    return _shares(found, "Overlap of boxes", note, labels, _bins(found.overlaps, edges))


def _negatives(found: Inspection) -> Chart:
    negatives = found.negatives
    assert negatives is not None
    note = (
        f"Share of the negatives with an IoU above {HARD_IOU:g}, of the model's proposals on "
        f"{negatives.num_images:,} images of {found.data.splits[0]}."
    )
    samples = {"all there are": negatives.available, **negatives.sampled}
    rows = [(name, [of.hard], [f"{100 * of.hard:.1f} %"]) for name, of in samples.items()]
    return Chart("Hard negatives", note, [found.data.splits[0]], rows)


def _bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.searchsorted(edges, values, side="right") - 1


def _shares(
    found: Inspection,
    title: str,
    note: str,
    labels: Sequence[str],
    bins: np.ndarray,
    splits: Optional[np.ndarray] = None,
    cut: bool = True,
) -> Chart:
    """A chart of the share of each split's items in each bin.

    Args:
        bins: int (M,), the bin of each item.
        splits: int (M,), the split of each item; by default, items are the boxes.
        cut: whether empty bins at both ends are left out.
    """
    splits = found.data.box_splits if splits is None else splits
    counts = np.zeros((len(found.data.splits), len(labels)), dtype=int)
    np.add.at(counts, (splits, bins), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    used = np.flatnonzero(counts.sum(axis=0))
    first, last = (used[0], used[-1]) if len(used) else (0, -1)
    if not cut:
        first, last = 0, len(labels) - 1
    rows = [
        (labels[i], shares[:, i].tolist(), [f"{100 * s:.1f} %" for s in shares[:, i]])
        for i in range(first, last + 1)
    ]
    return Chart(title, note, found.data.splits, rows)


def _range(start: float, end: float) -> str:
    if start == 0:
        return f"below {end:g}"
    return f"{start:g} to {end:g}" if np.isfinite(end) else f"from {start:g}"


def _whole_range(start: float, end: float) -> str:
    """Of whole numbers, from ``start`` to one less than ``end``."""
    if not np.isfinite(end):
        return f"from {start:g}"
    return f"{start:g}" if end == start + 1 else f"{start:g} to {end - 1:g}"
