"""The feature pyramid of an image before and after balancing."""

from typing import List, NamedTuple

import numpy as np
import torch
from detectron2.engine import DefaultPredictor

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
    pyramids = [
        m for m in predictor.model.modules() if isinstance(m, (BalancedFPN, BalancedBackbone))
    ]
    if not pyramids:
        raise UserError(
            "the model has no balanced feature pyramid: MODEL.BALANCED_FPN.ENABLED has to be True "
            "and MODEL.BACKBONE.NAME one of this project's builders"
        )
    unbalanced: List[torch.Tensor] = []
    balanced: List[torch.Tensor] = []

    def keep_inputs(module, inputs):
        unbalanced.extend(inputs[0])

    def keep_outputs(module, inputs, output):
        balanced.extend(output)

    balancer = pyramids[0].balancer
    handles = [
        balancer.register_forward_pre_hook(keep_inputs),
        balancer.register_forward_hook(keep_outputs),
    ]
    try:
        predictor(image)
    finally:
        for handle in handles:
            handle.remove()
    height, width = predictor.aug.get_transform(image).apply_image(image).shape[:2]
    levels = []
    shapes = pyramids[0].output_shape()
    for (name, shape), before, after in zip(shapes.items(), unbalanced, balanced):
        rows, columns = (-(-length // shape.stride) for length in (height, width))

        def norms(features: torch.Tensor, rows=rows, columns=columns) -> np.ndarray:
            return features[0, :, :rows, :columns].norm(dim=0).cpu().numpy()

        levels.append(Level(name, shape.stride, norms(before), norms(after), norms(after - before)))
    return levels
