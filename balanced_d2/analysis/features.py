"""The feature pyramid of an image before and after balancing."""

from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from torch import nn

from balanced_d2.modeling import BalancedBackbone, BalancedFPN
from balanced_d2.utils.errors import UserError


class Level(NamedTuple):
    """One level of a pyramid, with its features as norms over the channels."""

    name: str
    """Such as "p2"."""
    stride: int
    """In pixels of the network's input."""
    before: np.ndarray
    """Shape (H, W), the L2 norm of the features over the channels at each position."""
    after: np.ndarray
    """Shape (H, W), the same for the balanced features."""
    added: np.ndarray
    """Shape (H, W), the same for what balancing adds."""


def energy(norms: np.ndarray) -> float:
    """The squared norm, averaged over the positions."""
    return float(np.square(norms, dtype=np.float64).mean())


def balance_levels(predictor: DefaultPredictor, image: np.ndarray) -> List[Level]:
    """Run a detector on an image and return its pyramid before and after balancing.

    Args:
        predictor: has the model.
        image: uint8, shape (H, W, 3), BGR.

    Returns:
        The levels from fine to coarse, without the network's padding of the image.

    Raises:
        UserError: if the model has no balanced feature pyramid.
    """
    with recorded_levels(predictor.model) as levels:
        predictor(image)
    return levels


@contextmanager
def recorded_levels(model: nn.Module) -> Iterator[List[Level]]:
    """Context manager for running a detector on one image.

    Yields:
        A list, which the model fills: as :func:`balance_levels` returns it.

    Raises:
        UserError: if the model has no balanced feature pyramid.
    """
    pyramids = [m for m in model.modules() if isinstance(m, (BalancedFPN, BalancedBackbone))]
    if not pyramids:
        raise UserError(
            "the model has no balanced feature pyramid: MODEL.BALANCED_FPN.ENABLED has to be True "
            "and MODEL.BACKBONE.NAME one of this project's builders"
        )
    shapes = pyramids[0].output_shape()
    size: List[int] = []
    levels: List[Level] = []

    def keep_size(module, inputs):
        (image,) = inputs[0]
        size[:] = image["image"].shape[-2:]

    def keep_levels(module, inputs, output):
        levels[:] = [
            _level(name, shape.stride, size, before, after)
            for (name, shape), before, after in zip(shapes.items(), inputs[0], output)
        ]

    handles = [
        model.register_forward_pre_hook(keep_size),
        pyramids[0].balancer.register_forward_hook(keep_levels),
    ]
    try:
        yield levels
    finally:
        for handle in handles:
            handle.remove()


def _level(
    name: str, stride: int, size: Sequence[int], before: torch.Tensor, after: torch.Tensor
) -> Level:
    """A level of an image of a size (height and width), from features of shape (1, C, H, W)."""
    rows, columns = (-(-length // stride) for length in size)

    def norms(features: torch.Tensor) -> np.ndarray:
        return features[0, :, :rows, :columns].norm(dim=0).cpu().numpy()

    before, after = before.detach().float(), after.detach().float()
    return Level(name, stride, norms(before), norms(after), norms(after - before))
