"""VGG Image Annotator (VIA): its CSV, and its JSON, of annotations or of a whole project."""

import csv
import io
import json
import math
import os
from collections import Counter
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from balanced_d2.data.datasets.source import (
    ImageIndex,
    Labelled,
    LabelledImage,
    LabelledObject,
    check_found,
    number,
    read_text,
    shorten,
    sorted_by_name,
    split_in,
)
from balanced_d2.utils.errors import UserError

COLUMNS = ("filename", "region_shape_attributes", "region_attributes")
CLASS_KEYS = ("class", "label", "name", "category", "type", "object")
"""Attributes of regions that are the class, if there are several."""
ONLY_CLASS = "object"
"""The class of regions that have no attributes, as people draw them who have one class."""


class Region(NamedTuple):
    """A region, or an image without one."""

    where: str
    """The file, and the line or region, for messages."""
    file_name: str
    shape: Dict[str, Any]
    """Empty for an image without regions."""
    attributes: Dict[str, Any]


def is_via(content: object) -> bool:
    """Whether the content of a JSON file is VIA's."""
    if not isinstance(content, dict) or not content:
        return False
    return "_via_img_metadata" in content or all(
        isinstance(value, dict) and value.keys() >= {"filename", "regions"}
        for value in content.values()
    )


def is_via_csv(path: str) -> bool:
    """Whether a file begins with VIA's columns."""
    try:
        with open(path, "rb") as file:
            first = file.readline(1000).decode("utf-8-sig", "replace")
    except OSError:
        return False
    return all(column in first for column in COLUMNS)


def read_via(
    root: str, files: Dict[str, object], images: List[str], image_dir: Optional[str] = None
) -> Labelled:
    """Read VIA's files. The classes are sorted by name.

    The class is the only attribute that regions have, or the one of ``CLASS_KEYS``.

    Args:
        root: the folder of everything.
        files: the content of each JSON file by its path, None for CSV.
        images: those in the folder of the images.
        image_dir: that folder, if it is not the same.

    Raises:
        UserError: naming the file and the region.
    """
    index = ImageIndex(images, image_dir or root)
    regions = {
        path: list(_in_csv(path) if content is None else _in_json(path, content))
        for path, content in files.items()
    }
    everywhere = [region for of_file in regions.values() for region in of_file]
    key = _class_key(root, everywhere)
    read: Dict[Tuple[str, str], LabelledImage] = {}
    owners: Dict[Tuple[str, str], str] = {}
    for path, of_file in regions.items():
        folder, split = os.path.dirname(path), split_in(path, root)
        for region in of_file:
            name = region.file_name
            image = index.find(name, folder, region.where) or os.path.join(folder, name)
            other = owners.setdefault((split, image), path)
            if other != path:
                raise UserError(f"{other} and {path} both have {name}: give one of them")
            objects = read.setdefault((split, image), LabelledImage(image, [])).objects
            if region.shape:
                objects.append(_read_region(region, key))
    if not read:
        raise UserError(f"{root}: it has no image")
    splits: Dict[str, List[LabelledImage]] = {}
    for (split, _), labelled in read.items():
        splits.setdefault(split, []).append(labelled)
    if "" in splits and len(splits) > 1:
        raise UserError(f"{root}: some of its files are in no folder of a split, but others are")
    used = {path for _, path in read}
    check_found(root, used)
    labels = {item.label for image in read.values() for item in image.objects}
    notes = index.note_unused(used)
    if labels and not key:
        notes += (f"regions have no attributes: their class is called {ONLY_CLASS!r}",)
    return Labelled("VGG Image Annotator", sorted_by_name(labels), splits, notes=notes)


def _in_csv(path: str) -> Iterator[Region]:
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names = {(name or "").strip().lstrip("#"): name for name in rows.fieldnames or ()}
    try:
        for row in rows:
            cells = {name: row.get(column) or "" for name, column in names.items()}
            where = f"{path}, line {rows.line_num}"
            if cells["filename"].strip():
                shape, attributes = (_object(cells[key], where) for key in COLUMNS[1:])
                yield Region(where, cells["filename"].strip(), shape, attributes)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error
    except KeyError as error:
        raise UserError(f"{path} has no column {error}") from error


