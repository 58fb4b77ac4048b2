"""Checks of a config's data sets before anything is built."""

import os
from typing import Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from balanced_d2.data.coco import told_as_annotation_error
from balanced_d2.errors import UserError
from balanced_d2.evaluation.build import check_evaluator


def check_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Check that all data sets of a config can be loaded and match the model.

    Every data set is loaded once, so that a broken test set is found before the training and not
    after it.

    Args:
        train: whether ``DATASETS.TRAIN`` is going to be used.

    Raises:
        UserError: naming the data set and what is wrong with it.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: there is nothing to train on")
    if not train and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: there is nothing to evaluate on")
    for name in cfg.DATASETS.TEST:
        check_registered(name)
        check_evaluator(name)
    for name in (cfg.DATASETS.TRAIN if train else ()) + cfg.DATASETS.TEST:
        check_registered(name)
        _check_files(name)
        source = MetadataCatalog.get(name).get("json_file", "its source")
        with told_as_annotation_error(name, source):
            records = DatasetCatalog.get(name)
        if not records:
            raise UserError(f"data set {name!r} has no images")
        _check_classes(name, cfg)


def check_registered(name: str) -> None:
    """Raise :class:`UserError` if there is no data set of that name."""
    if name not in DatasetCatalog:
        raise UserError(
            f"data set {name!r} is not registered; a COCO-format data set can be registered with "
            f"--register {name} ANNOTATIONS.json IMAGE_DIR"
        )


def _check_files(name: str) -> None:
    """For Detectron2's built-in data sets, whose loaders do not say what is missing."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("generated"):
        return
    for key in ("json_file", "image_root", "dirname"):
        path = metadata.get(key)
        if path and "://" not in path and not os.path.exists(path):
            raise UserError(
                f"data set {name!r}: {path} does not exist (built-in data sets are looked for in "
                "$DETECTRON2_DATASETS, by default ./datasets)"
            )


def _check_classes(name: str, cfg: CfgNode) -> None:
    classes = MetadataCatalog.get(name).get("thing_classes")
    key, num_classes = _num_classes(cfg)
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise UserError(
            f"data set {name!r} has {len(classes)} classes ({', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}), but {key} is {num_classes}; set it to "
            f"{len(classes)}"
        )


def _num_classes(cfg: CfgNode) -> tuple[str, Optional[int]]:
    """The key that says how many classes the model has, and its value, where that is known."""
    meta_architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if issubclass(meta_architecture, GeneralizedRCNN):
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if issubclass(meta_architecture, RetinaNet):
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    return "", None
