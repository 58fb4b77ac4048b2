"""The three balances of Libra R-CNN as Detectron2 modules. Importing registers them."""

from balanced_d2.modeling.balanced_fpn import (
    P6P7,
    BalancedFPN,
    build_balanced_fpn_backbone,
    build_balanced_resnet_fpn_backbone,
    build_balanced_retinanet_fpn_backbone,
    build_balanced_retinanet_resnet_fpn_backbone,
)
from balanced_d2.modeling.balanced_l1 import balanced_l1_loss
from balanced_d2.modeling.box_predictor import BalancedFastRCNNOutputLayers
from balanced_d2.modeling.feature_balancer import FeatureBalancer
from balanced_d2.modeling.non_local import NonLocal2d
from balanced_d2.modeling.retinanet import BalancedRetinaNet
from balanced_d2.modeling.roi_heads import (
    BalancedBoxLossMixin,
    BalancedCascadeROIHeads,
    BalancedROIHeads,
    BalancedSamplingMixin,
)
from balanced_d2.modeling.sampling import (
    sample_evenly,
    sample_instance_balanced,
    sample_iou_balanced,
    sample_random,
)

__all__ = [
    "P6P7",
    "BalancedBoxLossMixin",
    "BalancedCascadeROIHeads",
    "BalancedFPN",
    "BalancedFastRCNNOutputLayers",
    "BalancedROIHeads",
    "BalancedRetinaNet",
    "BalancedSamplingMixin",
    "FeatureBalancer",
    "NonLocal2d",
    "balanced_l1_loss",
    "build_balanced_fpn_backbone",
    "build_balanced_resnet_fpn_backbone",
    "build_balanced_retinanet_fpn_backbone",
    "build_balanced_retinanet_resnet_fpn_backbone",
    "sample_evenly",
    "sample_instance_balanced",
    "sample_iou_balanced",
    "sample_random",
]
