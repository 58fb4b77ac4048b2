"""The balances as Detectron2's classes. Importing registers them."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2 import layers
from balanced_d2.layers import *  # noqa: F403  # their names are known here, too
from balanced_d2.modeling.anchors import TorchvisionAnchorGenerator
from balanced_d2.modeling.backbones import (
    build_balanced_fpn_backbone,
    build_balanced_resnet_fpn_backbone,
    build_balanced_retinanet_fpn_backbone,
    build_balanced_retinanet_resnet_fpn_backbone,
)
from balanced_d2.modeling.balanced_backbone import BalancedBackbone
from balanced_d2.modeling.balanced_fpn import P6P7, BalancedFPN
from balanced_d2.modeling.balanced_sampling import BalancedSamplingMixin
from balanced_d2.modeling.box_predictor import BalancedFastRCNNOutputLayers
from balanced_d2.modeling.checks import check_balanced
from balanced_d2.modeling.retinanet import BalancedRetinaNet
from balanced_d2.modeling.roi_heads import (
    BalancedBoxLossMixin,
    BalancedCascadeROIHeads,
    BalancedROIHeads,
)
from balanced_d2.modeling.timm_backbone import TimmBackbone, build_timm_backbone
from balanced_d2.modeling.torchvision_backbone import (
    TorchvisionBackbone,
    build_torchvision_backbone,
)

__all__ = [
    *layers.__all__,
    "P6P7",
    "BalancedBackbone",
    "BalancedBoxLossMixin",
    "BalancedCascadeROIHeads",
    "BalancedFPN",
    "BalancedFastRCNNOutputLayers",
    "BalancedROIHeads",
    "BalancedRetinaNet",
    "BalancedSamplingMixin",
    "TimmBackbone",
    "TorchvisionAnchorGenerator",
    "TorchvisionBackbone",
    "build_balanced_fpn_backbone",
    "build_balanced_resnet_fpn_backbone",
    "build_balanced_retinanet_fpn_backbone",
    "build_balanced_retinanet_resnet_fpn_backbone",
    "build_timm_backbone",
    "build_torchvision_backbone",
    "check_balanced",
]
