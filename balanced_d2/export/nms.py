"""Non-maximum suppression that keeps its exact result when a model is traced.

torchvision suppresses each group (a class, or a level of the pyramid) by itself if there are more
than 1,000 boxes, and otherwise all at once, after moving the groups apart, which rounds the boxes
a little. ``torch.jit.trace`` always records the second form, so that a trace can keep other boxes
than the model does. The functions here take its place, see :mod:`balanced_d2.export.tracing`.
"""

import torch
from detectron2.layers import shapes_to_tensor
from torch.nn import functional as F
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

from balanced_d2.export.tracing import no_export_warnings
from balanced_d2.layers.exporting import is_exporting

# On the CPU, torchvision moves this many boxes apart at most.
MAX_MOVED = 1000

_batched_nms = box_ops.batched_nms


def scripted_batched_nms() -> torch.jit.ScriptFunction:
    """torchvision's function with the choice of form made at run time, for ``torch.jit.trace``."""
    with no_export_warnings():
        return torch.jit.script(_batched_nms)


def onnx_batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """The same function in one ``NonMaxSuppression`` of ONNX, which can suppress group by group.

    Args:
        boxes: shape (N, 4), not negative.
        scores: shape (N,).
        idxs: shape (N,), the group of each box, from 0 on.
        iou_threshold: boxes that overlap a better one of their group by more are dropped.

    Returns:
        LongTensor: the indices of the boxes kept, from the highest score down.
    """
    num_groups = _max(idxs, 0) + 1
    # num_groups is a tensor, so that the graph computes it; torch declares numbers only.
    numbers = torch.arange(num_groups, device=idxs.device)  # type: ignore[call-overload]
    in_group = idxs == numbers[:, None]
    group_scores = torch.where(in_group, scores, torch.full_like(scores, -torch.inf))
    # The rounding of the move is part of the result that has to be reproduced.
    is_moved = shapes_to_tensor([boxes.shape[0]]) <= MAX_MOVED
    offsets = idxs * (_max(boxes.flatten(), 0) + 1) * is_moved
    kept = _GroupNMS.apply(boxes + offsets[:, None], group_scores, iou_threshold)
    kept = kept.sort().values  # of equal scores, the first box comes first, as in torchvision
    return kept[scores[kept].argsort(descending=True)]


def suppress(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """torchvision's ``nms`` of each row by itself, with a result of fixed size, for
    ``torch.export``.

    Args:
        boxes: shape (R, C, 4). R may be known at run time only.
        scores: shape (R, C), -inf where there is no box.
        iou_threshold: boxes that overlap a better one of their row by more are dropped.

    Returns:
        Bool of shape (R, C): the boxes kept.
    """
    if not is_exporting():
        rows = [_suppress_row(*row, iou_threshold) for row in zip(boxes, scores)]
        return torch.stack(rows) if rows else torch.zeros_like(scores, dtype=torch.bool)
    # Rows with boxes first, of which there are few where each class is one.
    has_boxes = scores.isfinite().any(dim=1)
    order, num_rows = has_boxes.int().argsort(descending=True), has_boxes.sum()

    def is_left(number, kept):
        return number < num_rows

    def suppress_next(number, kept):
        row = order.index_select(0, number.reshape(1))
        of_row = boxes.index_select(0, row)[0], scores.index_select(0, row)[0]
        return number + 1, kept.index_copy(0, row, _suppress_row(*of_row, iou_threshold)[None])

    nothing = torch.zeros(scores.shape, dtype=torch.bool, device=boxes.device)
    return torch.while_loop(is_left, suppress_next, (torch.zeros_like(num_rows), nothing))[1]


@torch.library.custom_op("balanced_d2::suppress", mutates_args=())
def suppress_operator(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """:func:`suppress` as an operator, for an exporter that has another for it."""
    return suppress(boxes, scores, iou_threshold)


@suppress_operator.register_fake
def _(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def translate_suppress(boxes, scores, iou_threshold: float):
    """:func:`suppress_operator` in operators of ONNX, for ``torch.onnx.export(dynamo=True)``."""
    from onnxscript import opset18 as op

    selected = op.NonMaxSuppression(
        boxes,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        op.Shape(scores, start=1, end=2),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[torch.finfo(torch.float).min]),  # above -inf
    )  # rows of (row, 0, box)
    kept = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(kept, start=0, end=1))
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    return op.Greater(op.ScatterND(nothing, kept, ones), op.Constant(value_float=0.5))


def translate_stable_sort(self, stable=True, dim: int = -1, descending: bool = False):
    """``sort(stable=True)`` in ONNX, whose TopK puts the first of equal values first."""
    from onnxscript import opset18 as op

    axis = dim % len(self.shape)
    number = op.Shape(self, start=axis, end=axis + 1)
    return op.TopK(self, number, axis=axis, largest=int(descending))


def _suppress_row(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    # torchvision tells torch.export that at least two boxes are kept: two without area, which
    # overlap with nothing, make it true.
    is_box = F.pad(scores.isfinite(), (0, 2), value=True)
    index = is_box.nonzero()[:, 0]
    boxes, padded_scores = F.pad(boxes, (0, 0, 0, 2)), F.pad(scores, (0, 2), value=-torch.inf)
    best = nms(boxes[index], padded_scores[index], iou_threshold)
    return torch.zeros_like(is_box).scatter(0, index[best], True)[: scores.shape[0]]


def _max(x: torch.Tensor, least: float) -> torch.Tensor:
    """The largest value of ``x``, and ``least`` if there is none."""
    return torch.cat([x, x.new_full((1,), least)]).max()


class _GroupNMS(torch.autograd.Function):
    """Boxes (N, 4) and scores (G, N), -inf where a box is not in a group, to the boxes kept."""

    @staticmethod
    def forward(ctx, boxes, scores, iou_threshold):
        best, group = scores.max(dim=0)
        return _batched_nms(boxes, best, group, iou_threshold)

    @staticmethod
    def symbolic(g, boxes, scores, iou_threshold):
        def constant(value, dtype):
            return g.op("Constant", value_t=torch.tensor([value], dtype=dtype))

        first = constant(0, torch.long)
        # One row (batch, group, box) for each box kept.
        selected = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, first),
            g.op("Unsqueeze", scores, first),
            constant(torch.iinfo(torch.long).max, torch.long),
            constant(iou_threshold, torch.float),
            constant(torch.finfo(torch.float).min, torch.float),  # above -inf
        )
        kept = g.op("Gather", selected, constant(2, torch.long), axis_i=1)
        return g.op("Squeeze", kept, constant(1, torch.long))
