"""Conversion of MMDetection's Libra R-CNN models: names, order of anchors, and config."""

import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from balanced_d2.utils.errors import UserError, first_of

# MMDetection's names of modules, and those of Detectron2 or this project. {i} stands for a number,
# {i+2} and {2i} for numbers computed from it. The first row that matches is used.
COMMON = (
    ("backbone.conv1", "backbone.bottom_up.stem.conv1"),
    ("backbone.bn1", "backbone.bottom_up.stem.conv1.norm"),
    ("backbone.layer{k}.{i}.conv{j}", "backbone.bottom_up.res{k+1}.{i}.conv{j}"),
    ("backbone.layer{k}.{i}.bn{j}", "backbone.bottom_up.res{k+1}.{i}.conv{j}.norm"),
    ("backbone.layer{k}.{i}.downsample.0", "backbone.bottom_up.res{k+1}.{i}.shortcut"),
    ("backbone.layer{k}.{i}.downsample.1", "backbone.bottom_up.res{k+1}.{i}.shortcut.norm"),
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
NUM_SIZES = NUM_RATIOS = 3
COCO_CLASSES = 80
BLOCKS_TO_DEPTH = {6: 50, 23: 101}  # of the third stage
CONFIGS = {
    ("Faster R-CNN", "R-50"): "libra_faster_rcnn_R_50_FPN_1x.yaml",
    ("Faster R-CNN", "R-101"): "libra_faster_rcnn_R_101_FPN_1x.yaml",
    ("Faster R-CNN", "X-101-64x4d"): "libra_faster_rcnn_X_101_64x4d_FPN_1x.yaml",
    ("RetinaNet", "R-50"): "libra_retinanet_R_50_FPN_1x.yaml",
}
State = Dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recognised:
    """A model of MMDetection, recognised by its tensors.

    Args:
        detector: a key of ``MODULES``.
        backbone: name of the backbone, such as ``"R-50"``.
        num_classes: number of classes, without background.
    """

    detector: str
    backbone: str
    num_classes: int

    def __str__(self) -> str:
        return f"Libra {self.detector}, {self.backbone}, {self.num_classes} classes"

    @property
    def config(self) -> str:
        """The file in ``configs/MMDetection/``."""
        return CONFIGS[self.detector, self.backbone]

    @property
    def options(self) -> List[str]:
        """``KEY VALUE`` pairs that the config also needs."""
        if self.num_classes == COCO_CLASSES:
            return []
        node = "RETINANET" if self.detector == "RetinaNet" else "ROI_HEADS"
        return [f"MODEL.{node}.NUM_CLASSES", str(self.num_classes)]


def state_dict_of(checkpoint: object) -> State:
    """The model's tensors from the content of a checkpoint file.

    Args:
        checkpoint: a state dict, or a dict with a state dict under ``state_dict``. Names may have
            the prefix ``module.`` of distributed training.

    Returns:
        The tensors in float32, by MMDetection's names, without batch counters.

    Raises:
        UserError: if there are no such tensors.
    """
    state = checkpoint
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise UserError("it contains no state dict")
    tensors = {}
    for name, tensor in dict.items(state):
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"it contains no state dict: {name!r} is not a tensor with a name")
        if not name.endswith(".num_batches_tracked"):
            # Copied, because a view would later be saved together with the whole tensor behind it.
            tensors[name] = tensor.detach().to(torch.float32, copy=True).contiguous()
    if all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module.") :]: tensor for name, tensor in tensors.items()}
    return tensors


