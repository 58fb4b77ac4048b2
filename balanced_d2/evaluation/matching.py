"""COCO's evaluation of boxes as arrays: AP, and the ground truth that each detection matches."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from balanced_d2.utils.errors import UserError

SIZES = ("all", "small", "medium", "large")
"""COCO's ranges of areas: medium boxes have 32² to 96² pixels, both included."""

IOU = 0.5
"""Minimum IoU at which a detection matches a ground-truth box, for everything except AP."""


class Matching(NamedTuple):
    """The detections and ground truth that count, and how they match.

    Left out are crowds, detections that COCO ignores because they are on a crowd of their class,
    and all but the 100 best detections for each image and class. Classes are numbered by ascending
    category id.
    """

    classes: List[str]
    """Names of the K classes."""
    ap: np.ndarray
    """Float (K, 4), COCO's AP (mean over IoU 0.50 to 0.95) in percent, by :data:`SIZES`; NaN where
    there is no ground truth."""
    num_boxes: np.ndarray
    """Int (K, 4), number of ground-truth boxes, by :data:`SIZES`."""

    truth_boxes: np.ndarray
    """Float (G, 4), x, y, width, height in pixels."""
    truth_images: np.ndarray
    """Int (G,), index of the image."""
    truth_classes: np.ndarray
    """Int (G,)."""

    boxes: np.ndarray
    """Float (D, 4), detections in the order in which AP processes them: best first."""
    images: np.ndarray
    """Int (D,)."""
    class_of: np.ndarray
    """Int (D,)."""
    scores: np.ndarray
    """Float (D,), descending."""
    matched: np.ndarray
    """Int (D,), the ground truth that a detection matches at an IoU of 0.5, -1 for none."""


def match(annotations: Dict, predictions: Sequence[Dict]) -> Matching:
    """Evaluate detections as COCO does (pycocotools, boxes, default parameters).

    Args:
        annotations: the content of an annotation file in COCO's format, in which all objects of
            every class are annotated (unlike LVIS).
        predictions: see :func:`balanced_d2.evaluation.predictions.check_predictions`; may be empty.

    Raises:
        UserError: if there is no ground truth.
    """
    categories = sorted(annotations["categories"], key=lambda category: category["id"])
    class_numbers = {category["id"]: number for number, category in enumerate(categories)}
    image_ids = sorted(image["id"] for image in annotations["images"])
    image_numbers = {image_id: number for number, image_id in enumerate(image_ids)}

    def common(number: int, item: Dict) -> Dict:
        return {
            "id": number,
            "image_id": image_numbers[item["image_id"]],
            "category_id": class_numbers[item["category_id"]],
            "bbox": list(item["bbox"]),
        }

    # Ids start at 1, because pycocotools takes 0 for "no match".
    truth = [
        {**common(number, item), "area": item["area"], "iscrowd": item.get("iscrowd", 0)}
        for number, item in enumerate(annotations["annotations"], 1)
    ]
    detections = [
        {**common(number, item), "area": item["bbox"][2] * item["bbox"][3], "score": item["score"]}
        for number, item in enumerate(predictions, 1)
    ]
    evaluated = _evaluate(truth, detections, len(image_ids), len(categories))

    num_boxes, counted = _count(truth, evaluated.params.areaRng, len(categories))
    if not counted.any():
        raise UserError("the annotations have no ground truth (crowds do not count)")
    truth = [item for item, counts in zip(truth, counted, strict=True) if counts]
    # From pycocotools' ids, 0 for none, to indices of the ground truth that counts.
    numbers = np.full(len(counted) + 1, -1)
    numbers[1:][counted] = np.arange(len(truth))

    ids, matched = _matches(evaluated)
    detections = [detections[i - 1] for i in ids]
    images, scores = _column(detections, "image_id", int), _column(detections, "score", float)
    order = np.lexsort((ids, images, -scores))
    precision = evaluated.eval["precision"][..., 0].mean(axis=(0, 1))
    return Matching(
        classes=[category["name"] for category in categories],
        ap=np.where(precision < 0, np.nan, 100 * precision),
        num_boxes=num_boxes,
        truth_boxes=_column(truth, "bbox", float).reshape(-1, 4),
        truth_images=_column(truth, "image_id", int),
        truth_classes=_column(truth, "category_id", int),
        boxes=_column(detections, "bbox", float).reshape(-1, 4)[order],
        images=images[order],
        class_of=_column(detections, "category_id", int)[order],
        scores=scores[order],
        matched=numbers[matched][order],
    )


def _column(items: Sequence[Dict], key: str, dtype: type) -> np.ndarray:
    return np.array([item[key] for item in items], dtype=dtype)


class _COCOeval(COCOeval):
    """Adds a progress bar to the step that takes the time."""

    def evaluate(self) -> None:
        p = self.params
        total = len(p.imgIds) * len(p.catIds) * len(p.areaRng)
        with tqdm(total=total, desc="evaluating", disable=None) as self.bar:
            super().evaluate()

    def evaluateImg(self, *args):
        self.bar.update()
        return super().evaluateImg(*args)


def _evaluate(
    truth: List[Dict], detections: List[Dict], num_images: int, num_classes: int
) -> COCOeval:
    with redirect_stdout(StringIO()):  # pycocotools prints its progress
        evaluated = _COCOeval(
            *(_as_coco(items, num_images, num_classes) for items in (truth, detections)), "bbox"
        )
        evaluated.params.maxDets = evaluated.params.maxDets[-1:]
        evaluated.evaluate()
        evaluated.accumulate()
    return evaluated


def _as_coco(items: List[Dict], num_images: int, num_classes: int) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(num_images)],
        "categories": [{"id": number} for number in range(num_classes)],
        "annotations": items,
    }
    coco.createIndex()
    return coco


def _count(truth: List[Dict], ranges: Sequence, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of boxes of each class and size, (K, 4), and which boxes count at all."""
    areas, classes = _column(truth, "area", float), _column(truth, "category_id", int)
    inside = [(areas >= low) & (areas <= high) for low, high in ranges]
    counted = np.array(inside) & ~_column(truth, "iscrowd", bool)
    numbers = [np.bincount(classes[of_size], minlength=num_classes) for of_size in counted]
    return np.stack(numbers, axis=1), counted[SIZES.index("all")]


def _matches(evaluated: COCOeval) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the detections that COCO does not ignore, and ids of their matches, 0 for none."""
    p = evaluated.params
    at, of_all = list(p.iouThrs).index(IOU), p.areaRngLbl.index("all")
    num_images, num_sizes = len(p.imgIds), len(p.areaRng)
    # Results are listed by class, by size and by image; None where there are no boxes.
    blocks = range(of_all * num_images, len(evaluated.evalImgs), num_sizes * num_images)
    ids: List[Sequence] = [[]]
    matched: List[Sequence] = [[]]
    ignored: List[Sequence] = [[]]
    for start in blocks:
        for result in filter(None, evaluated.evalImgs[start : start + num_images]):
            ids.append(result["dtIds"])
            matched.append(result["dtMatches"][at])
            ignored.append(result["dtIgnore"][at])
    counts = ~np.concatenate(ignored).astype(bool)
    return tuple(np.concatenate(part).astype(int)[counts] for part in (ids, matched))
