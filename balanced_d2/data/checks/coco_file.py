"""Checks of a COCO-format annotation file, before Detectron2's loader fails or ignores errors."""

from collections import Counter
from typing import Callable, Container, Dict, List

import numpy as np
from detectron2.utils.file_io import PathManager

from balanced_d2.data.checks.records import (
    Finding,
    Findings,
    as_boxes,
    box_findings,
    check_boxes,
)
from balanced_d2.data.datasets.coco import annotation_errors_in, gc_paused, parse_json
from balanced_d2.utils.errors import UserError


def check_coco(name: str, json_file: str, evaluated: bool = False) -> List[Finding]:
    """Find everything that is wrong in an annotation file.

    Args:
        name: the dataset, for the message.
        json_file: its annotations.
        evaluated: whether detections will be evaluated on it. This requires more fields in the
            annotations, but a file may also have no annotations, as for COCO's test images.

    Raises:
        UserError: if the file cannot be read or does not have the structure of COCO's files.
    """
    with gc_paused():
        return findings_in(read_coco(name, json_file, evaluated), json_file, evaluated)


def findings_in(content: Dict, json_file: str, evaluated: bool = False) -> List[Finding]:
    """Find everything that is wrong in the content that :func:`read_coco` returns.

    Args: as for :func:`check_coco`.
    """
    images, annotations = content["images"], content.get("annotations", [])
    # COCO's own minival has duplicate annotations, which Detectron2 allows for it.
    duplicates_allowed = "minival" in json_file
    return [
        *_id_findings("image", images, (int, str)),
        *_id_findings("annotation", [] if duplicates_allowed else annotations, (int,)),
        *_id_findings("category", content["categories"], (int,)),
        *_image_findings(images),
        *_category_findings(content["categories"]),
        *_reference_findings(content, annotations),
        *_value_findings(images, annotations, evaluated),
    ]


def read_coco(name: str, json_file: str, evaluated: bool = False) -> Dict:
    """The content of an annotation file; arguments and errors as for :func:`check_coco`."""
    with annotation_errors_in(name, json_file), gc_paused():
        try:
            with open(PathManager.get_local_path(json_file), "rb") as file:
                content = parse_json(file.read())
        except OSError as error:
            raise UserError(
                f"data set {name!r}: cannot read {json_file}: {error.strerror}"
            ) from error
        if not isinstance(content, dict):
            raise ValueError("it is not an object with images, annotations and categories")
        for key in ("images", "annotations", "categories"):
            if key not in content and not (key == "annotations" and evaluated):
                raise ValueError(f"it has no {key!r}")
            value = content.get(key, [])
            if not isinstance(value, list) or not set(map(type, value)) <= {dict}:
                raise ValueError(f"{key!r} is not a list of objects")
        for key in ("images", "categories"):
            if not content[key]:
                raise ValueError(f"{key!r} is empty")
    return content


def _id_findings(kind: str, items: List[Dict], types: tuple) -> List[Finding]:
    ids = [item.get("id") for item in items]
    valid_types = set(map(type, ids)) & set(types)
    # A mixture of numbers and strings cannot be sorted.
    valid_types = valid_types if len(valid_types) == 1 else {int}
    counts = Counter(i for i in ids if type(i) in valid_types)
    plural = {"category": "categories"}.get(kind, f"{kind}(s)")
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
        [i for i in images if not isinstance(i.get("file_name"), str) or not i["file_name"]],
        label,
        "give each the name of its file",
    )
    findings.refuse(
        "image(s) have no valid 'width' and 'height'",
        [i for i in images if not (_is_side(i.get("width")) and _is_side(i.get("height")))],
        lambda i: f"{label(i)} ({i.get('width')!r} x {i.get('height')!r})",
        "set them to the image's size in pixels",
    )
    return findings


def _is_side(value) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _category_findings(categories: List[Dict]) -> List[Finding]:
    findings = Findings()
    findings.refuse(
        "categories have no 'name'",
        [category for category in categories if not isinstance(category.get("name"), str)],
        lambda category: f"category {category.get('id')}",
        "name them",
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


def _value_findings(images: List[Dict], annotations: List[Dict], evaluated: bool) -> List[Finding]:
    def label(index: int) -> str:
        annotation = annotations[index]
        return f"annotation {annotation.get('id')} (image {annotation.get('image_id')})"

    boxes, four_numbers = as_boxes([annotation.get("bbox") for annotation in annotations])
    findings = Findings(box_findings(boxes, four_numbers, label))
    findings.refuse(
        'annotation(s) are marked "ignore", which Detectron2 does not support',
        [i for i, annotation in enumerate(annotations) if annotation.get("ignore", 0) != 0],
        label,
        'remove them, or mark them "iscrowd"',
    )
    if evaluated:
        findings.refuse(
            "annotation(s) lack 'area' or 'iscrowd', which COCO's metrics need",
            [i for i, a in enumerate(annotations) if "area" not in a or "iscrowd" not in a],
            label,
            "add them",
        )
    findings += _part_findings(annotations, label)
    sizes = {
        image["id"]: (image["width"], image["height"])
        for image in images
        if isinstance(image.get("id"), (int, str))
        and _is_side(image.get("width"))
        and _is_side(image.get("height"))
    }
    image_ids = [annotation.get("image_id") for annotation in annotations]
    sizes_of_all = [sizes[i] if _is_in(i, sizes) else (np.nan, np.nan) for i in image_ids]
    boxes[:, 2:] += boxes[:, :2]
    checked = check_boxes(boxes, np.array(sizes_of_all, dtype=float).reshape(-1, 2))
    return findings + checked.findings(label)


def _part_findings(annotations: List[Dict], label: Callable[[int], str]) -> List[Finding]:
    """Findings about masks and keypoints."""
    formats = [_mask_format(annotation.get("segmentation")) for annotation in annotations]
    keypoints = [annotation.get("keypoints") for annotation in annotations]
    findings = Findings()
    findings.refuse(
        "annotation(s) have a segmentation that is neither a list of polygons nor RLE",
        [index for index, kind in enumerate(formats) if kind == "unknown"],
        label,
        "write each polygon as a list of its own, [[x, y, x, y, x, y, ...]]",
    )
    # Detectron2's loader drops these, even for a model without masks.
    findings.add(
        "dropped",
        "annotation(s) whose segmentation has no polygon of at least three points",
        [index for index, kind in enumerate(formats) if kind == "empty"],
        label,
    )
    findings.refuse(
        "annotation(s) have keypoints that are not a list of x, y, visibility",
        [i for i, points in enumerate(keypoints) if points and not _are_keypoints(points)],
        label,
        "fix or remove them",
    )
    return findings


def _mask_format(segmentation) -> str:
    if not segmentation:
        return "absent"
    if isinstance(segmentation, dict):
        return "rle" if segmentation.keys() >= {"size", "counts"} else "unknown"
    if not isinstance(segmentation, list) or not set(map(type, segmentation)) <= {list}:
        return "unknown"
    has_area = any(len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in segmentation)
    return "polygons" if has_area else "empty"


def _are_keypoints(points) -> bool:
    return (
        isinstance(points, list) and len(points) % 3 == 0 and set(map(type, points)) <= {int, float}
    )
