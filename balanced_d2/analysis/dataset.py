"""What is in datasets: images and boxes by class and split, boxes per image, overlaps."""

from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from tqdm import tqdm

from balanced_d2.data.image import size_of
from balanced_d2.utils.errors import raise_user_errors

# Rows of a matrix of overlaps that are computed together: an image may have thousands of boxes.
_ROWS = 1000


class Data(NamedTuple):
    """The images and boxes of one or several datasets, called splits, as arrays.

    Crowds are not among the boxes, because training does not use them.
    """

    splits: List[str]
    """Names of the S datasets."""
    classes: List[str]
    """Names of the K classes of all datasets together."""
    files: List[str]
    """Paths of the I images."""
    sizes: np.ndarray
    """Int (I, 2), width and height of the images in pixels."""
    image_splits: np.ndarray
    """Int (I,), index of the split of each image."""
    boxes: np.ndarray
    """Float (N, 4), x0, y0, x1, y1 in pixels of the image."""
    box_images: np.ndarray
    """Int (N,), index of the image of each box, ascending."""
    box_classes: np.ndarray
    """Int (N,)."""
    crowds: np.ndarray
    """Int (S,), number of crowds that are left out."""

    @property
    def box_splits(self) -> np.ndarray:
        """Int (N,), index of the split of each box."""
        return self.image_splits[self.box_images]


def read_data(records: Mapping[str, List[Dict]]) -> Data:
    """Collect the records of datasets.

    Classes are matched by name: those of the first dataset come first, in its order. Where a
    dataset has no names, its classes are called by their numbers. Rotated boxes are replaced by the
    upright ones around them. Where a record has no width and height, the image's header is read.

    Args:
        records: Detectron2's standard dataset dicts by name of the dataset, without boxes that
            cannot be trained on (:func:`balanced_d2.data.checks.records.examine`).

    Raises:
        UserError: if the size of an image is not in its record and cannot be read.
    """
    classes: Dict[str, int] = {}
    files: List[str] = []
    sizes, image_splits = [], []
    given: List[Sequence[float]] = []
    modes: List[BoxMode] = []
    box_images, box_classes = [], []
    crowds = np.zeros(len(records), dtype=int)
    for split, (name, of_split) in enumerate(records.items()):
        numbers = [
            classes.setdefault(label, len(classes)) for label in _class_names(name, of_split)
        ]
        for record in of_split:
            for annotation in record.get("annotations", ()):
                if annotation.get("iscrowd", 0):
                    crowds[split] += 1
                    continue
                given.append(annotation["bbox"])
                modes.append(annotation["bbox_mode"])
                box_images.append(len(files))
                box_classes.append(numbers[annotation["category_id"]])
            files.append(record["file_name"])
            sizes.append(_size_of(record))
            image_splits.append(split)
    return Data(
        splits=list(records),
        classes=list(classes),
        files=files,
        sizes=np.array(sizes, dtype=int).reshape(-1, 2),
        image_splits=np.array(image_splits, dtype=int),
        boxes=_corners(given, modes),
        box_images=np.array(box_images, dtype=int),
        box_classes=np.array(box_classes, dtype=int),
        crowds=crowds,
    )


def _corners(boxes: Sequence[Sequence[float]], modes: Sequence[BoxMode]) -> np.ndarray:
    """Boxes of any mode as float (N, 4), x0, y0, x1, y1."""
    corners, given = np.zeros((len(boxes), 4)), np.array(modes, dtype=int)
    for mode in set(modes):
        which = np.flatnonzero(given == mode)
        # Of an array, not of each box, which Detectron2 would round to 32 bits.
        of_mode = np.array([boxes[i] for i in which.tolist()], dtype=np.float64)
        corners[which] = BoxMode.convert(of_mode, BoxMode(mode), BoxMode.XYXY_ABS)
    return corners


