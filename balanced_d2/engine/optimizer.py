"""The optimizer that ``SOLVER.OPTIMIZER`` names."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from balanced_d2.utils.errors import UserError


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
    # GradScaler leaves it to fused optimizers to unscale gradients, which is after the clipping.
    scaled = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != "cpu"
    # None lets PyTorch choose what is fastest of the others; False would be one tensor at a time.
    fused = None if scaled and cfg.SOLVER.CLIP_GRADIENTS.ENABLED else True
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, fused=fused)


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


@contextmanager
def settings_kept(
    optimizer: torch.optim.Optimizer, scheduler: Optional[LRScheduler]
) -> Iterator[None]:
    """Context manager in which an optimizer's state is loaded, but not its settings: learning rate,
    momentum, weight decay and so on stay those that it was built with.

    Without other settings, the learning rate is bitwise that of the state.

    Args:
        scheduler: of its learning rate, whose own state has been loaded.

    Raises:
        UserError: if the state is of other groups of parameters.
    """
    built = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        yield
    except ValueError as error:
        raise UserError(
            "the state of the optimizer is of another one, or of other groups of parameters "
            f"({error}): leave SOLVER.OPTIMIZER and the keys of weight decay as they were"
        ) from error
    first_rates = []
    for group, settings in zip(optimizer.param_groups, built):
        rate, first_rate = group["lr"], group.get("initial_lr", group["lr"])
        group.update(settings)
        first_rates.append(group.get("initial_lr", group["lr"]))
        # As far along the schedule as before, which may have begun at another rate.
        changed = first_rates[-1] != first_rate
        group["lr"] = rate * first_rates[-1] / first_rate if changed and first_rate else rate
        if "fused" not in group:
            continue
        # If fused, it counts its steps where the parameters are, otherwise on the CPU.
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                on_device = group["fused"] or group.get("capturable", False)
                state["step"] = state["step"].to(parameter.device if on_device else "cpu")
    if scheduler is None:
        return
    scheduler.base_lrs = first_rates
    if isinstance(scheduler, LRMultiplier):  # the schedule itself may have changed
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr()):
            group["lr"] = rate
