"""The three balances of Libra R-CNN as Detectron2 modules. Importing registers them."""

from balanced_d2.modeling.balanced_fpn import (
    P6P7,
    BalancedFPN,
    build_balanced_fpn_backbone,
    build_balanced_resnet_fpn_backbone,
    build_balanced_retinanet_fpn_backbone,
    build_balanced_retinanet_resnet_fpn_backbone,
)
from balanced_d2.modeling.balanced_l1 import BalancedL1, balanced_l1_loss
from balanced_d2.modeling.box_losses import BOX_REG_LOSSES
from balanced_d2.modeling.box_predictor import BalancedFastRCNNOutputLayers
from balanced_d2.modeling.feature_balancer import REFINEMENTS, FeatureBalancer
from balanced_d2.modeling.non_local import NonLocal2d
from balanced_d2.modeling.retinanet import BalancedRetinaNet
from balanced_d2.modeling.roi_heads import (
    BalancedBoxLossMixin,
    BalancedCascadeROIHeads,
    BalancedROIHeads,
    BalancedSamplingMixin,
)
from balanced_d2.modeling.sampling import (
    NEGATIVE_SAMPLERS,
    POSITIVE_SAMPLERS,
    IoUBalancedSampler,
    sample_evenly,
    sample_instance_balanced,
    sample_iou_balanced,
    sample_random,
)

__all__ = [
    "BOX_REG_LOSSES",
    "NEGATIVE_SAMPLERS",
    "P6P7",
    "POSITIVE_SAMPLERS",
    "REFINEMENTS",
    "BalancedBoxLossMixin",
    "BalancedCascadeROIHeads",
    "BalancedFPN",
    "BalancedFastRCNNOutputLayers",
    "BalancedL1",
    "BalancedROIHeads",
    "BalancedRetinaNet",
    "BalancedSamplingMixin",
    "FeatureBalancer",
    "IoUBalancedSampler",
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
