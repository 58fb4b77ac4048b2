"""How a model lies in memory."""

import torch
from detectron2.config import CfgNode
from torch import nn


def in_memory_format(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model, with its channels last if ``MODEL.CHANNELS_LAST`` says so; its values stay."""
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model
