#!/usr/bin/env python3
"""Train a small detector from random weights, with each balance, on BCCD and on generated shapes.

Run from the project's root: python -m studies.bccd_ablation.train. Every run writes one JSON line;
one that has its line is not repeated, and one that was interrupted continues.
"""

import sys

from balanced_d2.data.datasets.shapes import CLASSES, ShapesConfig
from studies.study import Data, Options, Study, command

SAMPLING = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced"]
FEATURES = ["MODEL.BALANCED_FPN.ENABLED", "True"]
LOSS = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_l1"]
INSTANCES = ["MODEL.ROI_HEADS.POSITIVE_SAMPLER", "instance_balanced"]
ALL = [*SAMPLING, *FEATURES, *LOSS]
ROWS: dict[str, Options] = {
    "plain": [],
    "sampling": SAMPLING,
    "feature balance": FEATURES,
    "Balanced L1": LOSS,
    "sampling and Balanced L1": [*SAMPLING, *LOSS],
    "all": ALL,
    "all, instance-balanced positives": [*ALL, *INSTANCES],
}
VARIANTS: dict[str, Options] = {
    "plain, smooth L1": ["MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0"],
    "sampling and Balanced L1, 10 bins": [*SAMPLING, *LOSS, "MODEL.ROI_HEADS.NUM_BINS", "10"],
    "sampling and Balanced L1, box loss twice": [
        *(*SAMPLING, *LOSS, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "2.0")
    ],
    "all, averaged only": [*ALL, "MODEL.BALANCED_FPN.REFINE_TYPE", "none"],
    "all, refined at P3": [*ALL, "MODEL.BALANCED_FPN.REFINE_LEVEL", "1"],
}
CONFIG = "BCCD/faster_rcnn_R_18_FPN.yaml"


def _shapes(smallest: float, largest: float) -> Data:
    options = ["SOLVER.MAX_ITER", "280", "INPUT.MIN_SIZE_TRAIN", "(128,)"]
    options += ["INPUT.MIN_SIZE_TEST", "128"]
    config = ShapesConfig(shape_size=(smallest, largest))
    return Data(CONFIG, len(CLASSES), options, lambda seed: config)


DATA = {
    "bccd": Data(CONFIG, 3),
    # By the approximate ratio of the largest to the smallest shape.
    "shapes_1": _shapes(28.0, 36.0),
    "shapes_3": _shapes(18.3, 55.0),
    "shapes_7": _shapes(12.0, 84.0),
}

if __name__ == "__main__":
    sys.exit(command(Study(ROWS, VARIANTS, DATA), str(__doc__), "output/study"))
