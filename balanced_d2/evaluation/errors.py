"""Where AP is lost: how much each kind of error costs.

The kinds and their costs are defined by D. Bolya, S. Foley, J. Hays and J. Hoffman, "TIDE: A
General Toolbox for Identifying Object Detection Errors", ECCV 2020, sections 2.2 and 2.3
(https://arxiv.org/abs/2008.08115). Written from the paper.
"""

from typing import Collection, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from pycocotools import mask
from tqdm import tqdm

from balanced_d2.evaluation.matching import IOU, SIZES, Matching, match
from balanced_d2.evaluation.thresholds import ScoreCurve, score_curves

BACKGROUND_IOU = 0.1
"""A detection whose IoU with an object is below this has nothing to do with it: the paper's t_b."""

KINDS = {
    "classification": "right place, wrong class",
    "localisation": "right class, box too far off",
    "both": "wrong class, box too far off",
    "duplicate": "object found already",
    "background": "no object there",
    "missed": "object not found",
}
"""The kinds of errors, and what each means in a few words.

For a false positive, let IoU be its largest one with ground truth of the given class:

- localisation: 0.1 <= IoU < 0.5 with its own class;
- classification: 0.5 <= IoU with another class;
- duplicate: 0.5 <= IoU with its own class, where a better detection has found the object;
- background: IoU < 0.1 with every class;
- both: 0.1 <= IoU < 0.5 with another class.

The first kind that applies counts, in the order of the authors' program; the paper does not say.
A ground-truth box is missed if no detection has found it and no localisation or classification
error is about it.
"""

_NAMES = list(KINDS)
_TRUE_POSITIVE = -1
_MOVED = {"classification", "localisation"}


class ClassResult(NamedTuple):
    """AP of one class, or of all classes."""

    name: str
    ap: Dict[str, Optional[float]]
    """COCO's AP in percent by :data:`~balanced_d2.evaluation.matching.SIZES`, None where there is
    no ground truth."""
    num_boxes: Dict[str, int]
    """Number of ground-truth boxes, without crowds."""


class ErrorResult(NamedTuple):
    """The effect of one kind of error."""

    kind: str
    """One of :data:`KINDS`."""
    lost: float
    """How much higher AP50 would be without this kind alone, in percentage points. These do not
    add up to 100 - AP50: fixed together, kinds may count more or less than alone."""
    number: int
    """Number of detections with that error; for "missed", of ground-truth boxes."""


class Analysis(NamedTuple):
    """The result of :func:`analyze_errors`."""

    total: ClassResult
    classes: List[ClassResult]
    """By ascending category id."""
    ap50: float
    """AP at an IoU of 0.5, in percent."""
    errors: List[ErrorResult]
    """In the order of :data:`KINDS`."""
    threshold: float
    """Minimum score of the detections that were counted; AP uses all detections."""
    curves: List[ScoreCurve]
    """Precision and recall over the score, of each class and last of all."""


