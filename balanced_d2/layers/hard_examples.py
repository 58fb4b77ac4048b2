"""Online hard example mining (Shrivastava et al., CVPR 2016)."""

from typing import Any, Dict, Tuple

import torch

from balanced_d2.layers.sampling import NEGATIVE_SAMPLERS
from balanced_d2.utils.errors import UserError


@NEGATIVE_SAMPLERS.register(name="ohem")
class HardExampleSampler:
    """The proposals with the largest losses, positives and negatives together (section 4.2).

    Proposals that overlap have nearly the same loss, because they pool nearly the same features;
    suppression keeps the hardest of them, so that no loss counts several times.

    Args:
        nms_threshold: IoU, in (0, 1], above which a proposal is suppressed by a harder one; 1 for
            no suppression. The paper has 0.7.

    Raises:
        UserError: if it is out of range.
    """

    needs_losses = True
    """RoI heads then give losses and boxes, of positives and negatives together."""

    def __init__(self, nms_threshold: float = 0.7):
        if not 0 < nms_threshold <= 1:
            raise UserError(
                f"the threshold of OHEM (MODEL.ROI_HEADS.OHEM_NMS_THRESH) is {nms_threshold}; it "
                "has to be above 0 and at most 1 (no suppression)"
            )
        self.nms_threshold = nms_threshold

    @classmethod
    def from_config(cls, node: Any, iou_range: Tuple[float, float]) -> Dict[str, Any]:
        """
        Args:
            node: ``MODEL.ROI_HEADS``.
            iou_range: not used.
        """
        return {"nms_threshold": node.OHEM_NMS_THRESH}

    def __call__(self, losses: torch.Tensor, boxes: torch.Tensor, num_samples: int) -> torch.Tensor:
        """
        Args:
            losses: shape (M,), of all proposals of an image.
            boxes: shape (M, 4), x1, y1, x2, y2.
            num_samples: how many to sample.

        Returns:
            Indices into both, from the hardest on: ``num_samples`` of them, or all that
            suppression leaves.
        """
        if self.nms_threshold == 1:
            return losses.topk(min(num_samples, len(losses))).indices
        # Here, so that all else in layers/ needs PyTorch alone.
        from torchvision.ops import nms

        return nms(boxes.float(), losses.float(), self.nms_threshold)[:num_samples]
