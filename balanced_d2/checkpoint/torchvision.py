"""Conversion of torchvision's COCO detectors: names, order of classes and anchors, and config."""

import sys
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from detectron2.config import CfgNode
from torchvision.models import get_weight

from balanced_d2.checkpoint import conversion
from balanced_d2.checkpoint.conversion import NUM_ANCHORS, RESNET, Rules, State, below
from balanced_d2.utils.errors import UserError

# torchvision's names of modules, and Detectron2's. Where a module has two, the second is that of
# older versions of torchvision, in which the published files of version 1 were saved.
BACKBONE = below("backbone.body", "backbone.bottom_up", RESNET)
RCNN: Rules = (
    *BACKBONE,
    ("backbone.fpn.inner_blocks.{i}.0", "backbone.fpn_lateral{i+2}"),
    ("backbone.fpn.layer_blocks.{i}.0", "backbone.fpn_output{i+2}"),
    ("rpn.head.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    ("rpn.head.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.cls_score"),
    ("roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.bbox_pred"),
)
FASTER_RCNN: Rules = (
    *RCNN,
    ("backbone.fpn.inner_blocks.{i}", "backbone.fpn_lateral{i+2}"),
    ("backbone.fpn.layer_blocks.{i}", "backbone.fpn_output{i+2}"),
    ("rpn.head.conv.0.0", "proposal_generator.rpn_head.conv"),
    ("rpn.head.conv", "proposal_generator.rpn_head.conv"),
    ("roi_heads.box_head.fc6", "roi_heads.box_head.fc1"),
    ("roi_heads.box_head.fc7", "roi_heads.box_head.fc2"),
)
MODULES = {
    "Faster R-CNN": FASTER_RCNN,
    "Faster R-CNN v2": (
        *RCNN,
        ("backbone.fpn.inner_blocks.{i}.1", "backbone.fpn_lateral{i+2}.norm"),
        ("backbone.fpn.layer_blocks.{i}.1", "backbone.fpn_output{i+2}.norm"),
        ("rpn.head.conv.{i}.0", "proposal_generator.rpn_head.conv.conv{i}"),
        ("roi_heads.box_head.{i}.0", "roi_heads.box_head.conv{i+1}"),
        ("roi_heads.box_head.{i}.1", "roi_heads.box_head.conv{i+1}.norm"),
        ("roi_heads.box_head.5", "roi_heads.box_head.fc1"),
    ),
    "Mask R-CNN": (
        *FASTER_RCNN,
        ("roi_heads.mask_head.{i}.0", "roi_heads.mask_head.mask_fcn{i+1}"),
        ("roi_heads.mask_head.mask_fcn{i}", "roi_heads.mask_head.mask_fcn{i}"),
        ("roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_head.deconv"),
        ("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.mask_head.predictor"),
    ),
    "RetinaNet": (
        *BACKBONE,
        ("backbone.fpn.inner_blocks.{i}.0", "backbone.fpn_lateral{i+3}"),
        ("backbone.fpn.layer_blocks.{i}.0", "backbone.fpn_output{i+3}"),
        ("backbone.fpn.inner_blocks.{i}", "backbone.fpn_lateral{i+3}"),
        ("backbone.fpn.layer_blocks.{i}", "backbone.fpn_output{i+3}"),
        ("backbone.fpn.extra_blocks.p6", "backbone.top_block.p6"),
        ("backbone.fpn.extra_blocks.p7", "backbone.top_block.p7"),
        ("head.classification_head.conv.{i}.0", "head.cls_subnet.{2i}"),
        ("head.classification_head.conv.{2i}", "head.cls_subnet.{2i}"),
        ("head.classification_head.cls_logits", "head.cls_score"),
        ("head.regression_head.conv.{i}.0", "head.bbox_subnet.{2i}"),
        ("head.regression_head.conv.{2i}", "head.bbox_subnet.{2i}"),
        ("head.regression_head.bbox_reg", "head.bbox_pred"),
    ),
}
CONFIGS = {
    "Faster R-CNN": "faster_rcnn_R_50_FPN.yaml",
    "Faster R-CNN v2": "faster_rcnn_R_50_FPN_v2.yaml",
    "Mask R-CNN": "mask_rcnn_R_50_FPN.yaml",
    "RetinaNet": "retinanet_R_50_FPN.yaml",
}
# Detectron2's modules with outputs for each class: of how many anchors, and how many for each.
PER_CLASS = {
    "roi_heads.box_predictor.cls_score": (1, 1),
    "roi_heads.box_predictor.bbox_pred": (1, 4),
    "roi_heads.mask_head.predictor": (1, 1),
    "head.cls_score": (NUM_ANCHORS, 1),
}
PER_ANCHOR = ("head.cls_score", "head.bbox_pred")
WEIGHTS = (
    "FasterRCNN_ResNet50_FPN_Weights",
    "FasterRCNN_ResNet50_FPN_V2_Weights",
    "MaskRCNN_ResNet50_FPN_Weights",
    "RetinaNet_ResNet50_FPN_Weights",
)
# The classes of COCO's detectors are its category ids, up to 90. Ten of them no category has.
COCO_OUTPUTS = 91
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
EPSILON = 1e-5  # of batch norm in the configs, as in PyTorch


@dataclass(frozen=True)
class Recognised(conversion.Recognised):
    """A detector of torchvision, recognised by its tensors.

    Args:
        detector: a key of ``MODULES``.
        num_classes: number of classes, without background and COCO's unused ids.
        labels: torchvision's label of each class.
        num_outputs: number of its labels, from 0, the background.
        epsilon: of its batch norm.
    """

    project = "Torchvision"

    labels: Tuple[int, ...]
    num_outputs: int
    epsilon: float

    def __str__(self) -> str:
        return f"torchvision {self.detector}, R-50, {self.num_classes} classes"

    @property
    def config(self) -> str:
        """The file in ``configs/Torchvision/``."""
        return CONFIGS[self.detector]


def download(name: str) -> object:
    """Weights that torchvision publishes, downloaded once into its own cache.

    Args:
        name: such as ``"FasterRCNN_ResNet50_FPN_Weights.COCO_V1"``.

    Raises:
        UserError: if they are not those of a detector that can be converted, or cannot be
            downloaded.
    """
    kind, _, version = name.partition(".")
    if kind not in WEIGHTS or version not in ("COCO_V1", "DEFAULT"):
        known = ", ".join(f"{kind}.COCO_V1" for kind in WEIGHTS)
        raise UserError(f"there is no file {name}, and it is none of torchvision's weights {known}")
    weights = get_weight(name)
    try:
        return weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except Exception as error:  # of the network, the disk or the file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot download {weights.url}: {reason}") from error


def recognise(state: State, epsilon: Optional[float] = None) -> Recognised:
    """Recognise the detector of a state dict that has torchvision's names.

    Args:
        epsilon: of its batch norm. By default 0 where that is frozen in a version 1, as in the
            published weights and what is fine-tuned from them, and 1e-5 elsewhere.

    Raises:
        UserError: if there is no config for it.
    """
    if "roi_heads.box_predictor.cls_score.bias" in state:
        masks = any(name.startswith("roi_heads.mask_predictor.") for name in state)
        detector = "Mask R-CNN" if masks else "Faster R-CNN"
        is_v2 = "roi_heads.box_head.0.0.weight" in state
        num_outputs = state["roi_heads.box_predictor.cls_score.bias"].numel()
    elif "head.classification_head.cls_logits.bias" in state:
        detector = "RetinaNet"
        is_v2 = "head.classification_head.conv.0.1.weight" in state
        num_outputs = state["head.classification_head.cls_logits.bias"].numel() // NUM_ANCHORS
    else:
        raise UserError(
            "it contains neither an R-CNN nor a RetinaNet with torchvision's names: "
            "roi_heads.box_predictor.cls_score.bias and head.classification_head.cls_logits.bias "
            "are both missing"
        )
    if "backbone.body.layer3.5.conv3.weight" not in state:
        raise UserError(
            f"it contains a {detector} without torchvision's ResNet-50; those on MobileNetV3 "
            "cannot be converted: two of their levels have the same stride, and their RPN a "
            "threshold of scores"
        )
    detector += " v2" * is_v2
    if detector not in CONFIGS:
        raise UserError(f"there is no config for a {detector}, only for: {', '.join(CONFIGS)}")
    if num_outputs < 2:
        raise UserError(f"it contains a {detector} without classes")
    unused = UNUSED_IDS if num_outputs == COCO_OUTPUTS else ()
    labels = tuple(label for label in range(1, num_outputs) if label not in unused)
    if epsilon is None:
        epsilon = EPSILON if is_v2 or conversion.has_counters(state) else 0.0
    return Recognised(detector, len(labels), labels, num_outputs, epsilon)


def convert(state: State, recognised: Recognised, cfg: CfgNode) -> State:
    """Convert tensors to the names and the order of this project's model.

    Args:
        state: tensors by torchvision's names.
        recognised: the result of :func:`recognise`.
        cfg: the config of the model that will load them.

    Returns:
        Exactly the tensors of that model.

    Raises:
        UserError: if tensors are missing, left over or of another shape.
    """
    shapes = conversion.model_shapes(cfg)
    for name, shape in shapes.items():
        anchors, values = PER_CLASS.get(name.rpartition(".")[0], (0, 0))
        if anchors:
            shapes[name] = (anchors * recognised.num_outputs * values, *shape[1:])
    converted = conversion.rename(state, MODULES[recognised.detector], recognised, shapes)
    for name, tensor in converted.items():
        module, _, parameter = name.rpartition(".")
        if module in PER_ANCHOR:
            tensor = conversion.sizes_before_ratios(tensor)
        if module in PER_CLASS:
            tensor = _reorder_classes(tensor, module, recognised)
        if parameter == "running_var":
            tensor = tensor + (recognised.epsilon - EPSILON)
        converted[name] = tensor
    return converted


def _reorder_classes(tensor: torch.Tensor, module: str, recognised: Recognised) -> torch.Tensor:
    """Leave out labels that are no class; the background is first in torchvision, here last."""
    anchors, values = PER_CLASS[module]
    has_background = module == "roi_heads.box_predictor.cls_score"
    labels = [*recognised.labels, *[0] * has_background]
    grouped = tensor.reshape(anchors, recognised.num_outputs, values, *tensor.shape[1:])
    return grouped[:, labels].flatten(0, 2)
