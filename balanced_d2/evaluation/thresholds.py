"""Precision and recall over the minimum score of a detection, and which score to choose."""

from typing import List, NamedTuple, Optional

import numpy as np

from balanced_d2.evaluation.matching import Matching


class ScoreCurve(NamedTuple):
    """Precision and recall of the detections that have at least a score, at an IoU of 0.5."""

    name: str
    """Name of the class, or "all classes"."""
    num_truth: int
    """Number of ground-truth boxes."""
    scores: np.ndarray
    """Float (T,), the scores that occur, descending."""
    precision: np.ndarray
    """Float (T,), from 0 to 1."""
    recall: np.ndarray
    """Float (T,), from 0 to 1; 0 without ground truth."""

    @property
    def f1(self) -> np.ndarray:
        """Float (T,), the harmonic mean of both, 0 where both are 0."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / np.where(both > 0, both, 1)

    @property
    def best(self) -> Optional[int]:
        """The index of the largest F1, with the higher score where two are equal; None if there is
        no ground truth or none of it is found."""
        return int(self.f1.argmax()) if self.f1.any() else None


def score_curves(matching: Matching) -> List[ScoreCurve]:
    """The curve of every class, and last that of all detections together.

    A detection of a high score takes its ground truth before one of a low score, so what matches at
    a threshold does not depend on the detections below it.
    """
    everything = np.ones(len(matching.scores), dtype=bool)
    return [
        *(
            _curve(name, matching, matching.class_of == k, int((matching.truth_classes == k).sum()))
            for k, name in enumerate(matching.classes)
        ),
        _curve("all classes", matching, everything, len(matching.truth_classes)),
    ]


def _curve(name: str, matching: Matching, chosen: np.ndarray, num_truth: int) -> ScoreCurve:
    scores, is_true = matching.scores[chosen], matching.matched[chosen] >= 0
    # Detections of the same score are above a threshold together.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
    found = np.cumsum(is_true)[last]
    return ScoreCurve(name, num_truth, scores[last], found / (last + 1), found / max(num_truth, 1))
