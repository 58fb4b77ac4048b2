"""COCO-format datasets, with errors that tell the user what is wrong."""

import logging
import os
from typing import Callable, Dict, List, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from balanced_d2.data.checks.records import Findings, clean, report
from balanced_d2.data.datasets.coco_json import (
    annotation_errors_in,
    compressed,
    gc_paused,
    read_coco,
)
from balanced_d2.data.datasets.image_paths import find_images, renamed_findings
from balanced_d2.utils.errors import UserError


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
        **metadata: more metadata of the dataset; ``origin`` is the file or folder that messages
            name, if it is not ``json_file``.

    Raises:
        UserError: if the name is already taken.
    """
    if name in DatasetCatalog:
        raise UserError(f"a dataset named {name!r} is already registered; choose another name")

    def load() -> List[Dict]:
        prepare()
        return load_coco(name, json_file, image_root, metadata.get("origin", ""))

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def load_coco(name: str, json_file: str, image_root: str, origin: str = "") -> List[Dict]:
    """Load a COCO-format dataset as annotation tools write it.

    How what they write is read: :mod:`balanced_d2.data.datasets.coco_json`; how the images are
    found: :func:`balanced_d2.data.datasets.image_paths.find_images`. The boxes are cleaned
    (:func:`balanced_d2.data.checks.records.clean`). The names of keypoints become metadata; those
    with "left" and "right" in their names are swapped when an image is flipped.

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
    with annotation_errors_in(name, json_file), gc_paused():
        content, findings = read_coco(name, json_file, evaluated=True)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        _set_metadata(name, categories)
        images = sorted(content["images"], key=lambda image: image["id"])
        records = _records(images, content.get("annotations", []), categories)
        _find_files(records, image_root, findings)
    source = origin or json_file
    report(name, findings, source)
    logging.getLogger(__name__).info(f"Loaded {len(records)} images from {source}")
    return clean(name, records, source)


def _set_metadata(name: str, categories: Sequence[Dict]) -> None:
    """Add classes and keypoints to the metadata, as Detectron2 does; it does not read the names of
    keypoints, but needs them to train."""
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = [category["name"] for category in categories]
    metadata.thing_dataset_id_to_contiguous_id = {
        category["id"]: number for number, category in enumerate(categories)
    }
    names = next((c["keypoints"] for c in categories if c.get("keypoints")), None)
    if names is None or metadata.get("keypoint_names") is not None:
        return
    flipped = [(a, a.replace("left", "right")) for a in names if "left" in a]
    metadata.set(
        keypoint_names=list(names), keypoint_flip_map=[(a, b) for a, b in flipped if b in names]
    )


def _records(
    images: Sequence[Dict], annotations: Sequence[Dict], categories: Sequence[Dict]
) -> List[Dict]:
    """What Detectron2's own loader makes of a file, which drops boxes with an empty mask."""
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    records = {
        image["id"]: {
            "file_name": _field(image, "file_name", "image"),
            "height": _field(image, "height", "image"),
            "width": _field(image, "width", "image"),
            "image_id": image["id"],
            "annotations": [],
        }
        for image in images
    }
    for annotation in annotations:
        record = records.get(annotation["image_id"])
        if record is None:
            continue
        category = annotation["category_id"]
        if category not in numbers:
            raise ValueError(f"annotation {annotation['id']} has the unknown category {category}")
        if annotation.get("ignore") not in (None, 0, False, "0"):
            raise ValueError(f'annotation {annotation["id"]} is marked "ignore"')
        kept = {key: annotation[key] for key in ("id", "iscrowd", "bbox") if key in annotation}
        kept["category_id"] = numbers[category]
        kept["bbox_mode"] = BoxMode.XYWH_ABS
        mask = annotation.get("segmentation")
        if mask:
            kept["segmentation"] = compressed(mask) if isinstance(mask, dict) else mask
        if annotation.get("keypoints"):
            # From indices of pixels to coordinates of their centres.
            kept["keypoints"] = [
                value if index % 3 == 2 else value + 0.5
                for index, value in enumerate(annotation["keypoints"])
            ]
        record["annotations"].append(kept)
    return list(records.values())


def _field(item: Dict, key: str, kind: str):
    value = item.get(key)
    if value is None:
        raise ValueError(f"{kind} {item['id']} has no {key!r}")
    return value


def _find_files(records: List[Dict], image_root: str, findings: Findings) -> None:
    names = [record["file_name"] for record in records]
    found = find_images(image_root, names)
    for record, path in zip(records, found.paths):
        record["file_name"] = path
    findings += renamed_findings(names, found)
