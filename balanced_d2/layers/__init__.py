"""The balances in tensors, for any PyTorch code: nothing here needs Detectron2."""

from balanced_d2.layers.balanced_l1 import BalancedL1, balanced_l1_loss
from balanced_d2.layers.box_losses import BOX_REG_LOSSES
from balanced_d2.layers.class_counts import class_groups, weights_of_counts
from balanced_d2.layers.class_losses import (
    CLS_LOSSES,
    BalancedSoftmax,
    ClassLoss,
    FocalLoss,
    SeesawLoss,
    WeightedCrossEntropy,
    WeightedFocalLoss,
)
from balanced_d2.layers.feature_balancer import REFINEMENTS, FeatureBalancer
from balanced_d2.layers.hard_examples import HardExampleSampler
from balanced_d2.layers.non_local import NonLocal2d
from balanced_d2.layers.sampling import (
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
    "CLS_LOSSES",
    "NEGATIVE_SAMPLERS",
    "POSITIVE_SAMPLERS",
    "REFINEMENTS",
    "BalancedL1",
    "BalancedSoftmax",
    "ClassLoss",
    "FeatureBalancer",
    "FocalLoss",
    "HardExampleSampler",
    "IoUBalancedSampler",
    "NonLocal2d",
    "SeesawLoss",
    "WeightedCrossEntropy",
    "WeightedFocalLoss",
    "balanced_l1_loss",
    "class_groups",
    "sample_evenly",
    "sample_instance_balanced",
    "sample_iou_balanced",
    "sample_random",
    "weights_of_counts",
]
