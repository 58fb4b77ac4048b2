"""What is exported: a detector as a function of one image to plain tensors."""

from typing import Any, Dict, List, Tuple

import torch
from detectron2.layers import shapes_to_tensor
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Instances
from torch import nn

from balanced_d2.modeling import BalancedFastRCNNOutputLayers
from balanced_d2.utils.errors import UserError

# Those that take a batch and return a fixed number of detections.
BATCH_FORMATS = ("pt2", "aoti", "onnx-batch")


# A script, so that a trace holds no device and no dtype of the example.
@torch.jit.script_if_tracing
def _like(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return image.to(other)


class Deployable(nn.Module):
    """A detector that takes one image and returns tensors, as TorchScript and ONNX need it.

    Args:
        model: a ``GeneralizedRCNN`` or ``RetinaNet`` in evaluation mode. It is not copied.
        format: as for :func:`check_exportable`.

    Attributes:
        outputs: the names of what it returns.

    Raises:
        UserError: if the model is in training mode or of a kind that cannot be exported.
    """

    def __init__(self, model: GeneralizedRCNN | RetinaNet, format: str = "torchscript"):
        super().__init__()
        check_exportable(model, format)
        self.model = model
        self.outputs = output_names(**predicts(model))
        self.eval()

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """
        Args:
            image: shape (C, H, W), in the range [0, 255], any dtype, channels in the order of
                the config's ``INPUT.FORMAT``.

        Returns:
            (boxes, classes, scores, image_size), the N detections from the highest score down:
            boxes of shape (N, 4), x1, y1, x2, y2 in pixels of ``image``; classes of shape (N,),
            int64; scores of shape (N,), in [0, 1]; and (H, W), int64. They are what the model
            itself returns for ``[{"image": image}]``.

            Before the image size come, if the model predicts them: masks of shape (N, M, M), the
            probability that a point of the box is of the object, not pasted into the image yet;
            and keypoints of shape (N, K, 3), x and y in pixels of ``image`` and a score above 0.
        """
        image = _like(image, self.model.pixel_mean)
        detections = self._detect(image)
        # Detectron2's postprocessing, to the size of the input, comes down to this.
        kept = detections.pred_boxes.nonempty()
        boxes = detections.pred_boxes.tensor[kept]
        classes = detections.pred_classes[kept]
        scores = detections.scores[kept]
        image_size = shapes_to_tensor(image.shape[-2:])
        return boxes, classes, scores, *_additional(detections, kept), image_size

    def _detect(self, image: torch.Tensor) -> Instances:
        inputs = [{"image": image}]
        if isinstance(self.model, RetinaNet):  # which clips its boxes in its postprocessing
            return self.model(inputs)[0]["instances"]
        return self.model.inference(inputs, do_postprocess=False)[0]


def output_names(masks: bool = False, keypoints: bool = False, is_batch: bool = False) -> List[str]:
    """The names of what an exported model returns, in order.

    Args:
        masks, keypoints: whether it predicts them.
        is_batch: whether it takes a batch, as :class:`balanced_d2.export.BatchDeployable`.
    """
    additional = masks * ["masks"] + keypoints * ["keypoints"]
    if is_batch:
        return ["num_detections", "boxes", "scores", "classes", *additional]
    return ["boxes", "classes", "scores", *additional, "image_size"]


def _additional(detections: Instances, kept: torch.Tensor) -> List[torch.Tensor]:
    outputs = []
    if detections.has("pred_masks"):
        outputs.append(detections.pred_masks[kept, 0])
    if detections.has("pred_keypoints"):
        outputs.append(detections.pred_keypoints[kept])
    return outputs


def predicts(model: nn.Module) -> Dict[str, bool]:
    """Whether a model predicts ``masks`` and ``keypoints``."""
    heads = getattr(model, "roi_heads", None)
    return {
        "masks": getattr(heads, "mask_on", False),
        "keypoints": getattr(heads, "keypoint_on", False),
    }


def check_exportable(model: nn.Module, format: str = "torchscript") -> None:
    """Raise :class:`UserError` if a model is of a kind, or in a mode, that cannot be exported.

    Args:
        format: ``"torchscript"``, ``"onnx"``, or one of :data:`BATCH_FORMATS`.
    """
    is_retinanet = isinstance(model, RetinaNet)
    if not is_retinanet and (
        getattr(type(model), "inference", None) is not GeneralizedRCNN.inference
    ):
        raise cannot_be_exported(type(model).__name__)
    if any(module.training for module in model.modules()):
        raise UserError("the model is in training mode; call model.eval() before exporting it")
    if not is_retinanet and model.proposal_generator is None:
        raise UserError(
            "a model that is given its proposals cannot be exported "
            "(MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals)"
        )
    if format == "onnx" and predicts(model)["keypoints"]:
        raise UserError(
            "a model that predicts keypoints cannot be exported to ONNX: they are searched for in "
            "a loop that PyTorch cannot write as ONNX; export it to TorchScript "
            "(--format torchscript)"
        )
    if format in BATCH_FORMATS:
        _check_batch_exportable(model, format)


def _check_batch_exportable(model: nn.Module, format: str) -> None:
    """That nothing is replaced of what :class:`balanced_d2.export.batched.BatchDeployable` computes
    in the place of Detectron2's methods."""
    advice = f"cannot be exported with --format {format}; use --format torchscript"
    if predicts(model)["keypoints"] and format == "onnx-batch":
        raise UserError(
            f"a model that predicts keypoints {advice} or pt2: each box's heat map is scaled to "
            "the size of the box, a loop over sizes that are data"
        )
    if format == "aoti" and all(predicts(model).values()):
        raise UserError(
            f"a model that predicts masks and keypoints {advice} or pt2: AOTInductor (of PyTorch "
            "2.14) does not compile it"
        )
    if isinstance(model, RetinaNet):
        return
    rpn: Any = model.proposal_generator
    heads: Any = model.roi_heads
    methods: Dict[type, Tuple[type, str]] = {type(rpn): (RPN, "predict_proposals")}
    if isinstance(heads, CascadeROIHeads):
        methods[type(heads)] = (CascadeROIHeads, "_forward_box")
    else:
        methods[type(heads)] = (StandardROIHeads, "_forward_box")
    predictors = getattr(heads, "box_predictor", ())
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        is_ours = isinstance(predictor, BalancedFastRCNNOutputLayers)
        base = BalancedFastRCNNOutputLayers if is_ours else FastRCNNOutputLayers
        methods[type(predictor)] = (base, "predict_probs")
    if predicts(model)["masks"]:
        methods[type(heads.mask_head)] = (BaseMaskRCNNHead, "forward")
        if heads.mask_pooler is None:
            raise UserError(f"a mask head without MODEL.ROI_MASK_HEAD.POOLER_TYPE {advice}")
    if predicts(model)["keypoints"]:
        methods[type(heads.keypoint_head)] = (BaseKeypointRCNNHead, "forward")
        if heads.keypoint_pooler is None:
            raise UserError(f"a keypoint head without MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE {advice}")
    for kind, (known, method) in methods.items():
        if getattr(kind, method, None) is not getattr(known, method):
            raise UserError(
                f"a model with {kind.__name__} in the place of {known.__name__} {advice}"
            )


def cannot_be_exported(meta_architecture: str) -> UserError:
    """The error to raise for a meta-architecture that is not supported."""
    return UserError(
        f"the meta-architecture {meta_architecture} cannot be exported; supported are "
        "GeneralizedRCNN, RetinaNet and BalancedRetinaNet (MODEL.META_ARCHITECTURE)"
    )
