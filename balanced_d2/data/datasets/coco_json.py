"""COCO's JSON as annotation tools write it, turned into the form that COCO defines.

What can be read in one way only is read: numbers as text, ``null`` fields, flat polygons, missing
areas. What cannot stays as it is, for :mod:`balanced_d2.data.checks.coco_file` to refuse.
"""

import gc
import json
import math
import re
from collections import Counter
from contextlib import contextmanager
from typing import Any, Callable, ContextManager, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import orjson
import pycocotools.mask as mask_util
from detectron2.utils.file_io import PathManager

from balanced_d2.data.checks.records import Finding, Findings
from balanced_d2.utils.errors import UserError, raise_user_errors

Size = Tuple[int, int]
"""Height and width in pixels."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_CROWD = {
    **dict.fromkeys(("0", "0.0", "false", "no", ""), 0),
    **dict.fromkeys(("1", "1.0", "true", "yes"), 1),
}


def read_coco(
    name: str, json_file: str, evaluated: bool = False, masks: bool = False
) -> Tuple[Dict, Findings]:
    """The content of an annotation file in COCO's form, and what had to be changed for that.

    Ids of categories are integers where they can be, each annotation has ``iscrowd``, ``area`` and
    an ``id`` of its own, and no ``segmentation`` that is not a mask.

    Args:
        name: the dataset, for messages.
        evaluated: whether detections will be evaluated on it. Then it may have no annotations, as
            COCO's test images.
        masks: whether masks will be used. A mask that cannot be read is then refused, otherwise
            it is ignored: its box remains.

    Raises:
        UserError: if the file cannot be read or does not have the structure of COCO's files.
    """
    with annotation_errors_in(name, json_file), gc_paused():
        try:
            with open(PathManager.get_local_path(json_file), "rb") as file:
                content = parse_json(file.read())
        except OSError as error:
            raise UserError(
                f"data set {name!r}: cannot read {json_file}: {error.strerror}"
            ) from error
        content = _structured(content, evaluated)
        return content, normalise(content, evaluated, masks, "minival" in json_file)


def _structured(content: Any, evaluated: bool) -> Dict:
    if not isinstance(content, dict):
        raise ValueError("it is not an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if value is None:
            content.pop(key, None)
            if key == "annotations" and evaluated:
                continue
            raise ValueError(f"it has no {key!r}")
        if not isinstance(value, list) or not set(map(type, value)) <= {dict}:
            raise ValueError(f"{key!r} is not a list of objects")
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f"{key!r} is empty")
    return content


def normalise(
    content: Dict, evaluated: bool = False, masks: bool = False, repeated_ids: bool = False
) -> Findings:
    """Turn the content of a file, in place, into COCO's form.

    Args: as for :func:`read_coco`, and:
        repeated_ids: whether ids of annotations may occur more than once, as in COCO's minival.

    Returns:
        What was changed, as far as the user should know it.
    """
    images, categories = content["images"], content["categories"]
    annotations = content.get("annotations", [])
    mixed = len({type(image.get("id")) for image in images}) > 1
    for image in images:
        image["id"] = _as_id(image.get("id"), texts=mixed)
        for side in ("width", "height"):
            image[side] = _as_id(image.get(side))
    for category in categories:
        category["id"] = _as_id(category.get("id"))
        if type(category.get("name")) in (int, float):
            category["name"] = str(category["name"])
    findings = Findings()
    _number_annotations(annotations, repeated_ids, findings)
    for key, items in (("image_id", images), ("category_id", categories)):
        _match_references(annotations, key, [item["id"] for item in items])
    _drop_supercategory(content, findings)
    sizes = {
        image["id"]: (int(image["height"]), int(image["width"]))
        for image in images
        if is_id(image["id"]) and is_side(image["width"]) and is_side(image["height"])
    }

    def label(index: int) -> str:
        return label_in_file(annotations[index])

    _read_flags(annotations, findings, label)
    _read_shapes(annotations, sizes, masks, findings, label)
    _complete_areas(annotations, sizes, evaluated, findings, label)
    return findings


def label_in_file(annotation: Dict) -> str:
    """Text by which the user can find an annotation in its file."""
    return f"annotation {annotation.get('id')} (image {annotation.get('image_id')})"


def is_side(value) -> bool:
    """Whether a value can be the width or height of an image."""
    return type(value) in (int, float) and 0 < value < 2**31


def is_id(value) -> bool:
    return type(value) in (int, str)


def _as_number(value):
    """The number that a text is; anything else unchanged."""
    if type(value) is str and len(value) < 40 and _NUMBER.fullmatch(value.strip()):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return value


def _as_id(value, texts: bool = True):
    """An id that is an integer in another form, as one; anything else unchanged."""
    number = _as_number(value) if texts else value
    if type(number) is float and number.is_integer():
        return int(number)
    return number if type(number) is int else value


def _number_annotations(annotations: List[Dict], repeated: bool, findings: Findings) -> None:
    ids = [annotation.get("id") for annotation in annotations]
    counts = Counter(i for i in ids if is_id(i))
    wrong = [
        index for index, i in enumerate(ids) if not is_id(i) or (counts[i] > 1 and not repeated)
    ]
    findings.add(
        "numbered",
        "annotation(s) whose id is missing or occurs more than once",
        wrong,
        lambda index: f"number {index + 1} in the file (id {_short(ids[index])})",
    )
    if wrong:
        first = 1 + max((i for i in ids if type(i) is int), default=0)
        for number, index in enumerate(wrong, first):
            annotations[index]["id"] = number


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _match_references(annotations: List[Dict], key: str, ids: Sequence) -> None:
    """Make references equal to the ids that they mean: 3 and "3" may be the same."""
    known = {i for i in ids if is_id(i)}
    by_text: Dict[str, Any] = {}
    for i in known:
        text = str(_as_id(i))
        by_text[text] = None if text in by_text else i
    for annotation in annotations:
        value = annotation.get(key)
        if type(value) in (int, str) and value in known:
            continue
        meant = by_text.get(str(_as_id(value))) if type(value) in (int, float, str) else None
        if meant is not None:
            annotation[key] = meant


def _drop_supercategory(content: Dict, findings: Findings) -> None:
    """Leave out the category that Roboflow writes for the whole project.

    It is recognised by all of this: it is the first, belongs to "none", no annotation has it, and
    every other category belongs to it.
    """
    first, *others = content["categories"]
    if (
        others
        and first.get("supercategory") == "none"
        and isinstance(first.get("name"), str)
        and all(other.get("supercategory") == first["name"] for other in others)
        and not any(
            annotation.get("category_id") == first["id"]
            for annotation in content.get("annotations", ())
        )
    ):
        content["categories"] = others
        findings.add(
            "left out",
            "category that only names the group of the others, as Roboflow writes it",
            [first],
            lambda category: f"category {category['id']} ({category['name']})",
        )


def _read_flags(annotations: List[Dict], findings: Findings, label: Callable) -> None:
    texts = []
    for index, annotation in enumerate(annotations):
        flag = annotation.get("iscrowd")
        if type(flag) is int:
            continue
        if type(flag) is str:
            texts.append(index)
            flag = _CROWD.get(flag.strip().lower(), flag)
        if flag is None or (type(flag) in (bool, float) and flag in (0, 1)):
            flag = int(flag or 0)
        annotation["iscrowd"] = flag
    crowds = [i for i in texts if annotations[i]["iscrowd"] == 1]
    findings.add("read as 1 the text of", "annotation(s)' iscrowd", crowds, label)


def _read_shapes(
    annotations: List[Dict],
    sizes: Mapping,
    masks: bool,
    findings: Findings,
    label: Callable[[int], str],
) -> None:
    """Turn boxes and masks into COCO's form; a missing box follows from its mask."""
    outcome, advice = ("refused", "fix or remove them") if masks else ("ignored", "")
    problems: Dict[str, List[int]] = {}
    rectangles, from_masks = [], []
    for index, annotation in enumerate(annotations):
        box = annotation.get("bbox")
        if type(box) is list and len(box) == 4 and str in map(type, box):
            annotation["bbox"] = box = [_as_number(value) for value in box]
        segmentation = annotation.get("segmentation")
        image_id = annotation.get("image_id")
        size = sizes.get(image_id) if is_id(image_id) else None
        if segmentation:
            mask, problem = _as_mask(segmentation, box, size)
            if problem:
                problems.setdefault(problem, []).append(index)
            if mask is not segmentation:
                annotation.pop("segmentation")
                if mask:
                    annotation["segmentation"] = mask
            if mask and _is_two_points(segmentation):
                rectangles.append(index)
            if mask and not box:
                annotation["bbox"] = _box_of(mask, size)
                from_masks.append(index)
        elif "segmentation" in annotation:
            del annotation["segmentation"]
    findings.add("read as rectangles", "segmentation(s) of two points", rectangles, label)
    findings.add("computed", "bbox(es) that are missing from masks", from_masks, label)
    for problem, where in problems.items():
        findings.add(outcome, f"annotation(s) {problem}", where, label, advice)


