"""Detections of one image as records for JSON."""

from typing import Dict, List, Sequence

from detectron2.structures import Instances
from detectron2.utils.visualizer import GenericMask


def as_records(detections: Instances, class_names: Sequence[str]) -> List[Dict]:
    """Detections in the form in which ``tools/run_exported.py`` prints them.

    Args:
        detections: in pixels of the image, on the CPU, with ``pred_masks`` of shape (N, H, W) and
            ``pred_keypoints`` of shape (N, K, 3) if the model predicts them.
        class_names: names of the classes, by class index.

    Returns:
        One dict for each detection: ``bbox`` (x1, y1, x2, y2), ``class``, ``class_id``, ``score``
        and, if predicted, ``segmentation`` (polygons, each x1, y1, x2, y2, ...) and ``keypoints``
        (each x, y, score).
    """
    height, width = detections.image_size
    records = []
    for i in range(len(detections)):
        label = int(detections.pred_classes[i])
        record = {
            "bbox": detections.pred_boxes.tensor[i].tolist(),
            "class": class_names[label],
            "class_id": label,
            "score": float(detections.scores[i]),
        }
        if detections.has("pred_masks"):
            mask = GenericMask(detections.pred_masks[i].numpy(), height, width)
            record["segmentation"] = [polygon.tolist() for polygon in mask.polygons]
        if detections.has("pred_keypoints"):
            record["keypoints"] = detections.pred_keypoints[i].tolist()
        records.append(record)
    return records
