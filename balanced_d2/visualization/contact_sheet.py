"""One picture of many: ground truth and detections side by side."""

from typing import Dict, List, Sequence

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

from balanced_d2.evaluation.predictions import check_predictions

GAP = 8
HEADER = 34


def draw_contact_sheet(
    dataset_name: str,
    predictions: Sequence[Dict],
    num_images: int = 12,
    threshold: float = 0.5,
    columns: int = 3,
    tile_width: int = 320,
) -> np.ndarray:
    """Draw images of a data set, each with its ground truth on the left, detections on the right.

    Args:
        dataset_name: a registered data set in COCO format.
        predictions: detections in COCO's result format, as Detectron2's evaluator writes them.
        num_images: how many images, taken evenly from the data set.
        threshold: least score of a detection to be drawn.
        columns: number of images side by side.
        tile_width: width in pixels to which every image is scaled.

    Returns:
        uint8 image (H, W, 3), BGR.

    Raises:
        UserError: see :func:`balanced_d2.evaluation.predictions.check_predictions`.
    """
    records = DatasetCatalog.get(dataset_name)
    by_image = _group_by_image(dataset_name, records, predictions)
    chosen = np.linspace(0, len(records) - 1, min(num_images, len(records))).round().astype(int)
    pairs = [
        _draw_pair(
            dataset_name, records[i], by_image[records[i]["image_id"]], threshold, tile_width
        )
        for i in tqdm(chosen, desc="drawing contact sheet", unit="image", disable=None)
    ]
    height = max(pair.shape[0] for pair in pairs)
    pairs = [_pad(pair, height + GAP, pair.shape[1] + GAP) for pair in pairs]
    pairs += [np.full_like(pairs[0], 255)] * (-len(pairs) % columns)
    rows = [np.hstack(pairs[i : i + columns]) for i in range(0, len(pairs), columns)]
    header = np.full((HEADER, rows[0].shape[1], 3), 255, np.uint8)
    text = f"{dataset_name}: ground truth | detections with score >= {threshold:g}"
    cv2.putText(header, text, (4, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([header, *rows])


def _group_by_image(
    dataset_name: str, records: List[Dict], predictions: Sequence[Dict]
) -> Dict[int, List[Dict]]:
    class_of = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    by_image = {record["image_id"]: [] for record in records}
    check_predictions(predictions, by_image, class_of, f"data set {dataset_name!r}")
    for prediction in predictions:
        class_number = class_of[prediction["category_id"]]
        by_image[prediction["image_id"]].append({**prediction, "category_id": class_number})
    return by_image


def _draw_pair(
    dataset_name: str, record: Dict, predictions: List[Dict], threshold: float, tile_width: int
) -> np.ndarray:
    image = read_image(record["file_name"], format="RGB")
    metadata = MetadataCatalog.get(dataset_name)
    scale = tile_width / image.shape[1]
    truth = Visualizer(image, metadata, scale=scale).draw_dataset_dict(record)
    shown = [p for p in predictions if p["score"] >= threshold]
    detections = Instances(image.shape[:2])
    boxes = [BoxMode.convert(p["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for p in shown]
    detections.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    detections.scores = torch.tensor([p["score"] for p in shown])
    detections.pred_classes = torch.tensor([p["category_id"] for p in shown], dtype=torch.long)
    found = Visualizer(image, metadata, scale=scale).draw_instance_predictions(detections)
    sides = [side.get_image()[:, :, ::-1] for side in (truth, found)]
    return np.hstack([_pad(sides[0], sides[0].shape[0], sides[0].shape[1] + GAP // 2), sides[1]])


def _pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    bottom, right = height - image.shape[0], width - image.shape[1]
    return cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(255,) * 3)
