"""The classes of a model, and their names."""

import logging
import unicodedata
from typing import Dict, List, Mapping, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, RetinaNet

from balanced_d2.checkpoint.finetune import match_names
from balanced_d2.utils.errors import UserError

NO_NAMES = (
    "the weights do not say the names of their classes: they are those of the data, in their order"
)


def set_num_classes(cfg: CfgNode, number: Optional[int]) -> None:
    """Set the model's number of classes, if it is known and the model has one."""
    key, present = num_classes_key(cfg)
    if number is not None and present is not None:
        cfg.merge_from_list([key, number])


def check_num_classes(cfg: CfgNode, classes: Sequence[str], whose: str) -> None:
    """Raise :class:`UserError` if a model has another number of classes than its data.

    Args:
        whose: what the message begins with, such as "data set 'x' has".
    """
    key, number = num_classes_key(cfg)
    if number is not None and number != len(classes):
        raise UserError(
            f"{whose} {len(classes)} classes ({some(classes)}), but {key} is {number}; set it to "
            f"{len(classes)} or leave it out, or use the model's own dataset (DATASETS)"
        )


def some(classes: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")


def join_classes(datasets: Mapping[str, Sequence[str]]) -> List[str]:
    """The classes of several datasets by their names: those of the first in its order, new ones of
    the others behind.

    Raises:
        UserError: if a dataset has two classes that are one class of the others.
    """
    joined: List[str] = []
    for name, classes in datasets.items():
        numbers = numbers_in(joined, name, classes)
        joined += [new for new, number in zip(classes, numbers) if number is None]
    return joined


def numbers_in(model: Sequence[str], name: str, classes: Sequence[str]) -> List[Optional[int]]:
    """For each class of a dataset its number in the model, by name; None if that does not have it.

    Args:
        model: the names of the model's classes.
        name: the dataset, for the message.

    Raises:
        UserError: if two classes would be one of the model's.
    """
    numbers = match_names(model, classes)
    for number in {n for n in numbers if n is not None and numbers.count(n) > 1}:
        both = [repr(c) for c, n in zip(classes, numbers) if n == number]
        raise UserError(
            f"data set {name!r}: {' and '.join(both)} are both the model's class "
            f"{model[number]!r}; give each class a name of its own"
        )
    return numbers


def same_names(names: Sequence[str]) -> List[List[int]]:
    """Indices of the names that occur more than once, also in another normal form of Unicode."""
    places: Dict[str, List[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(unicodedata.normalize("NFC", name.strip()), []).append(index)
    return [where for where in places.values() if len(where) > 1]


def check_names(name: str, classes: Sequence[str]) -> None:
    """Raise :class:`UserError` if a dataset has classes of the same name."""
    twice = [repr(classes[where[0]]) for where in same_names(classes)]
    if twice:
        raise UserError(
            f"data set {name!r} has several classes named {', '.join(twice)}; give each a name of "
            "its own, or make them one"
        )


def check_known(name: str, classes: Sequence[str], model: Sequence[str]) -> List[int]:
    """The model's number of each class of a dataset that it is evaluated on.

    Raises:
        UserError: if the model does not have one of the classes.
    """
    numbers = numbers_in(model, name, classes)
    lacking = [c for c, number in zip(classes, numbers) if number is None]
    if lacking:
        raise UserError(
            f"data set {name!r}: the model does not have {len(lacking)} of its classes "
            f"({some(lacking)}); the model's are {some(model)}. Rename or remove them in the data, "
            "or use the model's own dataset (DATASETS)"
        )
    return [number for number in numbers if number is not None]


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


def model_metadata(cfg: CfgNode, classes: Optional[Sequence[str]] = None) -> Metadata:
    """The metadata of the first dataset of a config that is available, with ``thing_classes``.

    Args:
        classes: the names of the model's classes, if its weights say them. Otherwise they are those
            of the dataset, in its order; without one, they are named by numbers, with a warning.

    Raises:
        UserError: if the dataset has a class that the model does not have or, where the weights do
            not say the names, another number of them.
    """
    for dataset in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if not _has_class_names(dataset):
            continue
        metadata = MetadataCatalog.get(dataset)
        if classes is None:
            check_num_classes(cfg, metadata.thing_classes, f"data set {dataset!r} has")
            logging.getLogger(__name__).warning(NO_NAMES)
            return metadata
        check_known(dataset, metadata.thing_classes, classes)
        if list(classes) == list(metadata.thing_classes):
            return metadata
        colors = {"thing_colors"}  # of classes in another order
        kept = {key: value for key, value in metadata.as_dict().items() if key not in colors}
        return Metadata(**{**kept, "thing_classes": list(classes)})
    if classes is not None:
        return Metadata(thing_classes=list(classes))
    logging.getLogger(__name__).warning(
        "the class names are not known: the weights do not say them, and no dataset in "
        "DATASETS.TEST or DATASETS.TRAIN is available: using numbers instead (--register registers "
        "a dataset)"
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
