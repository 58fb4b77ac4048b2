"""What the training data say of the frequency of classes, for a model's config."""

import logging
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from balanced_d2.checkpoint.finetune import match_names
from balanced_d2.data.classes import num_classes_key
from balanced_d2.layers.class_losses import (
    CROSS_ENTROPY,
    build_class_loss,
    check_counts,
    counts_missing,
)
from balanced_d2.utils.errors import UserError

logger = logging.getLogger(__name__)

BACKGROUND = "background"
"""Its name in ``MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS``."""


def usable_annotations(records: Sequence[Dict]) -> Iterator[Tuple[Dict, Dict]]:
    """All annotations that training uses, with their records: those that are not crowds."""
    for record in records:
        for annotation in record.get("annotations", ()):
            if not annotation.get("iscrowd", 0):
                yield record, annotation


def count_classes(names: str | Sequence[str]) -> List[int]:
    """The number of objects of each class in registered datasets, for ``class_counts`` in a
    LazyConfig: ``L(count_classes)(names="my_train")``.

    Args:
        names: of datasets with the same classes.
    """
    datasets = [names] if isinstance(names, str) else list(names)
    records = [record for name in datasets for record in DatasetCatalog.get(name)]
    found = [annotation["category_id"] for _, annotation in usable_annotations(records)]
    number = len(MetadataCatalog.get(datasets[0]).thing_classes)
    return np.bincount(np.array(found, dtype=int), minlength=number).tolist()


def repeat_threshold(class_images: Sequence[int], num_images: int) -> float:
    """``DATALOADER.REPEAT_THRESHOLD`` for data: the share of images that the average class is in,
    so that repeat factors lift the classes below it; to three digits.

    Args:
        class_images: the number of images of each class that occurs.
        num_images: of all images that training uses.
    """
    # Not three decimals: with thousands of classes, the share can be below 0.001.
    return float(f"{np.mean(class_images) / num_images:.3g}")


def take_class_balance(cfg: CfgNode, before: str, class_names: Optional[Sequence[str]]) -> None:
    """Set what weights say: ``MODEL.CLASS_COUNTS``, where it is not set, and the order of
    ``MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS``.

    Args:
        before: the config of their training; "" if it is not known.
        class_names: of their classes, if known.

    Raises:
        UserError: as :func:`order_weights`.
    """
    if before and not len(cfg.MODEL.CLASS_COUNTS):
        cfg.MODEL.CLASS_COUNTS = yaml.safe_load(before)["MODEL"].get("CLASS_COUNTS", [])
    order_weights(cfg, class_names)


def complete_class_balance(
    cfg: CfgNode,
    class_counts: Optional[Sequence[int]],
    class_names: Optional[Sequence[str]],
    train: bool,
) -> None:
    """Set ``MODEL.CLASS_COUNTS`` of a training, where it is not set, to what the data have, and the
    order of ``MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS``; check that the classification loss can be built.

    Args:
        class_counts: of the training data, if known.
        class_names: of the model's classes, if known.

    Raises:
        UserError: if the loss has a wrong parameter, or needs counts that nothing says.
    """
    if train and class_counts is not None:
        given = list(cfg.MODEL.CLASS_COUNTS)
        if given and given != list(class_counts):
            logger.warning(
                f"MODEL.CLASS_COUNTS is {_some(given)}, but the training data have "
                f"{_some(class_counts)}: the first is used; leave it out for the second"
            )
        cfg.MODEL.CLASS_COUNTS = given or list(class_counts)
    order_weights(cfg, class_names)
    key, number = num_classes_key(cfg)
    if key != "MODEL.ROI_HEADS.NUM_CLASSES" or number is None:
        return
    counts, node = cfg.MODEL.CLASS_COUNTS, cfg.MODEL.ROI_BOX_HEAD
    if len(counts):
        check_counts(counts, number)
    loss = build_class_loss(node, number, counts)
    by_hand = len(node.CLASS_WEIGHTS) > 0
    if train and getattr(loss, "needs_counts", False) and not len(counts) and not by_hand:
        raise counts_missing(node.CLS_LOSS_TYPE)
    if loss is not None and train:
        logger.info(f"classification loss: {node.CLS_LOSS_TYPE} instead of {CROSS_ENTROPY}")


def order_weights(cfg: CfgNode, class_names: Optional[Sequence[str]]) -> None:
    """Replace names in ``MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS`` by numbers in the order of the classes,
    if their names are known.

    Raises:
        UserError: if there is no such class, or an entry is no pair of name and number.
    """
    node = cfg.MODEL.ROI_BOX_HEAD
    pairs = node.CLASS_WEIGHTS
    if class_names is None or not any(isinstance(pair, (list, tuple)) for pair in pairs):
        return
    names = [*class_names, BACKGROUND]
    weights = [1.0] * len(names)
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(
                f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: {pair!r} is not a pair of class and weight"
            )
        name, weight = pair
        (index,) = match_names(names, [str(name)])
        if index is None:
            raise UserError(
                f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: there is no class {name!r}; the classes are "
                f"{', '.join(names)}"
            )
        weights[index] = _number(name, weight)
    node.CLASS_WEIGHTS = weights


def _some(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts[:5]))}{', …' if len(counts) > 5 else ''}"


def _number(name: object, weight: object) -> float:
    if not isinstance(weight, (int, float)):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: the weight of {name!r} is {weight!r}, not a number"
        )
    return float(weight)
