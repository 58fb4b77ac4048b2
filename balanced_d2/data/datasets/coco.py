"""COCO-format datasets, with errors that tell the user what is wrong."""

import gc
import json
import logging
import os
from contextlib import contextmanager
from typing import Any, Callable, ContextManager, Dict, List

import orjson
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from balanced_d2.data.checks.records import clean
from balanced_d2.utils.errors import UserError, raise_user_errors


def register_coco(
    name: str,
    json_file: str,
    image_root: str,
    prepare: Callable[[], None] = lambda: None,
    **metadata,
) -> None:
    """Register a COCO-format dataset, evaluated with COCO's metrics.

    Nothing is read before the dataset is used.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotations.
        image_root: the folder that the ``file_name`` of every image is relative to.
        prepare: called before the dataset is loaded, for one that is generated on first use.
        **metadata: more metadata of the dataset.

    Raises:
        UserError: if the name is already taken.
    """
    if name in DatasetCatalog:
        raise UserError(f"a dataset named {name!r} is already registered; choose another name")

    def load() -> List[Dict]:
        prepare()
        return load_coco(name, json_file, image_root)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def load_coco(name: str, json_file: str, image_root: str) -> List[Dict]:
    """Load a COCO-format dataset with Detectron2's loader.

    Its boxes are cleaned (:func:`balanced_d2.data.checks.records.clean`). The names of keypoints
    become metadata; those with "left" and "right" in their names are swapped when an image is
    flipped.

    Returns:
        Detectron2's standard dataset dicts; each annotation keeps its ``id`` from the file.

    Raises:
        UserError: if the file or the folder is missing, the file is not in COCO's format, or a box
            is not valid.
    """
    if not os.path.isfile(json_file):
        raise UserError(f"data set {name!r}: annotation file {json_file} does not exist")
    if not os.path.isdir(image_root):
        raise UserError(f"data set {name!r}: image folder {image_root} does not exist")
    with annotation_errors_in(name, json_file), gc_paused(), _no_mapping_warning():
        records = load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
        if any("keypoints" in annotation for r in records for annotation in r["annotations"]):
            _set_keypoints(name, json_file)
    return clean(name, records, json_file)


@contextmanager
def _no_mapping_warning():
    """Context manager in which Detectron2 does not warn that it renumbers the categories: it always
    does, and there is nothing to fix."""
    logger = logging.getLogger(load_coco_json.__module__)

    def is_other(record: logging.LogRecord) -> bool:
        return "apply a mapping" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _set_keypoints(name: str, json_file: str) -> None:
    """Add the names of the keypoints to the metadata, and which ones are swapped by a flip.

    Detectron2 needs them to train on keypoints, but does not read them.
    """
    with open(json_file, "rb") as file:
        categories = parse_json(file.read())["categories"]
    names = next((c["keypoints"] for c in categories if "keypoints" in c), None)
    metadata = MetadataCatalog.get(name)
    if names is None or metadata.get("keypoint_names") is not None:
        return
    flipped = [(a, a.replace("left", "right")) for a in names if "left" in a]
    metadata.set(
        keypoint_names=list(names), keypoint_flip_map=[(a, b) for a, b in flipped if b in names]
    )


def annotation_errors_in(name: str, source: str) -> ContextManager[None]:
    """Context manager that turns errors of Detectron2's loaders into :class:`UserError`."""
    return raise_user_errors(
        f"data set {name!r}: {source} is not a valid annotation file",
        *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
        explain=lambda error: (
            f"no {error}" if isinstance(error, KeyError) else str(error) or "empty"
        ),
    )


def parse_json(text: bytes) -> Any:
    """Parse JSON quickly, with the NaN, infinity and errors of Python's own parser."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Raised for NaN too, which only Python's parser accepts; later checks report where it is.
        return json.loads(text)


@contextmanager
def gc_paused():
    """Context manager without garbage collection, for reading large files: the collector would scan
    everything again and again in vain, and take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
