"""What is wrong in the annotations of a data set, and records without it."""

import logging
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from balanced_d2.utils.errors import UserError

MAX_EXAMPLES = 10
# A box that reaches less than this many pixels outside its image is clipped without a word: files
# hold rounded numbers.
ROUNDING = 0.5

Item = TypeVar("Item")


class Finding(NamedTuple):
    """One kind of mistake in a data set, and what happens to it.

    ``str()`` gives the words for the user.
    """

    outcome: str
    """"refused", or what is done instead: "dropped" or "clipped"."""
    what: str
    """What is counted and what is wrong with it, such as "annotation(s) belong to no image"."""
    examples: Sequence[str]
    """Where, each such as "annotation 7 (image 99)"."""
    advice: str = ""
    """Of what is refused: how to mend it."""

    @property
    def refused(self) -> bool:
        return self.outcome == "refused"

    def __str__(self) -> str:
        more = ", ..." if len(self.examples) > MAX_EXAMPLES else ""
        where = f"{self.what}: {', '.join(self.examples[:MAX_EXAMPLES])}{more}"
        if self.refused:
            return f"{len(self.examples)} {where}; refused: {self.advice}"
        return f"{self.outcome} {len(self.examples)} {where}"


def tell(name: str, findings: Sequence[Finding], source: str = "") -> None:
    """Log a warning for each finding that is not refused, once; then refuse the others together.

    Args:
        name: the data set.
        source: the file that the findings are about, where there is one.

    Raises:
        UserError: one for all that is refused.
    """
    where = f"data set {name!r}: " + (f"{source}: " if source else "")
    for finding in findings:
        if not finding.refused:
            log_first_n(logging.WARNING, f"{where}{finding}", key="message")
    refused = [str(finding) for finding in findings if finding.refused]
    if refused:
        raise UserError(where + "; ".join(refused))


def clean(name: str, records: List[Dict], source: str = "") -> List[Dict]:
    """The records of a data set without the boxes that nothing can be learnt from.

    Boxes without width or height and boxes wholly outside their image are dropped, those partly
    outside are clipped to it, with one warning of each kind that counts them. Cleaning twice does
    and says nothing more. Rotated boxes stay as they are.

    Args:
        name: the data set. If its ``thing_classes`` are known, they bound the ``category_id``.
        records: Detectron2's standard data set dicts; they are not changed. Where they have no
            ``width`` and ``height``, no box counts as outside.
        source: the file they come from, for the messages.

    Raises:
        UserError: on boxes that are no four finite numbers and on unknown categories.
    """
    records, findings = examine(name, records)
    tell(name, findings, source)
    return records


