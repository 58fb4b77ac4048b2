"""Non-maximum suppression that keeps its exact result when a model is traced.

torchvision suppresses each group (a class, or a level of the pyramid) by itself if there are more
than 1,000 boxes, and otherwise all at once, after moving the groups apart, which rounds the boxes
a little. ``torch.jit.trace`` always records the second form, so that a trace can keep other boxes
than the model does. The functions here take its place, see :mod:`balanced_d2.export.tracing`.
"""

import torch
from detectron2.layers import shapes_to_tensor
from torchvision.ops import boxes as box_ops

from balanced_d2.export.tracing import no_export_warnings

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
