"""Problems in the annotations of a dataset, and the records without them."""

import logging
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from balanced_d2.utils.errors import UserError

MAX_EXAMPLES = 10
# A box that extends less than this many pixels beyond its image is clipped without a warning,
# because files have rounded numbers.
ROUNDING = 0.5

Item = TypeVar("Item")


class Finding(NamedTuple):
    """One kind of problem in a dataset, and what happens to the annotations that have it.

    ``str()`` returns the text for the user.
    """

    outcome: str
    """"refused", or what is done instead: "dropped" or "clipped"."""
    what: str
    """What is counted and what is wrong with it, such as "annotation(s) belong to no image"."""
    examples: Sequence[str]
    """Where it occurs, each such as "annotation 7 (image 99)"."""
    advice: str = ""
    """How to fix it, if it is refused."""
    is_usual: bool = False
    """Whether it is information and no warning."""

    @property
    def refused(self) -> bool:
        return self.outcome == "refused"

    def __str__(self) -> str:
        more = ", ..." if len(self.examples) > MAX_EXAMPLES else ""
        examples = ", ".join(self.examples[:MAX_EXAMPLES])
        where = " ".join(f"{self.what}: {examples}{more}".splitlines())
        if self.refused:
            return f"{len(self.examples)} {where}; refused: {self.advice}"
        return f"{self.outcome} {len(self.examples)} {where}"


class Findings(List[Finding]):
    """A list of findings; kinds of problems that do not occur are not added."""

    def add(
        self,
        outcome: str,
        what: str,
        where: Sequence[Item] | np.ndarray,
        label: Callable[[Item], str],
        advice: str = "",
    ) -> None:
        """Add a :class:`Finding` about the items in ``where``, unless that is empty.

        Args:
            label: returns the example for an item.
        """
        if len(where):
            self.append(Finding(outcome, what, [label(item) for item in where], advice))

    def refuse(
        self,
        what: str,
        where: Sequence[Item] | np.ndarray,
        label: Callable[[Item], str],
        advice: str,
    ) -> None:
        """Add a finding that is refused; arguments as for :meth:`add`."""
        self.add("refused", what, where, label, advice)


def report(name: str, findings: Sequence[Finding], source: str = "") -> None:
    """Log each finding that is not refused, once; then refuse the others together.

    Args:
        name: the dataset.
        source: the file that the findings are about, if there is one.

    Raises:
        UserError: one for everything that is refused.
    """
    where = f"data set {name!r}: " + (f"{source}: " if source else "")
    for finding in findings:
        if not finding.refused:
            level = logging.INFO if finding.is_usual else logging.WARNING
            log_first_n(level, f"{where}{finding}", key="message")
    refused = [str(finding) for finding in findings if finding.refused]
    if refused:
        raise UserError(where + "; ".join(refused))


def clean(name: str, records: List[Dict], source: str = "") -> List[Dict]:
    """The records of a dataset without the boxes that nothing can be learnt from.

    Boxes without width or height and boxes completely outside their image are dropped, boxes partly
    outside are clipped, each with one warning that counts them. Cleaning a second time changes and
    reports nothing. Rotated boxes are left alone.

    Args:
        name: the dataset. If its ``thing_classes`` are known, they limit the ``category_id``.
        records: Detectron2's standard dataset dicts; they are not changed. If they have no
            ``width`` and ``height``, no box counts as outside.
        source: the file they come from, for messages.

    Raises:
        UserError: on boxes that are not four finite numbers, and on unknown categories.
    """
    records, findings = examine(name, records)
    report(name, findings, source)
    return records


