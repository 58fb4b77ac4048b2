"""Detections in the forms of other programs."""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from balanced_d2.utils.errors import check_package


def as_coco(
    detections: Instances, image_id: int | str, category_ids: Optional[Sequence[int]] = None
) -> List[Dict[str, Any]]:
    """Detections as COCO's results have them.

    Args:
        detections: in one image, on the CPU.
        image_id: of the image.
        category_ids: the id of each class; by default 1, 2, ... in the order of the classes.

    Returns:
        A dict for each: ``image_id``, ``category_id``, ``bbox`` (x, y, width and height in pixels),
        ``score`` and, if predicted, ``segmentation`` (RLE) and ``keypoints``.
    """
    results = instances_to_coco_json(detections, image_id)
    for result in results:
        number = result["category_id"]
        result["category_id"] = number + 1 if category_ids is None else category_ids[number]
    return results


def as_supervision(detections: Instances, class_names: Sequence[str]) -> Any:
    """Detections as ``supervision.Detections``, whose ``data["class_name"]`` has the names.

    Args:
        detections: in one image, on the CPU. Keypoints are left out: it has none.
        class_names: by number of the class.

    Raises:
        UserError: if the package is not installed.
    """
    check_package("supervision", "as_supervision")
    import supervision

    classes = detections.pred_classes.numpy()
    return supervision.Detections(
        xyxy=detections.pred_boxes.tensor.numpy(),
        mask=detections.pred_masks.numpy() if detections.has("pred_masks") else None,
        confidence=detections.scores.numpy(),
        class_id=classes,
        data={"class_name": np.array([class_names[number] for number in classes], dtype=str)},
    )
