"""What makes a model faster and changes its results by rounding at most."""

import logging

import torch
from detectron2.config import CfgNode
from torch import nn

from balanced_d2.modeling.roi_align import use_sparse_roi_align


def speed_up(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Prepare a model as ``MODEL.CHANNELS_LAST`` and ``MODEL.SPARSE_ROI_ALIGN`` say."""
    if cfg.MODEL.SPARSE_ROI_ALIGN:
        if not torch.backends.mkl.is_available():
            logging.getLogger(__name__).warning(
                "MODEL.SPARSE_ROI_ALIGN has no effect: this PyTorch has no MKL"
            )
        use_sparse_roi_align(model)
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model
