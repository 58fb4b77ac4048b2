"""One picture of many images: ground truth and detections side by side."""

from typing import Dict, List, Sequence

import cv2
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from tqdm import tqdm

from balanced_d2.data.checks.for_model import check_files, load
from balanced_d2.evaluation.predictions import check_predictions
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization.pair import GAP, choose_evenly, draw_pair, pad

HEADER = 34


def draw_contact_sheet(
    dataset_name: str,
    predictions: Sequence[Dict],
    num_images: int = 12,
    threshold: float = 0.5,
    columns: int = 3,
    tile_width: int = 320,
) -> np.ndarray:
    """Draw images of a dataset, each with ground truth on the left and detections on the right.

    Args:
        dataset_name: a registered dataset in COCO format.
        predictions: detections in COCO's result format, as Detectron2's evaluator writes them.
        num_images: number of images, spread evenly over the dataset.
        threshold: minimum score of the detections that are drawn.
        columns: number of images side by side.
        tile_width: width in pixels to which every image is scaled.

    Returns:
        uint8 image (H, W, 3), BGR.

    Raises:
        UserError: see :func:`balanced_d2.evaluation.predictions.check_predictions`; and if the
            dataset cannot be loaded, or is in another format.
    """
    check_files(dataset_name)
    records = load(dataset_name)
    by_image = _group_by_image(dataset_name, records, predictions)
    chosen = choose_evenly(records, num_images)
    metadata = MetadataCatalog.get(dataset_name)
    pairs = []
    for record in tqdm(chosen, desc="drawing contact sheet", unit="image", disable=None):
        shown = [p for p in by_image[record["image_id"]] if p["score"] >= threshold]
        pairs.append(draw_pair(record, _as_instances(shown, record), metadata, tile_width))
    height = max(pair.shape[0] for pair in pairs)
    pairs = [pad(pair, height + GAP, pair.shape[1] + GAP) for pair in pairs]
    pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % columns)
    rows = [np.hstack(pairs[i : i + columns]) for i in range(0, len(pairs), columns)]
    header = np.full((HEADER, rows[0].shape[1], 3), 255, np.uint8)
    text = f"{dataset_name}: ground truth | detections with score >= {threshold:g}"
    cv2.putText(header, text, (4, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([header, *rows])[:, :, ::-1]


def _group_by_image(
    dataset_name: str, records: List[Dict], predictions: Sequence[Dict]
) -> Dict[int, List[Dict]]:
    class_of = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
    if class_of is None:
        raise UserError(
            f"data set {dataset_name!r} is not in COCO's format: its categories have no ids, which "
            "detections could refer to"
        )
    by_image: Dict[int, List[Dict]] = {record["image_id"]: [] for record in records}
    check_predictions(predictions, by_image, class_of, f"data set {dataset_name!r}")
    for prediction in predictions:
        class_number = class_of[prediction["category_id"]]
        by_image[prediction["image_id"]].append({**prediction, "category_id": class_number})
    return by_image


def _as_instances(predictions: List[Dict], record: Dict) -> Instances:
    detections = Instances((record["height"], record["width"]))
    boxes = [BoxMode.convert(p["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for p in predictions]
    detections.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    detections.scores = torch.tensor([p["score"] for p in predictions])
    detections.pred_classes = torch.tensor(
        [p["category_id"] for p in predictions], dtype=torch.long
    )
    return detections