def recognise(state: State) -> Recognised:
    """Recognise the model of a state dict that has MMDetection's names.

    Raises:
        UserError: if there is no config for it.
    """
    if "roi_head.bbox_head.fc_cls.bias" in state:
        detector = "Faster R-CNN"
        num_classes = state["roi_head.bbox_head.fc_cls.bias"].numel() - 1
    elif "bbox_head.retina_cls.bias" in state:
        detector = "RetinaNet"
        num_classes = state["bbox_head.retina_cls.bias"].numel() // (NUM_SIZES * NUM_RATIOS)
    else:
        raise UserError(
            "it contains neither a Faster R-CNN nor a RetinaNet with MMDetection's names: "
            "roi_head.bbox_head.fc_cls.bias and bbox_head.retina_cls.bias are both missing"
        )
    if num_classes < 1:
        raise UserError(f"it contains a {detector} without classes")
    if not any(name.startswith("neck.1.refine.") for name in state):
        raise UserError(
            f"it contains a plain {detector}, not a Libra model: neck.1.refine, the balanced "
            "feature pyramid, is missing"
        )
    backbone = _recognise_backbone(state)
    if (detector, backbone) not in CONFIGS:
        known = ", ".join(" ".join(key) for key in CONFIGS)
        raise UserError(f"there is no config for a Libra {detector} {backbone}, only for: {known}")
    return Recognised(detector, backbone, num_classes)


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
    rules = MODULES[recognised.detector]
    backwards = [(theirs, ours) for ours, theirs in rules]
    new_names = {name: _translate(name, rules) for name in state}
    old_names = {new: old for old, new in new_names.items() if new is not None}
    expected = _shapes(cfg)
    problems = [
        *(
            f"{_translate(name, backwards) or name} is missing"
            for name in expected
            if name not in old_names
        ),
        *(f"{old} is left over" for old, new in new_names.items() if new not in expected),
        *(
            f"{old} has shape {tuple(state[old].shape)}, not {expected[new]}"
            for new, old in old_names.items()
            if new in expected and tuple(state[old].shape) != expected[new]
        ),
    ]
    if problems:
        raise UserError(f"it does not contain a {recognised}: {first_of(problems)}")
    converted = {name: state[old_names[name]] for name in expected}
    for name in converted:
        if name.rpartition(".")[0] in PER_ANCHOR:
            converted[name] = sizes_before_ratios(converted[name])
    return converted


def sizes_before_ratios(per_anchor: torch.Tensor) -> torch.Tensor:
    """Reorder the anchors of a location from MMDetection's order to Detectron2's.

    MMDetection lists all sizes for each ratio, Detectron2 all ratios for each size.

    Args:
        per_anchor: weight or bias of a layer, shape (9 * K, ...): K values per anchor.

    Returns:
        A tensor of the same shape.
    """
    grouped = per_anchor.reshape(NUM_RATIOS, NUM_SIZES, -1, *per_anchor.shape[1:])
    return grouped.transpose(0, 1).reshape(per_anchor.shape).contiguous()


def _recognise_backbone(state: State) -> str:
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    weight = state.get("backbone.layer1.0.conv2.weight")
    if len(blocks) not in BLOCKS_TO_DEPTH or weight is None or weight.dim() != 4:
        raise UserError(
            "its backbone is not a ResNet or ResNeXt of 50 or 101 layers with MMDetection's names "
            f"({len(blocks)} blocks in backbone.layer3 instead of 6 or 23)"
        )
    depth = BLOCKS_TO_DEPTH[len(blocks)]
    width, width_per_group = weight.shape[:2]
    groups = width // max(width_per_group, 1)
    return f"R-{depth}" if groups == 1 else f"X-{depth}-{groups}x{width_per_group}d"


def _shapes(cfg: CfgNode) -> Dict[str, Tuple[int, ...]]:
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"  # tensors without memory: only their shapes are needed
    with torch.device("meta"):
        model = build_model(cfg)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# {i}, {2i} or {i+3} in a row of the table
_TERM = re.compile(r"\{(\d*)([a-z])\+?(\d*)\}")


def _translate(name: str, rules: Sequence[Tuple[str, str]]) -> Optional[str]:
    """The new name of a tensor by the first rule (template, template) that matches, if any."""
    module, _, parameter = name.rpartition(".")
    for template, other in rules:
        numbers = _match(template, module)
        if numbers is not None:
            return f"{_fill(other, numbers)}.{parameter}"
    return None


def _fill(template: str, numbers: Dict[str, int]) -> str:
    return _TERM.sub(
        lambda term: str(int(term[1] or 1) * numbers[term[2]] + int(term[3] or 0)), template
    )


def _match(template: str, module: str) -> Optional[Dict[str, int]]:
    """The number for each letter, if the name of a module matches a template."""
    literals = _TERM.split(template)[::4]
    match = re.fullmatch(r"(0|[1-9][0-9]*)".join(map(re.escape, literals)), module)
    if match is None:
        return None
    numbers = {}
    for (factor, letter, offset), digits in zip(_TERM.findall(template), match.groups()):
        numbers[letter], rest = divmod(int(digits) - int(offset or 0), int(factor or 1))
        if rest or numbers[letter] < 0:
            return None
    return numbers
