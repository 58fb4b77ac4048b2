"""AP of the objects of each pyramid level."""

import contextlib
import io
import json
from pathlib import Path
from typing import Dict

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from balanced_d2.analysis.levels import levels_of


def ap_by_level(cfg: CfgNode, json_file: str, detections: str) -> Dict[str, float]:
    """COCO's AP, in percent, over the objects that belong to each level by their size.

    As COCO's AP of small, medium and large objects, but the bounds are those between the levels of
    the RoI heads (Feature Pyramid Networks, equation 1), and sizes are those in the resized image
    that the model sees in evaluation.

    Args:
        cfg: of the model that has made the detections.
        json_file: the ground truth in COCO's format.
        detections: the results in COCO's format.

    Returns:
        "AP-level p2" and so on; NaN for a level without objects.
    """
    levels = levels_of(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        content = json.loads(Path(detections).read_text())
        found = truth.loadRes(content) if content else COCO()
        for image in truth.imgs.values():
            size = image["height"], image["width"]
            resized = ResizeShortestEdge.get_output_shape(
                *size, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
            )
            scale = np.prod(resized) / np.prod(size)
            for annotations in (truth, found):
                for annotation in annotations.imgToAnns[image["id"]]:
                    width, height = annotation["bbox"][2:]
                    annotation["area"] = width * height * scale
        evaluation = COCOeval(truth, found, "bbox")
        starts = levels.starts**2
        # COCO's ranges include both ends, but what a level begins with is not of the one before.
        ends = [*np.nextafter(starts[1:], 0), np.inf]
        evaluation.params.areaRng = [[0, np.inf], *map(list, zip(starts, ends))]
        evaluation.params.areaRngLbl = ["all", *levels.names]
        evaluation.evaluate()
        evaluation.accumulate()
    # Thresholds of the IoU, of the recall, classes, levels, and numbers of detections.
    precision = evaluation.eval["precision"][..., -1]
    aps = {}
    for i, name in enumerate(levels.names, 1):
        known = precision[..., i][precision[..., i] > -1]
        aps[f"AP-level {name}"] = 100 * float(known.mean()) if known.size else float("nan")
    return aps
