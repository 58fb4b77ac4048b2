"""Detections in COCO's result format: reading them, and checking that they fit a dataset."""

import argparse
from math import isfinite
from numbers import Real
from typing import Container, Dict, List, Sequence

import numpy as np

from balanced_d2.data.checks.records import as_boxes
from balanced_d2.data.datasets.coco_json import gc_paused, parse_json
from balanced_d2.utils.errors import UserError

FIELDS = ("image_id", "category_id", "bbox", "score")


def add_predictions_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the path that :func:`load_predictions` takes."""
    parser.add_argument(
        "predictions",
        metavar="PREDICTIONS.json",
        help="detections in COCO's result format, as a training writes them to "
        "OUTPUT_DIR/inference/coco_instances_results.json",
    )


def load_predictions(path: str) -> List:
    """Read a file such as Detectron2's ``coco_instances_results.json``.

    Returns:
        The items of the list; :func:`check_predictions` checks that they are detections.

    Raises:
        UserError: if the file cannot be read or is not a list.
    """
    try:
        with open(path, "rb") as file, gc_paused():
            predictions = parse_json(file.read())
    except OSError as error:
        raise UserError(f"cannot read predictions {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"predictions {path} are not valid JSON: {error}") from error
    if not isinstance(predictions, list):
        raise UserError(f"predictions {path} are not in COCO's result format, a list of detections")
    return predictions


def check_predictions(
    predictions: Sequence, image_ids: Container, category_ids: Container, source: str
) -> None:
    """Raise :class:`UserError` on the first item that is not a detection on a dataset.

    Args:
        predictions: dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in
            pixels) and ``score``, all numbers finite; other entries are ignored.
        image_ids, category_ids: the ids in the dataset.
        source: what the message calls the dataset.
    """
    for number, prediction in enumerate(predictions, 1):
        if not isinstance(prediction, dict) or not prediction.keys() >= set(FIELDS):
            raise UserError(
                f"detection number {number} is not in COCO's result format: it has to be an object "
                f"with {', '.join(FIELDS)}"
            )
        image_id, category_id = prediction["image_id"], prediction["category_id"]
        try:
            known = image_id in image_ids and category_id in category_ids
        except TypeError:  # a list or an object
            known = False
        if not known:
            raise UserError(
                f"a detection has image {image_id} and category {category_id}, which are not in "
                f"{source}; are these its predictions?"
            )
    boxes, _ = as_boxes([prediction["bbox"] for prediction in predictions])
    # False for NaN, which stands for anything but four finite numbers.
    wrong = np.flatnonzero(~np.all(boxes[:, 2:] >= 0, axis=1)).tolist()
    _refuse(predictions, wrong, "bbox", "x, y, width, height in pixels")
    scores = [prediction["score"] for prediction in predictions]
    wrong = [i for i, s in enumerate(scores) if not (isinstance(s, Real) and isfinite(s))]
    _refuse(predictions, wrong, "score", "a finite number")


def _refuse(predictions: Sequence[Dict], wrong: Sequence[int], field: str, expected: str) -> None:
    if wrong:
        prediction = predictions[wrong[0]]
        raise UserError(
            f"detection number {wrong[0] + 1} (image {prediction['image_id']}) has the {field} "
            f"{prediction[field]!r}, but it has to be {expected}"
        )
