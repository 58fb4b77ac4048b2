"""Ground truth and detections of an image, side by side."""

from typing import Dict, List, Optional, Sequence, TypeVar

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from balanced_d2.data.image import read_image
from balanced_d2.visualization.fonts import use_font_for

GAP = 8
WHITE = (255, 255, 255)

Item = TypeVar("Item")


def draw_pair(
    record: Dict,
    detections: Instances,
    metadata: Metadata,
    width: int = 320,
    gray_range: Optional[float] = None,
) -> np.ndarray:
    """Draw an image twice: with its ground truth on the left, with detections on the right.

    Args:
        record: the image, as one of Detectron2's standard dataset dicts.
        detections: in pixels of the image, on the CPU; all of them are drawn.
        metadata: metadata of the dataset, with the names of the classes.
        width: width in pixels to which the image is scaled.
        gray_range: as for :func:`balanced_d2.data.image.read_image`.

    Returns:
        uint8 image (H, 2 * width + 4, 3), RGB; rounding can change the width.
    """
    use_font_for(tuple(metadata.get("thing_classes", ())))
    image = read_image(record["file_name"], format="RGB", gray_range=gray_range)
    scale = width / image.shape[1]
    truth = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record).get_image()
    drawn = Visualizer(image, metadata, scale=scale).draw_instance_predictions(detections)
    truth = pad(truth, truth.shape[0], truth.shape[1] + GAP // 2)
    return np.hstack([truth, drawn.get_image()])


def choose_evenly(records: Sequence[Item], number: int) -> List[Item]:
    """``number`` of the records, evenly spread and always the same, or all if there are fewer."""
    places = np.linspace(0, len(records) - 1, min(number, len(records))).round().astype(int)
    return [records[i] for i in places]


def pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image in the upper left corner of a white one of the given size."""
    bottom, right = height - image.shape[0], width - image.shape[1]
    return cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=WHITE)
