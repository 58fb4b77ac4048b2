"""The classes of a model, and their names."""

import logging
from typing import List, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from balanced_d2.utils.errors import UserError


def check_classes(name: str, cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a dataset and the model have different numbers of classes."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    key, num_classes = num_classes_key(cfg)
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise UserError(
            f"data set {name!r} has {len(classes)} classes ({', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}), but {key} is {num_classes}; set it to "
            f"{len(classes)}, or use the model's own dataset (DATASETS)"
        )


def num_classes_key(cfg: CfgNode) -> tuple[str, Optional[int]]:
    """The config key for the model's number of classes, and its value; None if not known."""
    meta_architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if issubclass(meta_architecture, GeneralizedRCNN):
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if issubclass(meta_architecture, RetinaNet):
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    return "", None


def training_classes(cfg: CfgNode) -> Optional[List[str]]:
    """The names of the classes that a model is trained on, once its data are loaded.

    None if they are not known, or are of another number than the model's, as where a mapper
    changes them.
    """
    names = None
    if cfg.DATASETS.TRAIN:  # of which all have the same classes
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    _, num_classes = num_classes_key(cfg)
    if names is None or num_classes not in (None, len(names)):
        return None
    return [str(name) for name in names]


def model_metadata(cfg: CfgNode) -> Metadata:
    """The metadata of the first dataset of a config that is available, with ``thing_classes``.

    If none is, the classes are named by numbers, with a warning.

    Raises:
        UserError: if that dataset and the model have different numbers of classes.
    """
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if _has_class_names(dataset):
            check_classes(dataset, cfg)
            return MetadataCatalog.get(dataset)
    logging.getLogger(__name__).warning(
        "the class names are not known, because no dataset in DATASETS.TEST or DATASETS.TRAIN is "
        "available: using numbers instead (--register registers a dataset)"
    )
    _, num_classes = num_classes_key(cfg)
    return Metadata(thing_classes=[str(number) for number in range(num_classes or 0)])


def _has_class_names(dataset: str) -> bool:
    if dataset not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("thing_classes") is None:  # set when the dataset is loaded
        try:
            DatasetCatalog.get(dataset)
        except (OSError, UserError):
            return False
    return metadata.get("thing_classes") is not None
