"""Checks of a COCO-format annotation file, before it is loaded."""

from collections import Counter
from typing import Callable, Container, Dict, List, Optional

import numpy as np

from balanced_d2.data.checks.records import (
    Finding,
    Findings,
    as_boxes,
    box_findings,
    check_boxes,
    unit_findings,
)
from balanced_d2.data.classes import same_names
from balanced_d2.data.datasets.coco_json import gc_paused, is_side, label_in_file, read_coco
from balanced_d2.data.datasets.image_paths import find_images, renamed_findings


def check_coco(
    name: str,
    json_file: str,
    evaluated: bool = False,
    masks: bool = False,
    image_root: Optional[str] = None,
) -> List[Finding]:
    """Find everything that is wrong in an annotation file, and what is read in another form.

    Args:
        name: the dataset, for the message.
        json_file: its annotations.
        evaluated: whether detections will be evaluated on it. A file may then have no annotations,
            as for COCO's test images.
        masks: whether masks will be used: those that cannot be are then refused.
        image_root: the folder of the images, if those that have other names there are to be found.

    Raises:
        UserError: if the file cannot be read or does not have the structure of COCO's files.
    """
    with gc_paused():
        content, findings = read_coco(name, json_file, evaluated, masks)
        findings = Findings([*findings_in(content), *findings])
        if image_root is not None and not any(finding.refused for finding in findings):
            names = [image["file_name"] for image in content["images"]]
            findings += renamed_findings(names, find_images(image_root, names))
        return findings


def findings_in(content: Dict) -> List[Finding]:
    """Find everything that is wrong in the content that ``read_coco`` returns."""
    images, annotations = content["images"], content.get("annotations", [])
    return [
        *_id_findings("image", images, (int, str)),
        *_id_findings("category", content["categories"], (int,)),
        *_image_findings(images),
        *_category_findings(content["categories"]),
        *_reference_findings(content, annotations),
        *_value_findings(images, annotations),
    ]


def _id_findings(kind: str, items: List[Dict], types: tuple) -> List[Finding]:
    ids = [item.get("id") for item in items]
    valid_types = set(map(type, ids)) & set(types)
    # A mixture of numbers and strings cannot be sorted.
    valid_types = valid_types if len(valid_types) == 1 else {int}
    counts = Counter(i for i in ids if type(i) in valid_types)
    plural = {"category": "categories", "image": "image(s)"}[kind]
    findings = Findings()
    findings.refuse(
        f"{plural} have no valid id",
        [index for index, i in enumerate(ids) if type(i) not in valid_types],
        lambda index: f"number {index + 1} in the file (id {ids[index]!r})",
        "give each an integer as its id",
    )
    findings.refuse(
        f"{kind} id(s) occur more than once",
        [i for i, count in counts.items() if count > 1],
        lambda i: f"{kind} {i} ({counts[i]} times)",
        "renumber them",
    )
    return findings


def _image_findings(images: List[Dict]) -> List[Finding]:
    def label(image: Dict) -> str:
        return f"image {image.get('id')}"

    findings = Findings()
    findings.refuse(
        "image(s) have no 'file_name'",
        [image for image in images if not _has_name(image, "file_name")],
        label,
        "give each the name of its file",
    )
    findings.refuse(
        "image(s) have no valid 'width' and 'height'",
        [i for i in images if not (is_side(i.get("width")) and is_side(i.get("height")))],
        lambda i: f"{label(i)} ({i.get('width')!r} x {i.get('height')!r})",
        "set them to the image's size in pixels",
    )
    files = Counter(image["file_name"] for image in images if _has_name(image, "file_name"))
    findings.add(
        "kept, each with its own annotations only,",
        "file(s) that belong to more than one image",
        [file for file, count in files.items() if count > 1],
        lambda file: f"{file} ({files[file]} images)",
    )
    return findings


def _has_name(item: Dict, key: str) -> bool:
    return isinstance(item.get(key), str) and bool(item[key].strip())


def _category_findings(categories: List[Dict]) -> List[Finding]:
    findings = Findings()
    findings.refuse(
        "categories have no 'name'",
        [category for category in categories if not _has_name(category, "name")],
        lambda category: f"category {category.get('id')}",
        "name them",
    )
    named = [category for category in categories if _has_name(category, "name")]
    findings.refuse(
        "name(s) belong to more than one category, so that results could not tell them apart",
        same_names([category["name"] for category in named]),
        lambda where: (
            f"{named[where[0]]['name']!r} (categories "
            f"{', '.join(str(named[i].get('id')) for i in where)})"
        ),
        "rename one, or give the annotations of both the same category",
    )
    return findings


def _reference_findings(content: Dict, annotations: List[Dict]) -> List[Finding]:
    findings = Findings()
    for key, items, plural in (
        ("image", content["images"], "images"),
        ("category", content["categories"], "categories"),
    ):
        known = {item["id"] for item in items if isinstance(item.get("id"), (int, str))}
        unknown = [a for a in annotations if not _is_in(a.get(f"{key}_id"), known)]

        def label(a: Dict, key: str = key) -> str:
            return f"annotation {a.get('id')} ({key} {a.get(f'{key}_id')!r})"

        findings.refuse(
            f"annotation(s) belong to no {key} in the file",
            unknown,
            label,
            f"remove them or add the {plural}",
        )
    return findings


def _is_in(value, known: Container) -> bool:
    try:
        return value in known
    except TypeError:  # a list or an object
        return False


def _value_findings(images: List[Dict], annotations: List[Dict]) -> List[Finding]:
    def label(index: int) -> str:
        return label_in_file(annotations[index])

    boxes, four_numbers = as_boxes([annotation.get("bbox") for annotation in annotations])
    findings = Findings(box_findings(boxes, four_numbers, label))
    findings.refuse(
        'annotation(s) are marked "ignore", which Detectron2 does not support',
        [i for i, a in enumerate(annotations) if a.get("ignore") not in (None, 0, "0")],
        label,
        'remove them, or mark them "iscrowd"',
    )
    findings.refuse(
        "annotation(s) have an iscrowd that is neither 0 nor 1",
        [i for i, a in enumerate(annotations) if a.get("iscrowd") not in (0, 1)],
        lambda i: f"{label(i)} (iscrowd {annotations[i]['iscrowd']!r})",
        "set it to 0, or to 1 for a group of objects",
    )
    findings += _keypoint_findings(annotations, label)
    sizes = {
        image["id"]: (image["width"], image["height"])
        for image in images
        if isinstance(image.get("id"), (int, str))
        and is_side(image.get("width"))
        and is_side(image.get("height"))
    }
    image_ids = [annotation.get("image_id") for annotation in annotations]
    sizes_of_all = np.array(
        [sizes[i] if _is_in(i, sizes) else (np.nan, np.nan) for i in image_ids], dtype=float
    ).reshape(-1, 2)
    findings += unit_findings(boxes, sizes_of_all, label)
    boxes[:, 2:] += boxes[:, :2]
    return findings + check_boxes(boxes, sizes_of_all).findings(label)


def _keypoint_findings(annotations: List[Dict], label: Callable[[int], str]) -> List[Finding]:
    keypoints = [annotation.get("keypoints") for annotation in annotations]
    findings = Findings()
    findings.refuse(
        "annotation(s) have keypoints that are not a list of x, y, visibility",
        [i for i, points in enumerate(keypoints) if points and not _are_keypoints(points)],
        label,
        "fix or remove them",
    )
    return findings


def _are_keypoints(points) -> bool:
    return (
        isinstance(points, list) and len(points) % 3 == 0 and set(map(type, points)) <= {int, float}
    )
