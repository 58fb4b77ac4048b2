"""Balancing, sampling and the box loss by themselves, and how balancing grows with its input."""

import torch
from detectron2.modeling.sampling import subsample_labels
from fvcore.nn import smooth_l1_loss
from torch import nn

from balanced_d2.benchmark.baselines import ExplicitBalancer, sample_with_sets
from balanced_d2.benchmark.bench import Bench
from balanced_d2.layers.feature_balancer import REFINEMENTS
from balanced_d2.modeling import (
    FeatureBalancer,
    NonLocal2d,
    balanced_l1_loss,
    sample_iou_balanced,
)


def pyramid(batch: int, channels: int, height: int, width: int, device) -> list:
    """P2 to P6 of an image of a size that is a multiple of 32."""
    sizes = [(height // stride, width // stride) for stride in (4, 8, 16, 32)]
    sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return [torch.randn(batch, channels, *s, device=device, requires_grad=True) for s in sizes]


def forward_and_backward(module: nn.Module, features):
    """A function that runs both, of a module that takes and returns a tensor or a list of them."""
    is_one = isinstance(features, torch.Tensor)
    leaves = [features] if is_one else features
    gradients = [torch.ones_like(x) for x in leaves]

    def run():
        torch.autograd.backward(module(features), gradients[0] if is_one else gradients)
        for x in leaves:
            x.grad = None
        module.zero_grad()

    return run


def measure_parts(bench: Bench, scale: float) -> None:
    """Balancing, sampling and loss by themselves."""
    height, width = (32 * round(side * scale / 32) for side in (800, 1344))
    channels = 256
    features = pyramid(2, channels, height, width, bench.device)
    explicit = ExplicitBalancer(channels).to(bench.device)
    balancers = {
        name: FeatureBalancer(channels, 2, name).to(bench.device) for name in REFINEMENTS.names()
    }

    @torch.no_grad()
    def forward(balancer):
        balancer(features)

    where = f"batch 2, {height} x {width}, {channels} channels"
    bench.compare(
        f"feature balancing, forward, {where}",
        {
            "explicit N x N": lambda: forward(explicit),
            **{name: (lambda b=b: forward(b)) for name, b in balancers.items()},
        },
    )
    bench.compare(
        f"feature balancing, forward and backward, {where}",
        {
            "explicit N x N": forward_and_backward(explicit, features),
            **{name: forward_and_backward(b, features) for name, b in balancers.items()},
        },
    )

    refined = pyramid(2, channels, height, width, bench.device)[2]
    bench.compare(
        f"refinement alone, forward and backward, {where}",
        {
            name: forward_and_backward(block.to(bench.device), refined)
            for name, block in (
                ("non_local", NonLocal2d(channels)),
                ("non_local_pooled", NonLocal2d(channels, pool_keys=True)),
            )
        },
    )

    # Many easy candidates and few hard ones, as proposals have them.
    ious = 0.5 * torch.rand(2000, device=bench.device) ** 3
    labels = torch.full((2000,), 80, device=bench.device)
    bench.compare(
        "sampling 512 of 2,000 candidates",
        {
            "Detectron2, random": lambda: subsample_labels(labels, 512, 0.25, 80),
            "IoU-balanced": lambda: sample_iou_balanced(ious, 512),
            "NumPy and sets": lambda: sample_with_sets(ious, 512),
        },
        calls=20,
        memory=False,
    )

    deltas = torch.randn(512, 4, device=bench.device, requires_grad=True)
    targets = torch.randn(512, 4, device=bench.device)
    bench.compare(
        "box loss of 512 boxes, forward and backward",
        {
            "fvcore's smooth L1": lambda: smooth_l1_loss(deltas, targets, 1.0, "sum").backward(),
            "Balanced L1": lambda: balanced_l1_loss(deltas, targets, reduction="sum").backward(),
        },
        calls=20,
        memory=False,
    )


def measure_growth(bench: Bench, scale: float) -> None:
    """How the cost of balancing grows with the image and the batch."""
    side = max(64, 32 * round(256 * scale / 32))
    balancer = FeatureBalancer(256).to(bench.device)
    # height and width in turn: area x 1, 2, 4, 8
    areas = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}
    bench.growth(
        f"balancing, forward and backward, with the area of {side} x {side}",
        {
            area: forward_and_backward(balancer, pyramid(1, 256, h * side, w * side, bench.device))
            for area, (h, w) in areas.items()
        },
    )
    bench.growth(
        f"balancing, forward and backward, with the batch, {side} x {side}",
        {
            batch: forward_and_backward(balancer, pyramid(batch, 256, side, side, bench.device))
            for batch in (1, 2, 4, 8)
        },
    )
