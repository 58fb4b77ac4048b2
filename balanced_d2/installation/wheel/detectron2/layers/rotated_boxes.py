"""IoU and non-maximum suppression of rotated boxes in plain PyTorch, on any device.

Part of the pure-Python build of Detectron2 0.6; replaces its compiled operators.
"""

from collections.abc import Iterator

import torch

# Limits on simultaneous pairs: each needs about 100 MB.
_PAIRS_COMPARED = 1 << 22
_PAIRS_INTERSECTED = 1 << 18


def pairwise_iou_rotated(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """IoU of every pair of boxes from two sets of rotated boxes, without gradient.

    Args:
        boxes1, boxes2: (N, 5) and (M, 5): x and y of the center, width, height (pixels), and angle
            (degrees, counter-clockwise, where y points down). Float64 is computed in float64,
            everything else in float32.

    Returns:
        (N, M) in float32, as from Detectron2's operator. Boxes without an area have an IoU of 0.
    """
    ious = torch.zeros(len(boxes1), len(boxes2), device=boxes1.device)
    for rows, columns, values in _overlaps(boxes1, boxes2):
        ious[rows, columns] = values.to(ious.dtype)
    return ious


def nms_rotated(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression of rotated boxes.

    Args:
        boxes: (N, 5), as for :func:`pairwise_iou_rotated`.
        scores: (N,).
        iou_threshold: a box is removed if a kept box with a higher score has a larger IoU with it.

    Returns:
        Indices (int64) of the boxes that are kept, in decreasing order of their scores.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    better, worse = [order[:0]], [order[:0]]
    for rows, columns, ious in _overlaps(boxes, boxes, upper_triangle=True):
        suppressed = ious > iou_threshold
        better.append(rows[suppressed])
        worse.append(columns[suppressed])
    return order[_greedy(len(order), torch.cat(better), torch.cat(worse))]


if not hasattr(torch.ops.detectron2, "nms_rotated"):
    # The name under which Detectron2's layers and scripted models call it.
    _operator = torch.library.custom_op("detectron2::nms_rotated", nms_rotated, mutates_args=())

    @_operator.register_fake
    def _(boxes, scores, iou_threshold):
        return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _greedy(num: int, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Which of ``num`` boxes are kept, where ``better[i]`` suppresses ``worse[i]`` if it is kept.

    The sequential algorithm with many boxes per step: boxes that no undecided box can suppress are
    kept, and the boxes that they suppress are removed. The number of steps is the length of the
    longest chain of such boxes.
    """
    stays = torch.zeros(num, dtype=torch.bool, device=better.device)
    is_open = ~stays
    while len(better):
        threatened = torch.zeros_like(stays)
        threatened[worse] = True
        safe = is_open & ~threatened
        gone = torch.zeros_like(stays)
        gone[worse[safe[better]]] = True
        stays |= safe
        is_open &= ~(safe | gone)
        still = is_open[better] & is_open[worse]
        better, worse = better[still], worse[still]
    return stays | is_open


@torch.no_grad()
def _overlaps(
    boxes1: torch.Tensor, boxes2: torch.Tensor, upper_triangle: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The pairs that may overlap, in blocks: rows, columns and IoU.

    Args:
        upper_triangle: return only pairs whose column is larger than their row.
    """
    dtype = torch.promote_types(torch.promote_types(boxes1.dtype, boxes2.dtype), torch.float32)
    boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    extents1, extents2 = _extents(boxes1), _extents(boxes2)
    num_rows = max(1, _PAIRS_COMPARED // max(1, len(boxes2)))
    for start in range(0, len(boxes1), num_rows):
        block = slice(start, start + num_rows)
        near = torch.ones(len(boxes1[block]), len(boxes2), dtype=torch.bool, device=boxes1.device)
        for axis in (0, 1):
            distance = boxes1[block, None, axis] - boxes2[:, axis]
            near &= distance.abs() < extents1[block, None, axis] + extents2[:, axis]
        if upper_triangle:
            near.triu_(start + 1)
        rows, columns = near.nonzero(as_tuple=True)
        for row, column in zip(
            (rows + start).split(_PAIRS_INTERSECTED), columns.split(_PAIRS_INTERSECTED), strict=True
        ):
            yield row, column, _iou(boxes1[row], boxes2[column])


def _extents(boxes: torch.Tensor) -> torch.Tensor:
    """Half the width and height of the upright boxes around rotated ones: (N, 5) to (N, 2)."""
    _, _, width, height, angle = boxes.unbind(1)
    cos, sin = angle.deg2rad().cos().abs(), angle.deg2rad().sin().abs()
    return torch.stack((cos * width + sin * height, sin * width + cos * height), dim=1) / 2


def _iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """IoU of pairs of boxes: (P, 5), (P, 5) to (P,)."""
    areas1, areas2 = boxes1[:, 2] * boxes1[:, 3], boxes2[:, 2] * boxes2[:, 3]
    intersection = _intersection(boxes1, boxes2).minimum(areas1).minimum(areas2)
    # The matcher of anchors compares IoUs for equality. For a box within another, the intersection
    # therefore depends only on the inner box, rounded as in Detectron2's operator.
    for inner, outer in ((boxes1, boxes2), (boxes2, boxes1)):
        rounded = _rounded_area(inner, outer)
        intersection = torch.where(_is_within(inner, outer), rounded, intersection)
    valid = (areas1 > 0) & (areas2 > 0)
    return torch.where(valid, intersection / (areas1 + areas2 - intersection), 0).clamp(max=1)


def _rounded_area(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Area of each box, from its corners as seen from halfway to another: (P, 5) twice to (P,)."""
    center = (boxes - (boxes + others) / 2)[:, :2]
    cos, sin = _cos_sin(boxes[:, 4, None])
    width, height = boxes[:, 2, None] / 2, boxes[:, 3, None] / 2
    along, across = torch.cat((cos, -sin), 1) * width, torch.cat((sin, cos), 1) * height
    first, second = center + across + along, center - across + along
    # The other two corners are opposite; the area is that of two triangles from the first corner.
    x, y = (
        torch.stack((second, 2 * center - first, 2 * center - second), 1)
        .sub(first[:, None])
        .unbind(2)
    )
    return (x[:, :2] * y[:, 1:] - x[:, 1:] * y[:, :2]).abs().sum(1) / 2


def _is_within(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    x, y = _corners(boxes1, boxes2)
    half_width, half_height = boxes2[:, 2, None] / 2, boxes2[:, 3, None] / 2
    return ((x.abs() <= half_width) & (y.abs() <= half_height)).all(dim=1)


def _corners(boxes1: torch.Tensor, boxes2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The corners of the first box, in order around it, in the coordinates of the second: its
    center is the origin, its width along x. (P, 5), (P, 5) to x and y, (P, 4) each."""
    _, _, width, height, angle = boxes1.unbind(1)
    cos, sin = _cos_sin(boxes2[:, 4])
    dx, dy = (boxes1 - boxes2)[:, :2].unbind(1)
    center_x, center_y = cos * dx - sin * dy, sin * dx + cos * dy
    cos, sin = _cos_sin(angle - boxes2[:, 4])
    along = width[:, None] * width.new_tensor([0.5, -0.5, -0.5, 0.5])
    across = height[:, None] * height.new_tensor([0.5, 0.5, -0.5, -0.5])
    x = center_x[:, None] + cos[:, None] * along + sin[:, None] * across
    y = center_y[:, None] - sin[:, None] * along + cos[:, None] * across
    return x, y


def _intersection(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Area that pairs of boxes share: (P, 5), (P, 5) to (P,).

    In the coordinates of the second box, which is upright there, the area is the integral over
    ``|y| <= height / 2`` of the part of ``|x| <= width / 2`` between the left and right border of
    the first box: by Green's theorem, the integral of ``clamp(x)`` over ``dy`` along that border.
    It is continuous in the boxes, so edges that coincide need no tolerance.
    """
    x, y = _corners(boxes1, boxes2)
    x2, y2 = x.roll(-1, 1), y.roll(-1, 1)  # each edge is from x, y to x2, y2
    half_width, half_height = boxes2[:, 2, None] / 2, boxes2[:, 3, None] / 2

    # The part of each edge within the height of the second box.
    inside, inside2 = y.clamp(-half_height, half_height), y2.clamp(-half_height, half_height)
    rise = torch.where(y2 == y, 1, y2 - y)
    x, x2 = (x + (x2 - x) * ((at - y) / rise).clamp(0, 1) for at in (inside, inside2))

    # The mean of clamp(x) along it, from its parts left of, within and right of the second box.
    left, right = x.minimum(x2), x.maximum(x2)
    left_within, right_within = (value.clamp(-half_width, half_width) for value in (left, right))
    beyond_left = right.minimum(-half_width) - left.minimum(-half_width)
    beyond_right = right.maximum(half_width) - left.maximum(half_width)
    within = (right_within - left_within) * (right_within + left_within) / 2
    length = right - left
    mean = torch.where(
        length > 0,
        ((beyond_right - beyond_left) * half_width + within) / torch.where(length > 0, length, 1),
        left_within,
    )
    return (mean * (inside2 - inside)).sum(1).abs()


def _cos_sin(degrees: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    radians = degrees.deg2rad()
    return radians.cos(), radians.sin()