NOT_A_MASK = "have a segmentation that is neither a list of polygons nor RLE"
NO_POLYGON = "have a segmentation without a polygon of at least three points"
FAR_OUT = "have a polygon that reaches far beyond the image"
BAD_RLE = "have an RLE mask that does not add up to its image's size"


def _as_mask(segmentation, box, size: Optional[Size]) -> Tuple[Any, str]:
    """A mask in COCO's form, None if it has none, and what is wrong with it."""
    if isinstance(segmentation, dict):
        if not segmentation.keys() >= {"size", "counts"}:
            return None, NOT_A_MASK
        return (segmentation, "") if _adds_up(segmentation, size) else (None, BAD_RLE)
    if not isinstance(segmentation, list):
        return None, NOT_A_MASK
    kinds = set(map(type, segmentation))
    if kinds <= {int, float}:  # one polygon, not in a list of its own
        segmentation, kinds = [segmentation], {list}
    elif kinds == {list} and all(_is_point(item) for item in segmentation):
        segmentation = [segmentation]
    if not kinds <= {list, type(None)}:
        return None, NOT_A_MASK
    # pycocotools takes time and memory for each pixel along a polygon.
    limit = 10 * max(size) if size else 1e5
    polygons, changed = [], False
    for polygon in segmentation:
        if not polygon:
            changed = True
            continue
        types = set(map(type, polygon))
        if types == {list} and all(_is_point(item) for item in polygon):
            polygon, types, changed = [v for point in polygon for v in point], {float}, True
        if not types <= {int, float} or not math.isfinite(sum(polygon)):
            return None, NOT_A_MASK
        if not -limit < min(polygon) <= max(polygon) < limit:
            return None, FAR_OUT
        if len(polygon) == 4 and _are_corners(polygon, box):
            x0, y0, x1, y1 = polygon
            polygon, changed = [x0, y0, x1, y0, x1, y1, x0, y1], True
        if len(polygon) % 2 == 0 and len(polygon) >= 6:
            polygons.append(polygon)
        else:
            changed = True
    if not polygons:
        return None, NO_POLYGON if any(segmentation) else ""
    return (polygons if changed else segmentation), ""