def _object(text: str, where: str) -> Dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {shorten(text)} is not valid JSON") from error
    return _as_object(content, where)


def _as_object(content: object, where: str) -> Dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: {shorten(content)} is not an object with attributes")
    return content


def _in_json(path: str, content: Any) -> Iterator[Region]:
    for item in _as_object(content.get("_via_img_metadata", content), path).values():
        name = item.get("filename") if isinstance(item, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: an image has no 'filename': {shorten(item)}")
        where = f"{path}, {shorten(name)}"
        regions = item.get("regions") or []
        # Version 1 numbers them.
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(regions, list):
            raise UserError(f"{where}: 'regions' is {shorten(regions)}, not a list")
        for position, region in enumerate(regions, start=1):
            place = f"{where}, region {position}"
            region = _as_object(region, place)
            shape = _as_object(region.get("shape_attributes"), place)
            if not shape:
                raise UserError(f"{place} has no shape; draw it again or remove it")
            yield Region(place, name, shape, _as_object(region.get("region_attributes", {}), place))
        if not regions:
            yield Region(where, name, {}, {})


def _class_key(root: str, regions: Sequence[Region]) -> str:
    """The attribute that is the class; "" if regions have none."""
    counts = Counter(key for region in regions if region.shape for key in region.attributes)
    known = [key for key in counts if key.strip().lower() in CLASS_KEYS]
    keys = known or list(counts)
    if len(keys) > 1:
        raise UserError(
            f"{root}: regions have the attributes {shorten(', '.join(keys))}, and which is their "
            "class is not clear: call that one class, and no other one so"
        )
    return keys[0] if keys else ""


def _read_region(region: Region, key: str) -> LabelledObject:
    shape, kind = region.shape, region.shape.get("name")

    def value(name: str) -> float:
        try:
            return number(str(shape[name]))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{region.where}: {name} of its {shorten(kind)} is {shorten(shape.get(name))}, "
                "not a number"
            ) from error

    polygon: List[float] = []
    if kind == "rect":
        x0, y0 = value("x"), value("y")
        box = (x0, y0, x0 + value("width"), y0 + value("height"))
    elif kind == "polygon":
        polygon = _points(region)
        xs, ys = polygon[::2], polygon[1::2]
        box = (min(xs), min(ys), max(xs), max(ys))
    elif kind in ("circle", "ellipse"):
        radii = [value("r")] * 2 if kind == "circle" else [value("rx"), value("ry")]
        angle = value("theta") if "theta" in shape else 0
        width = math.hypot(radii[0] * math.cos(angle), radii[1] * math.sin(angle))
        height = math.hypot(radii[0] * math.sin(angle), radii[1] * math.cos(angle))
        x, y = value("cx"), value("cy")
        box = (x - width, y - height, x + width, y + height)
    else:
        raise UserError(
            f"{region.where} is a {shorten(kind)}, which has no box: draw a rect, polygon, circle "
            "or ellipse, or remove it"
        )
    return LabelledObject(_label(region, key), box, polygon)


def _points(region: Region) -> List[float]:
    axes = [region.shape.get(f"all_points_{axis}") for axis in "xy"]
    try:
        xs, ys = ([number(str(value)) for value in axis or ()] for axis in axes)
    except (TypeError, ValueError) as error:
        raise UserError(f"{region.where}: its points are {shorten(axes)}, not numbers") from error
    if len(xs) != len(ys) or len(xs) < 3:
        raise UserError(f"{region.where}: its polygon has {len(xs)} x and {len(ys)} y; remove it")
    return [value for point in zip(xs, ys) for value in point]


def _label(region: Region, key: str) -> str:
    if not key:
        return ONLY_CLASS
    value = region.attributes.get(key)
    if isinstance(value, dict):  # check boxes
        chosen = [name for name, is_set in value.items() if is_set is True]
        value = chosen[0] if len(chosen) == 1 else None
    label = str(value).strip() if type(value) in (str, int, float) else ""
    if not label:
        raise UserError(f"{region.where} has no class ({key!r}); give it one")
    return label
