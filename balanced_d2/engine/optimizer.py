"""The optimizer that ``SOLVER.OPTIMIZER`` names."""

from typing import Any, Dict, List

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's SGD, or AdamW (Loshchilov and Hutter, ICLR 2019) with the same parameter groups
    and gradient clipping.

    The keys of ``SOLVER`` mean the same for both, except ``MOMENTUM`` and ``NESTEROV``, which AdamW
    does not have. The learning rate of the backbone below the pyramid (of the whole backbone, if it
    has no pyramid) is multiplied by ``SOLVER.BACKBONE_MULTIPLIER``.
    """
    sgd, factor = solver.build_optimizer(cfg, model), cfg.SOLVER.BACKBONE_MULTIPLIER
    if cfg.SOLVER.OPTIMIZER == "SGD" and factor == 1:
        return sgd
    groups = _split(sgd.param_groups, _backbone_parameters(model), factor)
    if cfg.SOLVER.OPTIMIZER == "SGD":
        arguments = {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
        return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(groups, **arguments)
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, fused=True)


def _backbone_parameters(model: nn.Module) -> List[nn.Parameter]:
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("backbone.")]
    below = [parameter for name, parameter in named if "bottom_up." in name]
    return below or [parameter for _, parameter in named]


def _split(
    groups: List[Dict[str, Any]], backbone: List[nn.Parameter], factor: float
) -> List[Dict[str, Any]]:
    """Groups of (params, lr, weight_decay), with those of the backbone on their own."""
    in_backbone, split = {id(parameter) for parameter in backbone}, []
    for group in groups:
        for multiplier, is_backbone in ((1, False), (factor, True)):
            params = [p for p in group["params"] if (id(p) in in_backbone) == is_backbone]
            if params:
                lr, weight_decay = multiplier * group["lr"], group["weight_decay"]
                split.append({"params": params, "lr": lr, "weight_decay": weight_decay})
    return split