def _class_names(name: str, records: List[Dict]) -> List[str]:
    names = MetadataCatalog.get(name).get("thing_classes")
    if names is not None:
        return [str(label) for label in names]
    used = [a["category_id"] for record in records for a in record.get("annotations", ())]
    return [str(number) for number in range(max(used, default=-1) + 1)]


def _size_of(record: Dict) -> Tuple[int, int]:
    if "width" in record and "height" in record:
        return record["width"], record["height"]
    path = record["file_name"]
    with raise_user_errors(f"image {path}", SyntaxError, ValueError), Image.open(path) as image:
        return size_of(image)


class Counts(NamedTuple):
    """Numbers of images and boxes."""

    images: np.ndarray
    """Int (S,), images of each split."""
    empty: np.ndarray
    """Int (S,), those of them without a box."""
    boxes: np.ndarray
    """Int (S,), boxes of each split."""
    class_images: np.ndarray
    """Int (S, K), images of each split that have a class."""
    class_boxes: np.ndarray
    """Int (S, K), boxes of each class."""
    per_image: np.ndarray
    """Int (I,), boxes in each image."""


def count(data: Data) -> Counts:
    """Count images and boxes by split and class."""
    num_splits, num_classes = len(data.splits), len(data.classes)
    per_image = np.bincount(data.box_images, minlength=len(data.files))
    occurring = np.unique(np.stack([data.box_images, data.box_classes], axis=1), axis=0)
    class_images = np.zeros((num_splits, num_classes), dtype=int)
    np.add.at(class_images, (data.image_splits[occurring[:, 0]], occurring[:, 1]), 1)
    class_boxes = np.zeros((num_splits, num_classes), dtype=int)
    np.add.at(class_boxes, (data.box_splits, data.box_classes), 1)
    return Counts(
        images=np.bincount(data.image_splits, minlength=num_splits),
        empty=np.bincount(data.image_splits[per_image == 0], minlength=num_splits),
        boxes=class_boxes.sum(axis=1),
        class_images=class_images,
        class_boxes=class_boxes,
        per_image=per_image,
    )


def largest_overlaps(data: Data) -> Tuple[np.ndarray, np.ndarray]:
    """The largest IoU of every box with another box of its image.

    Returns:
        Float (N,) twice: with any other box, and with another box of the same class; 0 if there is
        none.
    """
    of_any, of_class = np.zeros((2, len(data.boxes)))
    starts = np.searchsorted(data.box_images, np.arange(len(data.files) + 1))
    bar = tqdm(starts[1:], desc="comparing boxes", unit="image", disable=None)
    for first, end in zip(starts, bar):
        for start in range(first, end if end - first > 1 else first, _ROWS):
            rows = np.arange(start, min(start + _ROWS, end))
            ious = _ious(data.boxes[rows], data.boxes[first:end])
            ious[np.arange(len(rows)), rows - first] = 0
            of_any[rows] = ious.max(axis=1)
            same = data.box_classes[rows, None] == data.box_classes[None, first:end]
            of_class[rows] = (ious * same).max(axis=1)
    return of_any, of_class


def _ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes (A, 4) and (B, 4), x0, y0, x1, y1: (A, B)."""
    low, high = (
        np.maximum(a[:, None, :2], b[None, :, :2]),
        np.minimum(a[:, None, 2:], b[None, :, 2:]),
    )
    intersection = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - intersection
    return intersection / np.maximum(union, np.finfo(float).tiny)  # rotated ones may have no area


def spread_in_images(sizes: np.ndarray, box_images: np.ndarray) -> np.ndarray:
    """The largest size divided by the smallest, of each image with at least two boxes.

    Args:
        sizes: (N,), sizes of the boxes, above 0.
        box_images: int (N,), index of the image of each box, ascending.
    """
    _, starts, numbers = np.unique(box_images, return_index=True, return_counts=True)
    if not len(starts):
        return np.zeros(0)
    ratios = np.maximum.reduceat(sizes, starts) / np.minimum.reduceat(sizes, starts)
    return ratios[numbers > 1]
