"""Cut-outs of boxes, with what is around them."""

import os
from typing import List, NamedTuple, Optional

import cv2
import numpy as np
from tqdm import tqdm

from balanced_d2.analysis.dataset import Data
from balanced_d2.analysis.images import Twins
from balanced_d2.analysis.inspection import Inspection
from balanced_d2.data.image import read_image
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization.pair import choose_evenly

SIDE = 200
"""Width and height of a cut-out, in pixels."""
MIN_CONTEXT = 48
"""The least that is shown of an image, in pixels, so that a small object can be recognised."""
NUMBER = 8
"""Cut-outs in a group."""

_COLORS = ((255, 255, 255), (200, 40, 40))  # can be seen on any background


class Crop(NamedTuple):
    """A part of an image."""

    picture: Optional[np.ndarray]
    """uint8 (H, W, 3), RGB, at most :data:`SIDE` high and wide; None if it cannot be read."""
    label: str
    """Name of the class, or of the split."""
    note: str
    """The size, and where it is from."""


class Group(NamedTuple):
    """Parts of images that belong together."""

    title: str
    crops: List[Crop]


def crop_groups(found: Inspection) -> List[Group]:
    """The rarest class, the smallest and the largest boxes, and duplicates, if they are known."""
    data, order = found.data, np.argsort(found.sizes, kind="stable")
    totals = found.counts.class_boxes.sum(axis=0)
    occurring = np.flatnonzero(totals)
    groups = []
    if len(occurring):
        rarest = occurring[totals[occurring].argmin()]
        of_class = np.flatnonzero(data.box_classes == rarest).tolist()
        groups.append((f"Rarest class: {data.classes[rarest]}", choose_evenly(of_class, NUMBER)))
        groups.append(("Smallest boxes", order[:NUMBER].tolist()))
        groups.append(("Largest boxes", order[::-1][:NUMBER].tolist()))
    bar = tqdm(groups, desc="cutting out boxes", unit="group", disable=None)
    result = [Group(title, [_crop(data, box) for box in boxes]) for title, boxes in bar]
    if found.twins is not None and (found.twins.elsewhere >= 0).any():
        result.append(_duplicates(data, found.twins))
    return result


def _crop(data: Data, box: int) -> Crop:
    path, box_xyxy = data.files[data.box_images[box]], data.boxes[box]
    width, height = box_xyxy[2:] - box_xyxy[:2]
    note = f"{width:.0f} × {height:.0f}, {data.splits[data.image_splits[data.box_images[box]]]}"
    label = data.classes[data.box_classes[box]]
    try:
        image = read_image(path, "RGB")
    except UserError:
        return Crop(None, label, f"{note}: cannot read {path}")
    return Crop(cut_out(image, box_xyxy), label, note)


def cut_out(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of an image around a box, which is outlined.

    Args:
        image: uint8 (H, W, 3).
        box: (4,), x0, y0, x1, y1 in pixels.

    Returns:
        uint8, at most :data:`SIDE` high and wide.
    """
    shape = np.array(image.shape[1::-1])
    centre, side = (box[:2] + box[2:]) / 2, max(1.5 * (box[2:] - box[:2]).max(), MIN_CONTEXT)
    start = np.floor(np.clip(centre - side / 2, 0, np.maximum(shape - side, 0))).astype(int)
    end = np.minimum(np.ceil(start + side).astype(int), shape)
    part = _fit(image[start[1] : end[1], start[0] : end[0]])
    scale = part.shape[1] / (end[0] - start[0])
    corners = np.rint((box.reshape(2, 2) - start) * scale).astype(int).tolist()
    for color, thickness in zip(_COLORS, (4, 2)):
        cv2.rectangle(part, corners[0], corners[1], color, thickness, cv2.LINE_AA)
    return part


def _fit(image: np.ndarray) -> np.ndarray:
    scale = SIDE / max(image.shape[:2])
    size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.ascontiguousarray(cv2.resize(image, size, interpolation=interpolation))


def _duplicates(data: Data, twins: Twins) -> Group:
    crops = []
    images = np.flatnonzero(twins.elsewhere >= 0)
    pairs = np.unique(np.sort(np.stack([images, twins.elsewhere[images]], axis=1)), axis=0)
    for pair in choose_evenly(pairs.tolist(), NUMBER // 2):
        for one in pair:
            path = data.files[one]
            try:
                picture = _fit(read_image(path, "RGB"))
            except UserError:
                picture = None
            crops.append(Crop(picture, data.splits[data.image_splits[one]], os.path.basename(path)))
    return Group("Duplicates in different splits, in pairs", crops)
