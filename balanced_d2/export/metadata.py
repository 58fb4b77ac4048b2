"""What an exported file says of itself, so that a program without the config can use it."""

import logging
from typing import List

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from balanced_d2.errors import UserError

# The name of the JSON inside a TorchScript file, and the key of the JSON in an ONNX file.
METADATA_FILE = "balanced_d2.json"

INPUT_FORMATS = ("BGR", "RGB")


def describe(cfg: CfgNode) -> dict:
    """The preprocessing and the class names of a config's model.

    Returns:
        A dict for JSON: ``class_names``; ``input_format``, ``"BGR"`` or ``"RGB"``; ``min_size`` and
        ``max_size``, the lengths in pixels to which the shorter side of an image is scaled (0: not
        at all) and which the longer side may have; ``score_threshold``, below which there are no
        detections; ``versions`` of what exported it.

    Raises:
        UserError: if an exported model cannot have this ``INPUT.FORMAT``, or the number of classes
            is not the data set's.
    """
    if cfg.INPUT.FORMAT not in INPUT_FORMATS:
        raise UserError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; a model can be exported with "
            f"{' or '.join(INPUT_FORMATS)}"
        )
    return {
        "class_names": _class_names(cfg),
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "versions": {"torch": torch.__version__, "detectron2": detectron2.__version__},
    }


def _class_names(cfg: CfgNode) -> List[str]:
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = _names_of(dataset)
        if names is None:
            continue
        if len(names) != num_classes:
            raise UserError(
                f"data set {dataset!r} has {len(names)} classes, but MODEL.ROI_HEADS.NUM_CLASSES "
                f"is {num_classes}; name the data set that the model was trained on "
                "(DATASETS.TEST)"
            )
        return list(names)
    logging.getLogger(__name__).warning(
        "the class names are not known, since no data set of DATASETS.TEST and DATASETS.TRAIN is "
        "at hand: numbers are stored in their place (--register makes a data set known)"
    )
    return [str(number) for number in range(num_classes)]


def _names_of(dataset: str):
    if dataset not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("thing_classes") is None:  # known once the data set has been loaded
        try:
            DatasetCatalog.get(dataset)
        except (OSError, UserError):
            return None
    return metadata.get("thing_classes")
