"""What an exported file says of itself, so that a program without the config can use it."""

from typing import Optional, Sequence

import detectron2
import torch
from detectron2.config import CfgNode

import balanced_d2
from balanced_d2.data.classes import model_metadata, num_classes_key
from balanced_d2.export.deployable import BATCH_FORMATS, cannot_be_exported, output_names
from balanced_d2.utils.errors import UserError

# The name of the JSON inside a file of PyTorch, and the key of the JSON in an ONNX file.
METADATA_FILE = "balanced_d2.json"

# Of what the JSON means. Files of version 1 have no number: TorchScript and ONNX of one image.
FORMAT_VERSION = 2

INPUT_FORMATS = ("BGR", "RGB")


def describe(
    cfg: CfgNode, class_names: Optional[Sequence[str]] = None, format: str = "torchscript"
) -> dict:
    """The preprocessing, the class names and the outputs of a config's model.

    Args:
        class_names: in the order of the model, if the weights say them; otherwise of the data.
        format: ``"torchscript"``, ``"onnx"``, ``"pt2"``, ``"aoti"`` or ``"onnx-batch"``.

    Returns:
        A dict for JSON: ``format``; ``format_version``, the version of this description;
        ``outputs``, their names in order; ``class_names``; ``input_format``,
        ``"BGR"`` or ``"RGB"``; ``min_size`` and ``max_size``, the lengths in pixels to which the
        shorter side of an image is scaled (0: not at all) and which the longer side may have;
        ``gray_range``, the white of gray images of more than 8 bits (0: not known);
        ``score_threshold``, below which there are no detections; ``versions`` of what exported it.

    Raises:
        UserError: if an exported model cannot have this ``INPUT.FORMAT`` or
            ``MODEL.META_ARCHITECTURE``, or the classes are not the data set's.
    """
    key, num_classes = num_classes_key(cfg)
    if num_classes is None:
        raise cannot_be_exported(cfg.MODEL.META_ARCHITECTURE)
    has_roi_heads = key.startswith("MODEL.ROI_HEADS.")
    part = cfg.MODEL.ROI_HEADS if has_roi_heads else cfg.MODEL.RETINANET
    if cfg.INPUT.FORMAT not in INPUT_FORMATS:
        raise UserError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; a model can be exported with "
            f"{' or '.join(INPUT_FORMATS)}"
        )
    return {
        "format": format,
        "format_version": FORMAT_VERSION,
        "outputs": output_names(
            masks=has_roi_heads and cfg.MODEL.MASK_ON,
            keypoints=has_roi_heads and cfg.MODEL.KEYPOINT_ON,
            is_batch=format in BATCH_FORMATS,
        ),
        "class_names": list(model_metadata(cfg, class_names).thing_classes),
        "input_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "gray_range": cfg.INPUT.GRAY_RANGE,
        "score_threshold": part.SCORE_THRESH_TEST,
        "versions": {
            "balanced_d2": balanced_d2.__version__,
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
        },
    }
