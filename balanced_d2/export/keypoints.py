"""Keypoints from heat maps, for ``torch.export``."""

from typing import Any

import torch
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch.nn import functional as F

from balanced_d2.layers.exporting import is_exporting


def find_keypoints(maps: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Where each heat map, scaled to the pixels of its box, is highest.

    Args:
        maps: logits of shape (S, K, P, P). S may be known at run time only.
        boxes: shape (S, 4).

    Returns:
        Tensor of shape (S, K, 3): x and y in pixels of the image, and a score above 0.
    """
    if not is_exporting():
        return heatmaps_to_keypoints(maps, boxes)[:, :, [0, 1, 3]]
    number = torch.full((), maps.shape[0], dtype=torch.long, device=maps.device)

    def is_left(row, found):
        return row < number

    def find_next(row, found):
        at = row.reshape(1)
        points = _find_in_one(maps.index_select(0, at)[0], boxes.index_select(0, at)[0])
        return row + 1, found.index_copy(0, at, points[None])

    nothing = maps.new_zeros(maps.shape[0], maps.shape[1], 3)
    return torch.while_loop(is_left, find_next, (torch.zeros_like(number), nothing))[1]


def _find_in_one(maps: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """The same of maps (K, P, P) and their box (4,), with the box's size as symbols."""
    size = (box[2:] - box[:2]).clamp(min=1)
    pixels = size.ceil()
    width: Any = pixels[0].long().item()
    height: Any = pixels[1].long().item()
    torch._check(width >= 1)
    torch._check(height >= 1)
    scaled = F.interpolate(maps[None], size=(height, width), mode="bicubic", align_corners=False)
    scaled = scaled[0].flatten(1)
    at = scaled.argmax(dim=1)
    highest = scaled.gather(1, at[:, None])
    score = 1 / (maps.flatten(1) - highest).exp().sum(dim=1)
    x = at % width
    place = torch.stack([x, (at - x).div(width, rounding_mode="floor")], dim=1) + 0.5
    return torch.cat([place * (size / pixels) + box[:2], score[:, None]], dim=1)
