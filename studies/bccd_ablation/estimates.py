"""Means over seeds and paired differences, with Student's confidence intervals."""

from typing import Dict, NamedTuple, Optional, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its confidence interval (NaN for a single seed)."""

    mean: float
    margin: float

    def __str__(self) -> str:
        if np.isnan(self.mean):  # no such objects in the data
            return "–"
        if np.isnan(self.margin):
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {self.margin:.1f}"


class Difference(NamedTuple):
    """The mean of differences paired by seed, with its margin and p-value."""

    mean: float
    margin: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.margin:.1f} (p = {self.p:.3f})"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, and its margin by Student's t-distribution."""
    number = len(values)
    if number < 2:
        return Estimate(float(np.mean(values)), float("nan"))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1)
    return Estimate(
        float(np.mean(values)), float(quantile * np.std(values, ddof=1) / np.sqrt(number))
    )


def difference(row: Dict[int, float], other: Dict[int, float]) -> Optional[Difference]:
    """The gain of a row over another; None if they have fewer than two seeds in common or there are
    no such objects."""
    seeds = sorted(row.keys() & other.keys())
    differences = [row[seed] - other[seed] for seed in seeds]
    if len(seeds) < 2 or np.isnan(differences).any():
        return None
    p = 1.0 if not any(differences) else stats.ttest_1samp(differences, 0).pvalue
    return Difference(*estimate(differences), float(p))
