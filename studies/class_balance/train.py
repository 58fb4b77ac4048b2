#!/usr/bin/env python3
"""Train every way of balancing classes, on generated data with a tail and on Aquarium.

Run from the project's root: python -m studies.class_balance.train. Every run writes one JSON line;
one that has its line is not repeated, and one that was interrupted continues. The README.md
beside this file says how the lines are analysed.
"""

import json
import sys
from pathlib import Path
from typing import Dict, List

from balanced_d2.data.class_balance import repeat_threshold
from balanced_d2.data.datasets.shapes import TAIL, TAIL_CLASSES
from balanced_d2.utils.errors import UserError
from studies.study import Data, Options, Study, command

LOSS = "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE"
BETA = "MODEL.ROI_BOX_HEAD.CLASS_WEIGHT_BETA"


def repeat_factors(json_file: str) -> List[str]:
    """With the threshold that ``tools/inspect_dataset.py`` suggests for the training data."""
    try:
        content = json.loads(Path(json_file).read_text())
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror}") from error
    images: Dict[int, set] = {}
    for annotation in content["annotations"]:
        images.setdefault(annotation["category_id"], set()).add(annotation["image_id"])
    number = len(set().union(*images.values()))
    threshold = repeat_threshold([len(of_class) for of_class in images.values()], number)
    options = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    return [*options, "DATALOADER.REPEAT_THRESHOLD", f"{threshold:g}"]


ROWS: Dict[str, Options] = {
    "plain": [],
    "repeat factors": repeat_factors,
    "uniform classes": ["DATALOADER.SAMPLER_TRAIN", "UniformClassTrainingSampler"],
    "inverse frequency": [LOSS, "weighted_cross_entropy", BETA, "1.0"],
    "effective number": [LOSS, "weighted_cross_entropy", BETA, "0.999"],
    "focal": [LOSS, "focal"],
    "balanced softmax": [LOSS, "balanced_softmax"],
    "seesaw": [LOSS, "seesaw"],
    "seesaw, no objectness": [LOSS, "seesaw", "MODEL.ROI_BOX_HEAD.SEESAW_OBJECTNESS", "False"],
    "repeat factors and seesaw": lambda json_file: [*repeat_factors(json_file), LOSS, "seesaw"],
    "OHEM": ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem"],
}
# How strong weights may be: objects beyond the 100th, or the 10th, of a class count little.
VARIANTS: Dict[str, Options] = {
    "effective number, beta 0.99": [LOSS, "weighted_cross_entropy", BETA, "0.99"],
    "effective number, beta 0.9": [LOSS, "weighted_cross_entropy", BETA, "0.9"],
}
DATA = {
    # Generated, anew for each seed, with another order of the classes by frequency.
    "tail": Data(
        "Demo/balanced_faster_rcnn_R_18_FPN.yaml",
        len(TAIL_CLASSES),
        ["SOLVER.MAX_ITER", "560"],
        lambda seed: TAIL._replace(seed=seed),
    ),
    # As it was recommended for photographs then, with feature balance. The rarest class has 78
    # objects, the most frequent 1,960.
    "aquarium": Data(
        "Aquarium/balanced_faster_rcnn_lite0_FPN_1x.yaml",
        7,
        ["MODEL.BALANCED_FPN.ENABLED", "True", "MODEL.BALANCED_FPN.ZERO_INIT", "True"],
    ),
}

if __name__ == "__main__":
    sys.exit(command(Study(ROWS, VARIANTS, DATA), str(__doc__), "output/class_balance"))
