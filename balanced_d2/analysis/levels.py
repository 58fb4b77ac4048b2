"""The pyramid level that each box belongs to, at the size at which the model sees the image."""

import re
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from balanced_d2.analysis.dataset import Data

CANONICAL_SIZES = range(10, 450, 10)
"""The canonical sizes that :func:`even_canonical_size` chooses from: round numbers."""


class Levels(NamedTuple):
    """The levels from which a model takes boxes, from fine to coarse."""

    names: List[str]
    """Names of the L levels, such as "p2"."""
    starts: np.ndarray
    """Float (L,), the size (square root of the area, in pixels of the network's input) at which
    each level begins; the first begins at 0."""
    rule: str
    """What decides, for the reader."""

    def of(self, sizes: np.ndarray) -> np.ndarray:
        """The index of the level of each size: (N,) to int (N,)."""
        return np.searchsorted(self.starts[1:], sizes, side="right")

    def shares(self, sizes: np.ndarray) -> np.ndarray:
        """The share of the sizes on each level: (N,) to float (L,), all 0 if there are none."""
        return np.bincount(self.of(sizes), minlength=len(self.names)) / max(len(sizes), 1)


def is_retinanet(cfg: CfgNode) -> bool:
    return issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), RetinaNet)


def levels_of(cfg: CfgNode, canonical_size: Optional[int] = None) -> Levels:
    """The levels of a config's model.

    RoI heads pool a box from the level floor(4 + log2(size / 224)), if there is one of that number,
    or else from the nearest (Feature Pyramid Networks, equation 1). RetinaNet has no such rule: a
    box belongs to the coarsest level whose smallest anchor is not larger.

    Args:
        canonical_size: instead of ``MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE``.
    """
    model = cfg.MODEL
    if is_retinanet(cfg):
        names, sizes = list(model.RETINANET.IN_FEATURES), model.ANCHOR_GENERATOR.SIZES
        smallest = [min(of_level) for of_level in sizes] * (len(names) if len(sizes) == 1 else 1)
        return Levels(names, _from_zero(smallest), "by the smallest anchor of each level")
    names, box_head = list(model.ROI_HEADS.IN_FEATURES), model.ROI_BOX_HEAD
    size, level = canonical_size or box_head.CANONICAL_BOX_SIZE, box_head.CANONICAL_LEVEL
    # The number in the name of a feature is that of its level, with stride 2 ** number.
    found = [re.search(r"\d+$", name) for name in names]
    numbers = [int(match[0]) if match else i for i, match in enumerate(found, 2)]
    starts = [size * 2.0 ** (number - level) for number in numbers]
    return Levels(names, _from_zero(starts), f"floor({level} + log2(size / {size}))")


def _from_zero(starts: List[float]) -> np.ndarray:
    return np.array([0.0, *starts[1:]])


def input_sizes(cfg: CfgNode, data: Data) -> np.ndarray:
    """The size of every box as the network sees it in evaluation (``INPUT.MIN_SIZE_TEST``).

    Returns:
        Float (N,), square root of the area, in pixels.
    """
    shapes, which = np.unique(data.sizes, axis=0, return_inverse=True)
    short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    resized = [
        # As in Detectron2, 0 means that images keep their size.
        ResizeShortestEdge.get_output_shape(height, width, short, longest)[::-1]
        if short
        else (width, height)
        for width, height in shapes.tolist()
    ]
    scales = np.array(resized, dtype=float).reshape(-1, 2) / shapes
    scales = scales[which.reshape(-1)[data.box_images]]
    return np.sqrt(((data.boxes[:, 2:] - data.boxes[:, :2]) * scales).prod(axis=1))


def evenness(shares: np.ndarray) -> float:
    """How evenly shares are spread: their entropy, 1 if all are equal and 0 if one has all."""
    used = shares[shares > 0]
    return float(-(used * np.log(used)).sum() / np.log(len(shares))) if len(shares) > 1 else 1.0


def even_canonical_size(cfg: CfgNode, sizes: np.ndarray) -> Tuple[int, np.ndarray]:
    """The ``CANONICAL_BOX_SIZE`` that spreads boxes most evenly over the levels of RoI heads.

    Args:
        sizes: (N,), see :func:`input_sizes`.

    Returns:
        One of :data:`CANONICAL_SIZES`, and the share of the boxes on each level with it.
    """
    shares = {size: levels_of(cfg, size).shares(sizes) for size in CANONICAL_SIZES}
    best = max(shares, key=lambda size: evenness(shares[size]))
    return best, shares[best]