def _is_point(value) -> bool:
    return type(value) is list and len(value) == 2 and set(map(type, value)) <= {int, float}


def _is_two_points(segmentation) -> bool:
    return (
        isinstance(segmentation, list)
        and len(segmentation) == 1
        and isinstance(segmentation[0], list)
        and len(segmentation[0]) == 4
        and not isinstance(segmentation[0][0], list)
    )


def _are_corners(polygon: Sequence[float], box) -> bool:
    """Whether two points are opposite corners of the annotation's box, to a pixel."""
    if type(box) is not list or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        return not box
    (left, right), (top, bottom) = sorted(polygon[::2]), sorted(polygon[1::2])
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    return all(abs(a - b) <= 1 for a, b in zip((left, top, right, bottom), corners))


def _adds_up(rle: Mapping, size: Optional[Size]) -> bool:
    """Whether a mask as run lengths is one of an image of this size.

    pycocotools reads and writes beyond its memory, or never returns, if it is not.
    """
    given = rle["size"]
    if not isinstance(given, list) or len(given) != 2 or not set(map(type, given)) <= {int, float}:
        return False
    if size is not None and tuple(given) != size:
        return False
    if not all(is_side(side) for side in given):
        return False
    runs = rle["counts"]
    if isinstance(runs, str):
        runs = _decoded(runs)
    if not isinstance(runs, (list, np.ndarray)) or len(runs) == 0:
        return False
    if isinstance(runs, list) and not set(map(type, runs)) <= {int}:
        return False
    return min(runs) >= 0 and sum(runs) == given[0] * given[1]


