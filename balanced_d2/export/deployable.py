"""What is exported: a detector as a function of one image to plain tensors."""

from typing import Tuple

import torch
from detectron2.layers import shapes_to_tensor
from detectron2.modeling import GeneralizedRCNN
from torch import nn

from balanced_d2.errors import UserError


# A script, so that a trace holds no device and no dtype of the example.
@torch.jit.script_if_tracing
def _like(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return image.to(other)


class Deployable(nn.Module):
    """A detector that takes one image and returns tensors, as TorchScript and ONNX need it.

    Args:
        model: a ``GeneralizedRCNN`` in evaluation mode that detects boxes. It is not copied.

    Raises:
        UserError: if the model is in training mode or of a kind that cannot be exported.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        check_exportable(model)
        self.model = model
        self.eval()

    def forward(
        self, image: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            image: shape (C, H, W), in the range [0, 255], any dtype, channels in the order of
                the config's ``INPUT.FORMAT``.

        Returns:
            (boxes, classes, scores, image_size), the N detections from the highest score down:
            boxes of shape (N, 4), x1, y1, x2, y2 in pixels of ``image``; classes of shape (N,),
            int64; scores of shape (N,), in [0, 1]; and (H, W), int64. They are what the model
            itself returns for ``[{"image": image}]``.
        """
        image = _like(image, self.model.pixel_mean)
        detections = self.model.inference([{"image": image}], do_postprocess=False)[0]
        # Detectron2's postprocessing, to the size of the input, comes down to this.
        kept = detections.pred_boxes.nonempty()
        return (
            detections.pred_boxes.tensor[kept],
            detections.pred_classes[kept],
            detections.scores[kept],
            shapes_to_tensor(image.shape[-2:]),
        )


def check_exportable(model: nn.Module) -> None:
    """Raise :class:`UserError` if a model is of a kind, or in a mode, that cannot be exported."""
    if getattr(type(model), "inference", None) is not GeneralizedRCNN.inference:
        raise UserError(
            f"the meta-architecture {type(model).__name__} cannot be exported; "
            "supported is GeneralizedRCNN (MODEL.META_ARCHITECTURE)"
        )
    if any(module.training for module in model.modules()):
        raise UserError("the model is in training mode; call model.eval() before exporting it")
    if model.proposal_generator is None:
        raise UserError(
            "a model that is given its proposals cannot be exported "
            "(MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals)"
        )
    for branch in ("mask", "keypoint"):
        if getattr(model.roi_heads, f"{branch}_on", False):
            raise UserError(
                f"a model that predicts {branch}s cannot be exported yet; only boxes are "
                f"supported (MODEL.{branch.upper()}_ON)"
            )
