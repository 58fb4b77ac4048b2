"""Detections in COCO's result format: read from a file, and whether a data set can be theirs."""

import argparse
from math import isfinite
from numbers import Real
from typing import Container, Dict, List, Sequence

import numpy as np

from balanced_d2.data.checks.records import as_boxes
from balanced_d2.data.datasets.coco import garbage_kept, parse_json
from balanced_d2.utils.errors import UserError

FIELDS = ("image_id", "category_id", "bbox", "score")


def add_predictions_argument(parser: argparse.ArgumentParser) -> None:
    """The path for :func:`load_predictions`."""
    parser.add_argument(
        "predictions",
        metavar="PREDICTIONS.json",
        help="detections in COCO's result format, as train_net.py writes them to "
        "OUTPUT_DIR/inference/coco_instances_results.json",
    )


def load_predictions(path: str) -> List:
    """Read a file such as Detectron2's ``coco_instances_results.json``.

    Returns:
        What should be detections; :func:`check_predictions` tells.

    Raises:
        UserError: if the file cannot be read or holds no list.
    """
    try:
        with open(path, "rb") as file, garbage_kept():
            predictions = parse_json(file.read())
    except OSError as error:
        raise UserError(f"cannot read predictions {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"predictions {path} are not valid JSON: {error}") from error
    if not isinstance(predictions, list):
        raise UserError(f"predictions {path} are not COCO's result format, a list of detections")
    return predictions


def check_predictions(
    predictions: Sequence, image_ids: Container, category_ids: Container, source: str
) -> None:
    """Raise :class:`UserError` on the first thing that is no detection on a data set.

    Args:
        predictions: dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in
            pixels) and ``score``, all numbers finite; other entries are not looked at.
        image_ids, category_ids: those of the data set.
        source: what the message calls the data set.
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
                f"a detection names image {image_id} and category {category_id}, which {source} "
                "has not; are these its predictions?"
            )
    boxes, _ = as_boxes([prediction["bbox"] for prediction in predictions])
    # Of what is not four finite numbers, the comparison is false.
    wrong = np.flatnonzero(~np.all(boxes[:, 2:] >= 0, axis=1))
    _refuse(predictions, wrong.tolist(), "bbox", "x, y, width, height in pixels")
    scores = [prediction["score"] for prediction in predictions]
    unfit = [i for i, s in enumerate(scores) if not (isinstance(s, Real) and isfinite(s))]
    _refuse(predictions, unfit, "score", "a finite number")


def _refuse(predictions: Sequence[Dict], wrong: Sequence[int], field: str, expected: str) -> None:
    if wrong:
        prediction = predictions[wrong[0]]
        raise UserError(
            f"detection number {wrong[0] + 1} (image {prediction['image_id']}) has the {field} "
            f"{prediction[field]!r}, but it has to be {expected}"
        )