def _decoded(text: str) -> Optional[List[int]]:
    """The run lengths of COCO's compressed RLE; None if the text is none.

    Each number has 5 bits in each character and a sign; from the fourth on, it is the difference
    to the one two places before.
    """
    runs: List[int] = []
    value = shift = 0
    for byte in text.encode("utf-8", "surrogatepass"):
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs if shift == 0 else None


def _box_of(mask, size: Optional[Size]) -> Optional[List[float]]:
    """The x, y, width and height of a mask."""
    if isinstance(mask, dict):
        return mask_util.toBbox(compressed(mask)).tolist()
    xs = [x for polygon in mask for x in polygon[::2]]
    ys = [y for polygon in mask for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def compressed(rle: Mapping) -> Mapping:
    """A mask as run lengths in the form that pycocotools computes with."""
    if isinstance(rle["counts"], list):
        return mask_util.frPyObjects(rle, *map(int, rle["size"]))
    return rle


def _complete_areas(
    annotations: List[Dict],
    sizes: Mapping,
    evaluated: bool,
    findings: Findings,
    label: Callable[[int], str],
) -> None:
    computed = []
    for index, annotation in enumerate(annotations):
        area = _as_number(annotation.get("area"))
        # COCO's metrics leave out larger and negative ones.
        if isinstance(area, (int, float)) and type(area) is not bool and 0 <= area <= 1e10:
            annotation["area"] = area
            continue
        computed.append(index)
        image_id, box = annotation.get("image_id"), annotation.get("bbox")
        size = sizes.get(image_id) if is_id(image_id) else None
        annotation["area"] = _area(annotation.get("segmentation"), box, size)
    if evaluated and computed:
        what, where = "area(s) that are missing or no areas", [label(index) for index in computed]
        findings.append(Finding("computed", what, where, is_usual=True))


def _area(mask, box, size: Optional[Size]) -> float:
    if isinstance(mask, dict):
        return float(mask_util.area(compressed(mask)))
    if mask and size:
        return float(mask_util.area(mask_util.merge(mask_util.frPyObjects(mask, *size))))
    if type(box) is list and len(box) == 4 and set(map(type, box)) <= {int, float}:
        return float(min(max(box[2], 0) * max(box[3], 0), 1e10))
    return 0.0


def annotation_errors_in(name: str, source: str) -> ContextManager[None]:
    """Context manager that turns errors of reading annotations into :class:`UserError`."""
    return raise_user_errors(
        f"data set {name!r}: {source} is not a valid annotation file",
        *(AssertionError, AttributeError, LookupError, OverflowError, RecursionError, TypeError),
        ValueError,
        explain=_explain,
    )


def _explain(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not in UTF-8, UTF-16 or UTF-32 (byte {error.start}): save it as UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()) or "empty"


def parse_json(text: bytes) -> Any:
    """Parse JSON quickly, with the encodings, NaN, infinity and errors of Python's own parser."""
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