def examine(name: str, records: List[Dict]) -> Tuple[List[Dict], List[Finding]]:
    """The records as :func:`clean` returns them, and all that it drops, clips and refuses."""
    owners = [i for i, record in enumerate(records) for _ in record.get("annotations", ())]
    annotations = [a for record in records for a in record.get("annotations", ())]

    def label(index: int) -> str:
        return label_of(records[owners[index]], annotations[index])

    modes = np.array([_box_mode(annotation) for annotation in annotations], dtype=int)
    upright = np.flatnonzero(np.isin(modes, (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)))
    boxes, four_numbers = as_boxes([annotations[i].get("bbox") for i in upright])
    findings = [
        *_category_findings(name, annotations, label),
        *found(
            "refused",
            "annotation(s) have a bbox_mode that cannot be trained on",
            np.flatnonzero(modes < 0),
            label,
            "set it to BoxMode.XYXY_ABS or BoxMode.XYWH_ABS, in pixels",
        ),
        *box_findings(boxes, four_numbers, lambda i: label(upright[i])),
    ]
    is_xywh = modes[upright] == BoxMode.XYWH_ABS
    boxes[is_xywh] = BoxMode.convert(boxes[is_xywh], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    sizes = np.array([_size(record) for record in records]).reshape(-1, 2)
    sizes = sizes[np.array(owners, dtype=int)[upright]]
    judged = judge(boxes, sizes)
    findings += judged.findings(lambda i: label(upright[i]))

    # None: dropped.
    changes: Dict[int, Optional[Dict]] = dict.fromkeys(upright[judged.empty | judged.outside])
    clipped = np.clip(boxes, 0, np.tile(sizes, 2))
    clipped[is_xywh] = BoxMode.convert(clipped[is_xywh], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    for i in np.flatnonzero(judged.reaching):
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
    return found(
        "refused",
        "annotation(s) have a category_id that is no whole number from 0 to "
        + ("the number of classes - 1" if classes is None else f"{end - 1}, the last class"),
        wrong,
        lambda index: f"{label(index)} (category_id {categories[index]!r})",
        "mend them, or thing_classes of the data set",
    )


def label_of(record: Dict, annotation: Dict) -> str:
    """How the user finds an annotation of a record."""
    image = record.get("file_name", f"image {record.get('image_id')}")
    if "id" in annotation:
        return f"annotation {annotation['id']} of {image}"
    number = next(i for i, other in enumerate(record["annotations"], 1) if other is annotation)
    return f"annotation number {number} of {image}"


class Judged(NamedTuple):
    """What is to be done with each of a number of boxes."""

    empty: np.ndarray
    outside: np.ndarray
    reaching: np.ndarray
    told: np.ndarray
    """Those of ``reaching`` that reach out by more than rounding."""

    def findings(self, label: Callable[[int], str]) -> List[Finding]:
        """The findings that drop and clip. ``label`` tells the user which box an index is."""
        box = "annotation(s) whose box"
        return [
            *found("dropped", f"{box} has no width or height", np.flatnonzero(self.empty), label),
            *found("dropped", f"{box} is outside its image", np.flatnonzero(self.outside), label),
            *found(
                "clipped", f"{box} is partly outside its image", np.flatnonzero(self.told), label
            ),
        ]


def judge(boxes: np.ndarray, sizes: np.ndarray) -> Judged:
    """Sort out boxes.

    Args:
        boxes: (N, 4), x0, y0, x1, y1; rows with NaN are left alone.
        sizes: (N, 2), width and height of each one's image, NaN where unknown.
    """
    start, end = boxes[:, :2], boxes[:, 2:]
    empty = np.any(end <= start, axis=1)
    # Comparisons with NaN are false, which is what an unknown size asks for.
    known = ~np.isnan(sizes).any(axis=1)
    outside = ~empty & known & ((end <= 0) | (start >= sizes)).any(axis=1)
    excess = np.maximum(-start, end - sizes).max(axis=1, initial=-np.inf)
    reaching = ~empty & ~outside & (excess > 0)
    return Judged(empty, outside, reaching, reaching & (excess > ROUNDING))


def as_boxes(values: Sequence) -> Tuple[np.ndarray, np.ndarray]:
    """Boxes as an array.

    Args:
        values: anything.

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
    """Four numbers as an array, or None if that is not what ``value`` is."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.shape == (4,) and array.dtype.kind in "iuf" else None


def box_findings(
    boxes: np.ndarray, four_numbers: np.ndarray, label: Callable[[int], str]
) -> List[Finding]:
    """The findings on what :func:`as_boxes` has returned. ``label`` says which box an index is."""
    return [
        *found(
            "refused",
            "annotation(s) have no valid bbox (4 numbers)",
            np.flatnonzero(~four_numbers),
            label,
            "mend or remove them",
        ),
        *found(
            "refused",
            "annotation(s) have a bbox with NaN or infinity",
            np.flatnonzero(four_numbers & np.isnan(boxes).any(axis=1)),
            label,
            "mend or remove them",
        ),
    ]


def found(
    outcome: str,
    what: str,
    where: Sequence[Item] | np.ndarray,
    label: Callable[[Item], str],
    advice: str = "",
) -> List[Finding]:
    """A list of one finding, or of none if ``where`` is empty. ``label`` names one of ``where``."""
    return [Finding(outcome, what, [label(item) for item in where], advice)] if len(where) else []
