"""Large images in overlapping tiles, and the detections of the tiles as one.

The package ``sahi`` does this, too. It is not used because it requires ``opencv-python`` by name,
beside which no other build of OpenCV can be installed; it also runs one tile at a time, and keeps
what is found in each as Python objects.
"""

import math
from typing import List, NamedTuple, Sequence

import numpy as np

from balanced_d2.utils.errors import UserError

# A box is cut if it comes this close, in pixels, to a side of its tile inside the image.
EDGE = 3.0
# The part of the area of a cut box that is in another box, from which it is a part of that.
COVERED = 0.5
NMS_THRESHOLD = 0.5


class Tile(NamedTuple):
    """A part of an image, in pixels."""

    x1: int
    y1: int
    x2: int
    y2: int


def check_tiling(size: int, overlap: float) -> None:
    """Raise :class:`UserError` if there are no such tiles."""
    if size < 32:
        raise UserError(f"tiles of {size} pixels are too small: give 32 or more")
    if not 0 <= overlap <= 0.9:
        raise UserError(f"an overlap of {overlap:g} is not in [0, 0.9], the part of a tile's side")


def tiles_of(height: int, width: int, size: int, overlap: float) -> List[Tile]:
    """Tiles that cover an image, row by row.

    Args:
        height, width: of the image, in pixels.
        size: the side of a tile; a smaller image has smaller tiles, all tiles have the same size.
        overlap: the part of the side that neighbours have in common; more for the last ones.
    """
    return [
        Tile(x, y, min(x + size, width), min(y + size, height))
        for y in _starts(height, size, overlap)
        for x in _starts(width, size, overlap)
    ]


def _starts(length: int, size: int, overlap: float) -> List[int]:
    step = max(1, round(size * (1 - overlap)))
    number = max(0, math.ceil((length - size) / step))
    return [min(i * step, max(0, length - size)) for i in range(number + 1)]


def is_cut(boxes: np.ndarray, tile: Tile, height: int, width: int) -> np.ndarray:
    """Whether boxes (N, 4), in pixels of the image, end at a side of their tile that is not one of
    the image: there may be more of the object in another tile."""
    x1, y1, x2, y2 = boxes.T
    left = (tile.x1 > 0) & (x1 < tile.x1 + EDGE)
    top = (tile.y1 > 0) & (y1 < tile.y1 + EDGE)
    right = (tile.x2 < width) & (x2 > tile.x2 - EDGE)
    bottom = (tile.y2 < height) & (y2 > tile.y2 - EDGE)
    return left | top | right | bottom


def fits_in_none(boxes: np.ndarray, tiles: Sequence[Tile], height: int, width: int) -> np.ndarray:
    """Whether boxes (N, 4) of objects in an image are cut by all of its tiles."""
    return np.logical_and.reduce([is_cut(boxes, tile, height, width) for tile in tiles])


def merge(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, cut: np.ndarray
) -> np.ndarray:
    """Which detections of all tiles are kept: for each object one.

    In each class, boxes are taken from the highest score down, those that a tile has cut after all
    others, so that a part never displaces the whole. A box is dropped if its IoU with one that is
    kept is above 0.5 (as in NMS), or if it is cut and more than half of it is in one that is kept.

    Args:
        boxes: shape (N, 4), x1, y1, x2, y2, not empty.
        scores, classes, cut: shape (N,); the last as :func:`is_cut` gives it.

    Returns:
        Indices from the highest score down.
    """
    boxes, scores = boxes.astype(np.float64), scores.astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept: List[int] = []
    for number in np.unique(classes):
        left = np.flatnonzero(classes == number)
        left = left[np.lexsort((-scores[left], cut[left]))]
        while len(left):
            best, left = left[0], left[1:]
            kept.append(int(best))
            corner = np.maximum(boxes[best, :2], boxes[left, :2])
            sides = (np.minimum(boxes[best, 2:], boxes[left, 2:]) - corner).clip(min=0)
            common = sides.prod(axis=1)
            iou = common / (areas[best] + areas[left] - common)
            is_part = cut[left] & (common > COVERED * areas[left])
            left = left[(iou <= NMS_THRESHOLD) & ~is_part]
    indices = np.array(sorted(kept), dtype=np.int64)
    return indices[np.argsort(-scores[indices], kind="stable")]
