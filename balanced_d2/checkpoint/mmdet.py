"""Conversion of MMDetection's Libra R-CNN models: names, order of anchors, and config."""

from dataclasses import dataclass

from detectron2.config import CfgNode

from balanced_d2.checkpoint import conversion
from balanced_d2.checkpoint.conversion import NUM_ANCHORS, RESNET, Rules, State, below
from balanced_d2.utils.errors import UserError

# MMDetection's names of modules, and those of Detectron2 or this project.
COMMON: Rules = (
    *below("backbone", "backbone.bottom_up", RESNET),
    ("neck.1.refine.theta.conv", "backbone.balancer.refine.theta"),
    ("neck.1.refine.phi.conv", "backbone.balancer.refine.phi"),
    ("neck.1.refine.g.conv", "backbone.balancer.refine.g"),
    ("neck.1.refine.conv_out.conv", "backbone.balancer.refine.conv_out"),
)
MODULES = {
    "Faster R-CNN": (
        *COMMON,
        ("neck.0.lateral_convs.{i}.conv", "backbone.fpn_lateral{i+2}"),
        ("neck.0.fpn_convs.{i}.conv", "backbone.fpn_output{i+2}"),
        ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"),
        ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
        ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
        ("roi_head.bbox_head.shared_fcs.{i}", "roi_heads.box_head.fc{i+1}"),
        ("roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"),
        ("roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    ),
    "RetinaNet": (
        *COMMON,
        ("neck.0.lateral_convs.{i}.conv", "backbone.fpn_lateral{i+3}"),
        ("neck.0.fpn_convs.3.conv", "backbone.top_block.p6"),
        ("neck.0.fpn_convs.4.conv", "backbone.top_block.p7"),
        ("neck.0.fpn_convs.{i}.conv", "backbone.fpn_output{i+3}"),
        ("bbox_head.cls_convs.{i}.conv", "head.cls_subnet.{2i}"),
        ("bbox_head.reg_convs.{i}.conv", "head.bbox_subnet.{2i}"),
        ("bbox_head.retina_cls", "head.cls_score"),
        ("bbox_head.retina_reg", "head.bbox_pred"),
    ),
}
# Detectron2's modules with one or more outputs for each of the anchors at a location.
PER_ANCHOR = ("head.cls_score", "head.bbox_pred")
BLOCKS_TO_DEPTH = {6: 50, 23: 101}  # of the third stage
CONFIGS = {
    ("Faster R-CNN", "R-50"): "libra_faster_rcnn_R_50_FPN_1x.yaml",
    ("Faster R-CNN", "R-101"): "libra_faster_rcnn_R_101_FPN_1x.yaml",
    ("Faster R-CNN", "X-101-64x4d"): "libra_faster_rcnn_X_101_64x4d_FPN_1x.yaml",
    ("RetinaNet", "R-50"): "libra_retinanet_R_50_FPN_1x.yaml",
}


@dataclass(frozen=True)
class Recognised(conversion.Recognised):
    """A model of MMDetection, recognised by its tensors.

    Args:
        detector: a key of ``MODULES``.
        num_classes: number of classes, without background.
        backbone: name of the backbone, such as ``"R-50"``.
    """

    project = "MMDetection"

    backbone: str

    def __str__(self) -> str:
        return f"Libra {self.detector}, {self.backbone}, {self.num_classes} classes"

    @property
    def config(self) -> str:
        """The file in ``configs/MMDetection/``."""
        return CONFIGS[self.detector, self.backbone]


def recognise(state: State) -> Recognised:
    """Which of MMDetection's Libra models a state dict, by MMDetection's names, belongs to.

    Raises:
        UserError: if it is none of those that there is a config for.
    """
    if "roi_head.bbox_head.fc_cls.bias" in state:
        detector = "Faster R-CNN"
        num_classes = state["roi_head.bbox_head.fc_cls.bias"].numel() - 1
    elif "bbox_head.retina_cls.bias" in state:
        detector = "RetinaNet"
        num_classes = state["bbox_head.retina_cls.bias"].numel() // NUM_ANCHORS
    else:
        raise UserError(
            "it holds no Faster R-CNN and no RetinaNet by MMDetection's names: there is neither "
            "roi_head.bbox_head.fc_cls.bias nor bbox_head.retina_cls.bias"
        )
    if num_classes < 1:
        raise UserError(f"it holds a {detector} that has no classes")
    if not any(name.startswith("neck.1.refine.") for name in state):
        raise UserError(
            f"it holds a plain {detector}, not a Libra model: neck.1.refine, the balanced feature "
            "pyramid, is missing"
        )
    backbone = _recognise_backbone(state)
    if (detector, backbone) not in CONFIGS:
        known = ", ".join(" ".join(key) for key in CONFIGS)
        raise UserError(f"there is no config for a Libra {detector} {backbone}, only for: {known}")
    return Recognised(detector, num_classes, backbone)


def convert(state: State, recognised: Recognised, cfg: CfgNode) -> State:
    """Convert tensors to the names and the order of this project's model.

    Args:
        state: tensors by MMDetection's names.
        recognised: the result of :func:`recognise`.
        cfg: the config of the model that will load them.

    Returns:
        Exactly the tensors of that model.

    Raises:
        UserError: if tensors are missing, left over or of another shape.
    """
    shapes = conversion.model_shapes(cfg)
    converted = conversion.rename(state, MODULES[recognised.detector], recognised, shapes)
    for name in converted:
        if name.rpartition(".")[0] in PER_ANCHOR:
            converted[name] = conversion.sizes_before_ratios(converted[name])
    return converted


def _recognise_backbone(state: State) -> str:
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    weight = state.get("backbone.layer1.0.conv2.weight")
    if len(blocks) not in BLOCKS_TO_DEPTH or weight is None or weight.dim() != 4:
        raise UserError(
            "its backbone is no ResNet or ResNeXt of 50 or 101 layers by MMDetection's names "
            f"({len(blocks)} blocks in backbone.layer3, where those have 6 and 23)"
        )
    depth = BLOCKS_TO_DEPTH[len(blocks)]
    width, width_per_group = weight.shape[:2]
    groups = width // max(width_per_group, 1)
    return f"R-{depth}" if groups == 1 else f"X-{depth}-{groups}x{width_per_group}d"