def analyze_errors(
    annotations: Dict, predictions: Sequence[Dict], threshold: float = 0.5
) -> Analysis:
    """Measure AP by class and size, and what each kind of error costs.

    As in COCO's AP, crowds are not ground truth, and detections on a crowd of their own class are
    not errors. A box without width or height is ground truth, although it cannot be found.

    Args:
        annotations, predictions: see :func:`balanced_d2.evaluation.matching.match`.
        threshold: minimum score of a detection to count as an error or as a match. It does not
            affect AP and what errors cost.

    Raises:
        UserError: if there is no ground truth.
    """
    matching = match(annotations, predictions)
    breakdown = Breakdown(matching)
    ap50, counts = breakdown.ap50(), breakdown.counts(threshold)
    return Analysis(
        # COCO's mean over the classes that have ground truth of the size.
        total=_class_result(
            "all classes",
            [_mean(ap) for ap in matching.ap.T],
            matching.num_boxes.sum(axis=0),
        ),
        classes=[
            _class_result(name, ap, num_boxes)
            for name, ap, num_boxes in zip(
                matching.classes, matching.ap, matching.num_boxes, strict=True
            )
        ],
        ap50=ap50,
        # Fixing errors never lowers AP, except by rounding.
        errors=[
            ErrorResult(kind, max(0.0, breakdown.ap50(fixed=[kind]) - ap50), counts[kind])
            for kind in KINDS
        ],
        threshold=threshold,
        curves=score_curves(matching),
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else np.nan


def _class_result(name: str, ap: Sequence[float], num_boxes: Sequence[int]) -> ClassResult:
    return ClassResult(
        name,
        {size: None if np.isnan(a) else float(a) for size, a in zip(SIZES, ap, strict=True)},
        {size: int(number) for size, number in zip(SIZES, num_boxes, strict=True)},
    )


class Breakdown:
    """The error of every detection, and AP50 without some kinds of errors.

    Attributes:
        kinds: int (D,), for every detection the index of its error in :data:`KINDS`, -1 for a
            true positive.
        about: int (D,), the ground truth that a true positive has found, or that a classification
            or localisation error is about; -1 for the others.
    """

    def __init__(self, matching: Matching):
        self._matching = matching
        own_iou, own, other_iou, other = _best_overlaps(matching)
        is_true = matching.matched >= 0
        self.kinds = np.select(
            [
                is_true,
                (own_iou >= BACKGROUND_IOU) & (own_iou < IOU),
                other_iou >= IOU,
                own_iou >= IOU,
                np.maximum(own_iou, other_iou) < BACKGROUND_IOU,
            ],
            [
                _TRUE_POSITIVE,
                *map(_NAMES.index, ("localisation", "classification", "duplicate", "background")),
            ],
            default=_NAMES.index("both"),
        )
        self.about = np.select(
            [is_true, self._is_of(["localisation"]), self._is_of(["classification"])],
            [matching.matched, own, other],
            default=-1,
        )

    def _is_of(self, kinds: Collection[str]) -> np.ndarray:
        return np.isin(self.kinds, [_NAMES.index(kind) for kind in kinds])

    def _is_missed(self, threshold: float = -np.inf) -> np.ndarray:
        about = self.about[self._matching.scores >= threshold]
        return ~np.isin(np.arange(len(self._matching.truth_classes)), about)

    def counts(self, threshold: float = -np.inf) -> Dict[str, int]:
        """The number of errors of each kind among detections with a score >= ``threshold``.

        Without the other detections, more is missed; the kinds of the rest do not change.
        """
        kinds = self.kinds[self._matching.scores >= threshold]
        counts = {kind: int((kinds == number).sum()) for number, kind in enumerate(KINDS)}
        return {**counts, "missed": int(self._is_missed(threshold).sum())}

    def ap50(self, fixed: Collection[str] = ()) -> float:
        """AP at an IoU of 0.5 in percent, after an oracle has fixed some kinds of errors.

        A classification error gets the class, and a localisation error the box, of the ground truth
        that it is about; if several detections then match the same box, the best is kept. Errors of
        the kinds both, duplicate and background are removed. Missed ground truth is removed too, so
        that recall refers to the rest. A class without any ground truth left has an AP of 100 if it
        has no detections, else 0.

        Args:
            fixed: some of :data:`KINDS`; all of them give 100.
        """
        matching = self._matching
        claims = np.where(
            (self.kinds == _TRUE_POSITIVE) | self._is_of(_MOVED & set(fixed)), self.about, -1
        )
        claiming = np.flatnonzero(claims >= 0)
        # The first is the best, because detections are sorted by score.
        _, first = np.unique(claims[claiming], return_index=True)
        is_true = np.zeros(len(claims), dtype=bool)
        is_true[claiming[first]] = True
        kept = is_true | ((claims < 0) & ~self._is_of(set(fixed) - _MOVED))
        class_of = np.where(is_true, matching.truth_classes[claims], matching.class_of)

        num_classes = len(matching.classes)
        truth_classes = matching.truth_classes
        has_truth = np.bincount(truth_classes, minlength=num_classes) > 0
        if "missed" in fixed:
            truth_classes = truth_classes[~self._is_missed()]
        num_truth = np.bincount(truth_classes, minlength=num_classes)
        is_true, class_of = is_true[kept], class_of[kept]
        ends = np.cumsum(np.bincount(class_of, minlength=num_classes))[:-1]
        by_class = np.split(is_true[np.argsort(class_of, kind="stable")], ends)
        return 100 * float(
            np.mean([_ap(by_class[k], num_truth[k]) for k in np.flatnonzero(has_truth)])
        )


def _ap(is_true: np.ndarray, num_truth: int) -> float:
    """COCO's AP, from 0 to 1: the mean of the precision at 101 recalls.

    Args:
        is_true: bool (N,), which detections of a class are true positives, best first.
        num_truth: number of ground-truth boxes of the class.
    """
    if num_truth == 0:
        return float(len(is_true) == 0)
    num_found = np.cumsum(is_true)
    precision = num_found / np.arange(1, len(is_true) + 1)
    # At each recall, the best precision at that recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(num_found / num_truth, np.linspace(0, 1, 101), side="left")
    return float(np.append(precision, 0)[at].mean())


def _best_overlaps(matching: Matching) -> tuple[np.ndarray, ...]:
    """The largest IoU of every false positive with ground truth of its own and of other classes.

    Returns:
        IoU (D,) and index of the ground truth (D,), for its own class and then for the others; 0
        and -1 where there is none, and for true positives.
    """
    num = len(matching.matched)
    ious, which = np.zeros((2, num)), np.full((2, num), -1)
    false = np.flatnonzero(matching.matched < 0)
    false_of = _by_image(false, matching.images[false])
    truth_of = _by_image(np.arange(len(matching.truth_images)), matching.truth_images)
    for image in tqdm(
        false_of.keys() & truth_of.keys(), desc="sorting errors", unit="image", disable=None
    ):
        of_image, truth = false_of[image], truth_of[image]
        no_crowd = np.zeros(len(truth), dtype=np.uint8)
        iou = mask.iou(matching.boxes[of_image], matching.truth_boxes[truth], no_crowd)
        is_own = matching.class_of[of_image][:, None] == matching.truth_classes[truth]
        for side, of_side in enumerate((iou * is_own, iou * ~is_own)):
            ious[side, of_image] = of_side.max(axis=1)
            which[side, of_image] = truth[of_side.argmax(axis=1)]
    return ious[0], which[0], ious[1], which[1]


def _by_image(items: np.ndarray, images: np.ndarray) -> Dict[int, np.ndarray]:
    order = np.argsort(images, kind="stable")
    numbers, starts = np.unique(images[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(items[order], starts[1:])))
