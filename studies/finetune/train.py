#!/usr/bin/env python3
"""Fine-tune a small detector from ImageNet weights, with each balance: on photographs of many sizes
(Aquarium), of blood cells (BCCD), and on generated shapes that span one, two and four levels.

Run from the project's root: python -m studies.finetune.train. Every run writes one JSON line; one
that has its line is not repeated, and one that was interrupted continues. README.md beside
it says how the lines are analysed.
"""

import sys
from typing import Dict

from balanced_d2.data.datasets.shapes import CLASSES, ShapesConfig
from studies.finetune import train_net  # noqa: F401, so that its sampler is known here, too
from studies.study import Data, Options, Study, command

SAMPLING = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced"]
FEATURES = ["MODEL.BALANCED_FPN.ENABLED", "True", "MODEL.BALANCED_FPN.ZERO_INIT", "True"]
AT_ONCE = ["MODEL.BALANCED_FPN.ENABLED", "True"]
LOSS = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_l1"]
INSTANCES = ["MODEL.ROI_HEADS.POSITIVE_SAMPLER", "instance_balanced"]
ALL = [*SAMPLING, *FEATURES, *LOSS]
LARGE = ["MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE", "224"]


def refined_by(name: str, options=FEATURES) -> list:
    return [*options, "MODEL.BALANCED_FPN.REFINE_TYPE", name]


ROWS: Dict[str, Options] = {
    "plain": [],
    "sampling": SAMPLING,
    "feature balance": FEATURES,
    "Balanced L1": LOSS,
    "sampling and feature balance": [*SAMPLING, *FEATURES],
    "sampling and Balanced L1": [*SAMPLING, *LOSS],
    "feature balance and Balanced L1": [*FEATURES, *LOSS],
    "all": ALL,
    "all, instance-balanced positives": [*ALL, *INSTANCES],
    # Feature balance, refined otherwise, and without the factor that starts at zero.
    "feature balance, averaged only": refined_by("none"),
    "feature balance, convolution": refined_by("conv"),
    "feature balance, pooled keys": refined_by("non_local_pooled"),
    "feature balance at once": AT_ONCE,
    "feature balance at once, averaged only": refined_by("none", AT_ONCE),
    "feature balance at once, convolution": refined_by("conv", AT_ONCE),
    "feature balance at once, pooled keys": refined_by("non_local_pooled", AT_ONCE),
    # As published: the paper's plain box loss, and sampling in bins over all of the IoU.
    "smooth L1": ["MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0"],
    "sampling, bins of MMDetection": ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced_up_to_1"],
    # Nearly all boxes from one level.
    "plain, canonical size 224": LARGE,
    "all, canonical size 224": [*ALL, *LARGE],
}
# Why all balances on a new pyramid can be worse than none (docs/finetune.md).
ALL_AT_ONCE = [*SAMPLING, *AT_ONCE, *LOSS]
VARIANTS: Dict[str, Options] = {
    "all at once": ALL_AT_ONCE,
    "all at once, averaged only": refined_by("none", ALL_AT_ONCE),
    "all at once, normalised pyramid": [*ALL_AT_ONCE, "MODEL.FPN.NORM", "GN"],
    "plain, normalised pyramid": ["MODEL.FPN.NORM", "GN"],
    # What docs/study.md advises for objects of very different sizes, on the recommended configs.
    "sampling and feature balance at once, averaged only": refined_by(
        "none", [*SAMPLING, *AT_ONCE]
    ),
}
CONFIG = "Aquarium/faster_rcnn_lite0_FPN_1x.yaml"


def _size(pixels: int, canonical: int, iterations: int) -> list:
    return [
        *("INPUT.MIN_SIZE_TRAIN", f"({pixels},)", "INPUT.MIN_SIZE_TEST", str(pixels)),
        *("MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE", str(canonical)),
        *("SOLVER.MAX_ITER", str(iterations)),
    ]


def _shapes(smallest: float, largest: float) -> Data:
    """With a canonical size of 40, the levels begin at 20, 40 and 80 pixels."""
    config = ShapesConfig(image_size=(208, 256), shape_size=(smallest, largest))
    return Data(CONFIG, len(CLASSES), _size(208, 40, 300), lambda seed: config)


BCCD = ["DATASETS.TRAIN", "('bccd_train',)", "DATASETS.TEST", "('bccd_val',)"]
DATA = {
    "aquarium": Data(CONFIG, 7),
    "bccd": Data(CONFIG, 3, [*BCCD, *_size(240, 67, 300)]),
    "one_level": _shapes(41.0, 79.0),
    "two_levels": _shapes(20.0, 80.0),
    "four_levels": _shapes(10.0, 160.0),
}

if __name__ == "__main__":
    study = Study(ROWS, VARIANTS, DATA, "studies/finetune/train_net.py")
    sys.exit(command(study, str(__doc__), "output/finetune_study"))