def examine(name: str, records: List[Dict]) -> Tuple[List[Dict], List[Finding]]:
    """The records that :func:`clean` returns, and everything that it drops, clips and refuses."""
    owners = [i for i, record in enumerate(records) for _ in record.get("annotations", ())]
    annotations = [a for record in records for a in record.get("annotations", ())]

    def label(index: int) -> str:
        return label_of(records[owners[index]], annotations[index])

    modes = np.array([_box_mode(annotation) for annotation in annotations], dtype=int)
    upright = np.flatnonzero(np.isin(modes, (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)))
    boxes, four_numbers = as_boxes([annotations[i].get("bbox") for i in upright])
    findings = Findings(_category_findings(name, annotations, label))
    findings.refuse(
        "annotation(s) have a bbox_mode that cannot be trained on",
        np.flatnonzero(modes < 0),
        label,
        "set it to BoxMode.XYXY_ABS or BoxMode.XYWH_ABS, in pixels",
    )
    findings += box_findings(boxes, four_numbers, lambda i: label(upright[i]))
    is_xywh = modes[upright] == BoxMode.XYWH_ABS
    boxes[is_xywh] = BoxMode.convert(boxes[is_xywh], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    sizes = np.array([_size(record) for record in records]).reshape(-1, 2)
    sizes = sizes[np.array(owners, dtype=int)[upright]]
    checked = check_boxes(boxes, sizes)
    findings += checked.findings(lambda i: label(upright[i]))

    # None: dropped.
    changes: Dict[int, Optional[Dict]] = dict.fromkeys(upright[checked.empty | checked.outside])
    clipped = np.clip(boxes, 0, np.tile(sizes, 2))
    clipped[is_xywh] = BoxMode.convert(clipped[is_xywh], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    for i in np.flatnonzero(checked.partly_outside):
        changes[upright[i]] = {**annotations[upright[i]], "bbox": clipped[i].tolist()}
    return _changed(records, owners, annotations, changes), findings


def _changed(
    records: List[Dict],
    owners: List[int],
    annotations: List[Dict],
    changes: Dict[int, Optional[Dict]],
) -> List[Dict]:
    kept: Dict[int, List[Dict]] = {owners[index]: [] for index in changes}
    for index, owner in enumerate(owners):
        annotation = changes.get(index, annotations[index])
        if owner in kept and annotation is not None:
            kept[owner].append(annotation)
    return [
        {**record, "annotations": kept[owner]} if owner in kept else record
        for owner, record in enumerate(records)
    ]


def _box_mode(annotation: Dict) -> int:
    mode = annotation.get("bbox_mode")
    return mode if mode in _MODES else -1


_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)


def _size(record: Dict) -> Tuple[float, float]:
    if "width" in record and "height" in record:
        return record["width"], record["height"]
    return np.nan, np.nan


def _category_findings(
    name: str, annotations: List[Dict], label: Callable[[int], str]
) -> List[Finding]:
    classes = MetadataCatalog.get(name).get("thing_classes")
    end = np.inf if classes is None else len(classes)
    categories = [annotation.get("category_id") for annotation in annotations]
    wrong = [
        index
        for index, category in enumerate(categories)
        if not isinstance(category, (int, np.integer)) or not 0 <= category < end
    ]
    findings = Findings()
    findings.refuse(
        "annotation(s) have a category_id that is not an integer from 0 to "
        + ("the number of classes - 1" if classes is None else f"{end - 1}, the last class"),
        wrong,
        lambda index: f"{label(index)} (category_id {categories[index]!r})",
        "fix them, or the dataset's thing_classes",
    )
    return findings


def label_of(record: Dict, annotation: Dict) -> str:
    """Text by which the user can find an annotation of a record."""
    image = record.get("file_name", f"image {record.get('image_id')}")
    if "id" in annotation:
        return f"annotation {annotation['id']} of {image}"
    number = next(i for i, other in enumerate(record["annotations"], 1) if other is annotation)
    return f"annotation number {number} of {image}"


class CheckedBoxes(NamedTuple):
    """Which boxes have to be dropped or clipped, bool (N,) each."""

    empty: np.ndarray
    outside: np.ndarray
    partly_outside: np.ndarray
    reported: np.ndarray
    """The boxes in ``partly_outside`` that extend beyond the image by more than rounding."""

    def findings(self, label: Callable[[int], str]) -> List[Finding]:
        """What is dropped and clipped. ``label`` returns the text for a box by its index."""
        findings = Findings()
        for outcome, what, boxes in (
            ("dropped", "has no width or height", self.empty),
            ("dropped", "is outside its image", self.outside),
            ("clipped", "is partly outside its image", self.reported),
        ):
            findings.add(outcome, f"annotation(s) whose box {what}", np.flatnonzero(boxes), label)
        return findings


def check_boxes(boxes: np.ndarray, sizes: np.ndarray) -> CheckedBoxes:
    """Find boxes that have to be dropped or clipped.

    Args:
        boxes: (N, 4), x0, y0, x1, y1; rows with NaN are left alone.
        sizes: (N, 2), width and height of each box's image, NaN if unknown.
    """
    start, end = boxes[:, :2], boxes[:, 2:]
    empty = np.any(end <= start, axis=1)
    # Comparisons with NaN are false, so with an unknown size no box is outside.
    known = ~np.isnan(sizes).any(axis=1)
    outside = ~empty & known & ((end <= 0) | (start >= sizes)).any(axis=1)
    excess = np.maximum(-start, end - sizes).max(axis=1, initial=-np.inf)
    partly_outside = ~empty & ~outside & (excess > 0)
    return CheckedBoxes(empty, outside, partly_outside, partly_outside & (excess > ROUNDING))


def as_boxes(values: Sequence) -> Tuple[np.ndarray, np.ndarray]:
    """Boxes as an array.

    Args:
        values: any objects.

    Returns:
        Floats (N, 4), NaN where a value is not four finite numbers; and bool (N,), which values
        are four numbers, finite or not.
    """
    try:
        array = np.array(values)
    except ValueError:  # of different lengths
        array = np.empty(())
    four_numbers = np.ones(len(values), dtype=bool)
    if array.shape != (len(values), 4) or array.dtype.kind not in "iuf":
        rows = [_numbers(value) for value in values]
        four_numbers[:] = [row is not None for row in rows]
        array = np.array([(0,) * 4 if row is None else row for row in rows]).reshape(-1, 4)
    array = array.astype(float)
    array[~four_numbers | ~np.isfinite(array).all(axis=1)] = np.nan
    return array, four_numbers


def _numbers(value) -> Optional[np.ndarray]:
    """``value`` as an array, or None if it is not four numbers."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.shape == (4,) and array.dtype.kind in "iuf" else None


def box_findings(
    boxes: np.ndarray, four_numbers: np.ndarray, label: Callable[[int], str]
) -> List[Finding]:
    """What is wrong with the result of :func:`as_boxes`.

    Args:
        label: returns the text for a box by its index.
    """
    findings = Findings()
    findings.refuse(
        "annotation(s) have no valid bbox (4 numbers)",
        np.flatnonzero(~four_numbers),
        label,
        "fix or remove them",
    )
    findings.refuse(
        "annotation(s) have a bbox with NaN or infinity",
        np.flatnonzero(four_numbers & np.isnan(boxes).any(axis=1)),
        label,
        "fix or remove them",
    )
    return findings


def unit_findings(
    boxes: np.ndarray, sizes: np.ndarray, label: Callable[[int], str]
) -> List[Finding]:
    """Refuse boxes whose numbers cannot be x, y, width and height in pixels.

    Args:
        boxes: (N, 4), as a file has them; rows with NaN are left alone.
        sizes: (N, 2), width and height of each box's image, NaN if unknown.
        label: returns the text for a box by its index.
    """
    findings = Findings()
    start, size = boxes[:, :2], boxes[:, 2:]
    real = np.all(size > 0, axis=1)
    # Smaller than a pixel, in the corner of its image.
    fractions = real & np.all((start >= 0) & (start + size <= 1.001) & (sizes > 4), axis=1)
    fractions &= (boxes != np.round(boxes)).any(axis=1)
    few = fractions.sum() < FEW * real.sum()
    findings.add(
        "kept" if few else "refused",
        "annotation(s) whose box lies within the first pixel, as fractions of an image do,",
        np.flatnonzero(fractions),
        lambda i: _with_box(label(i), boxes[i]),
        "boxes are x, y, width, height in pixels: multiply them by the image's width and height",
    )
    # As corners, they would all lie in their images; as sizes, many reach far out of them.
    corners = np.all((start > -ROUNDING) & (size > start) & (size <= sizes + ROUNDING), axis=1)
    beyond = real & (start + size > sizes * (1 + FEW)).any(axis=1)
    if corners.sum() >= 0.99 * real.sum() and beyond.sum() >= MANY * max(real.sum(), 1):
        findings.refuse(
            "annotation(s) have a box that leaves its image, but not if its numbers are corners",
            np.flatnonzero(beyond & corners),
            lambda i: _with_box(label(i), boxes[i]),
            "they seem to be x1, y1, x2, y2: COCO's format has x, y, width, height",
        )
    return findings


# Shares of a data set's boxes.
FEW = 0.1
MANY = 0.3


def _with_box(label: str, box: np.ndarray) -> str:
    return f"{label}: [{', '.join(f'{value:g}' for value in box)}]"


def left_out_findings(records: Sequence[Dict], filter_empty: bool) -> List[Finding]:
    """What training leaves out, though nothing is wrong with it.

    Args:
        filter_empty: ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``.
    """
    findings = Findings()
    crowds = [
        (record, annotation)
        for record in records
        for annotation in record.get("annotations", ())
        if annotation.get("iscrowd", 0)
    ]
    findings.add(
        "left out",
        "annotation(s) that are marked iscrowd, for groups of objects (CVAT marks masks so)",
        crowds,
        lambda item: label_of(*item),
    )
    empty = [
        record.get("file_name", f"image {record.get('image_id')}")
        for record in records
        if "annotations" in record and all(a.get("iscrowd", 0) for a in record["annotations"])
    ]
    if empty:
        outcome = "left out" if filter_empty else "kept as background"
        what = "image(s) without objects (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
        findings.append(Finding(outcome, what, empty, is_usual=True))
    return findings
