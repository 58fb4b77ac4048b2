"""COCO-format data sets whose mistakes are told to the user."""

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
    """Register a COCO-format data set, evaluated with COCO's metrics.

    Nothing is read before the data set is used.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotations.
        image_root: the folder that the ``file_name`` of every image starts from.
        prepare: called before the data set is loaded, for one that is made on first use.
        **metadata: more metadata of the data set.

    Raises:
        UserError: if the name is taken.
    """
    if name in DatasetCatalog:
        raise UserError(f"a data set named {name!r} is registered already; choose another name")

    def load() -> List[Dict]:
        prepare()
        return load_coco(name, json_file, image_root)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def load_coco(name: str, json_file: str, image_root: str) -> List[Dict]:
    """Load a COCO-format data set with Detectron2's loader.

    Its boxes are cleaned (:func:`balanced_d2.data.checks.records.clean`). The names of keypoints become
    metadata; those with "left" and "right" in their names are exchanged where an image is flipped.

    Returns:
        Detectron2's standard data set dicts; each annotation keeps its ``id`` of the file.

    Raises:
        UserError: if the file or the folder is missing, the file is not in COCO's format, or a box
            is no box.
    """
    if not os.path.isfile(json_file):
        raise UserError(f"data set {name!r}: annotation file {json_file} does not exist")
    if not os.path.isdir(image_root):
        raise UserError(f"data set {name!r}: image folder {image_root} does not exist")
    with annotation_errors_in(name, json_file), garbage_kept(), _mapping_untold():
        records = load_coco_json(json_file, image_root, name, extra_annotation_keys=["id"])
        if any("keypoints" in annotation for r in records for annotation in r["annotations"]):
            _set_keypoints(name, json_file)
    return clean(name, records, json_file)


@contextmanager
def _mapping_untold():
    """Within it, Detectron2 does not warn that it numbers the categories anew, which it always does
    and which is nothing to mend."""
    logger = logging.getLogger(load_coco_json.__module__)

    def is_other(record: logging.LogRecord) -> bool:
        return "apply a mapping" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _set_keypoints(name: str, json_file: str) -> None:
    """Take the names of the keypoints into the metadata, and which ones a flip exchanges.

    Detectron2 needs them to train on keypoints, and does not read them.
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
    """Within it, what Detectron2's loaders stumble over becomes :class:`UserError`."""
    return raise_user_errors(
        f"data set {name!r}: {source} is not a valid annotation file",
        *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
        explain=lambda error: f"no {error}" if isinstance(error, KeyError) else str(error) or "empty",
    )


def parse_json(text: bytes) -> Any:
    """Parse JSON quickly; like Python's own parser, with NaN and infinity, and its errors."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        # Also of NaN, which only Python takes for a number, and which is to be found in its place.
        return json.loads(text)


@contextmanager
def garbage_kept():
    """Read a large file within this: the collector would look through all of it again and again,
    for nothing, and take half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
