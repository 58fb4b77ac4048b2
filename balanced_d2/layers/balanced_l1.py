"""Balanced L1 loss (Libra R-CNN, section 3.3)."""

import math
from typing import Any, Dict

import torch

from balanced_d2.layers.box_losses import BOX_REG_LOSSES
from balanced_d2.utils.errors import UserError


def balanced_l1_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    reduction: str = "none",
) -> torch.Tensor:
    """L1 loss which raises the gradient of inliers and bounds that of outliers.

    With ``x = |input - target|`` and ``b = exp(gamma / alpha) - 1`` (equations 8 to 10 of the
    paper, extended from ``beta = 1`` to any ``beta`` so that value and gradient stay continuous)::

        alpha / b * (b * x + beta) * log(b * x / beta + 1) - alpha * x    if x < beta
        gamma * x + gamma * beta / b - alpha * beta                       otherwise

    The gradient rises from 0 at ``x = 0`` to ``gamma`` at ``x = beta`` and stays there.

    Args:
        input: tensor of any shape.
        target: tensor of the same shape as ``input``.
        alpha: how much the gradient of inliers rises: the smaller, the more. Above 0.
        gamma: the gradient of outliers. Above 0.
        beta: where inliers end and outliers begin, in units of ``input``. Above 0.
        reduction: ``"none"`` (one loss per element), ``"mean"`` or ``"sum"``. The mean of an empty
            input is 0, and differentiable.

    Raises:
        UserError: if ``alpha``, ``gamma`` or ``beta`` is not above 0, ``gamma / alpha`` too large
            or ``reduction`` unknown.
    """
    b = inlier_steepness(alpha, gamma, beta)
    x = torch.abs(input - target)
    inlier = x.clamp(max=beta)
    # Beyond beta the loss goes on from its value there with slope gamma. Written as a sum, no
    # branch ever sees a value out of its range, and there is no overflow to mask.
    slope = alpha * torch.log1p(b / beta * inlier)
    loss = (inlier + beta / b) * slope - alpha * inlier + gamma * (x - inlier)
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean() if loss.numel() > 0 else loss.sum()
    if reduction == "sum":
        return loss.sum()
    raise UserError(f"unknown reduction {reduction!r}; choose one of: none, mean, sum")


def inlier_steepness(alpha: float, gamma: float, beta: float) -> float:
    """``b`` of :func:`balanced_l1_loss`, after checking its arguments (same errors)."""
    for name, value in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(
                f"Balanced L1's {name} (key BALANCED_L1_{name.upper()}) is {value}; it has to be "
                "a finite number above 0"
            )
    if gamma / alpha > 80:  # exp() would leave the range of float32
        raise UserError(
            f"Balanced L1's gamma / alpha is {gamma / alpha:g} (keys BALANCED_L1_GAMMA and "
            "BALANCED_L1_ALPHA); it has to be 80 at most"
        )
    return math.expm1(gamma / alpha)


@BOX_REG_LOSSES.register(name="balanced_l1")
class BalancedL1:
    """:func:`balanced_l1_loss` with its parameters, as a regression loss of boxes.

    Args:
        alpha, gamma, beta: as for :func:`balanced_l1_loss`, with its errors.
    """

    def __init__(self, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0):
        inlier_steepness(alpha, gamma, beta)  # refuse wrong values now, not at the first iteration
        self.alpha, self.gamma, self.beta = alpha, gamma, beta

    @classmethod
    def from_config(cls, node: Any) -> Dict[str, float]:
        return {
            "alpha": node.BALANCED_L1_ALPHA,
            "gamma": node.BALANCED_L1_GAMMA,
            "beta": node.BALANCED_L1_BETA,
        }

    def __call__(self, deltas: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return balanced_l1_loss(deltas, targets, self.alpha, self.gamma, self.beta)
