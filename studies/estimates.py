"""Means over seeds and paired differences, with Student's confidence intervals."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8

Values = Dict[Any, float]
"""A metric of each run, by its seed or by what else says which runs of two rows are a pair."""


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
    """The mean of differences paired by seed, its margin and its p-value (NaN for one pair)."""

    mean: float
    margin: float
    p: float

    def __str__(self) -> str:
        if np.isnan(self.p):
            return f"{self.mean:+.1f}"
        p = p_as_text(self.p)
        return f"{self.mean:+.1f} ± {self.margin:.1f} (p {p if p[0] == '<' else f'= {p}'})"


def p_as_text(p: float) -> str:
    """To three digits; no p-value is 0."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean, and its margin by Student's t-distribution."""
    number = len(values)
    if number < 2:
        return Estimate(float(np.mean(values)), float("nan"))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1)
    return Estimate(
        float(np.mean(values)), float(quantile * np.std(values, ddof=1) / np.sqrt(number))
    )


def difference(row: Values, other: Values) -> Optional[Difference]:
    """The gain of a row over another; None if they have no seed in common or there are no such
    objects."""
    differences = paired(row, other)
    if not differences or np.isnan(differences).any():
        return None
    if len(differences) < 2:
        p = float("nan")
    elif np.ptp(differences) == 0:
        p = float(not any(differences))
    else:
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    return Difference(*estimate(differences), p)


def paired(row: Values, other: Values) -> List[float]:
    """The differences of a row from another, of the runs that are a pair."""
    return [row[key] - other[key] for key in row if key in other]


def holm(p_values: Sequence[float]) -> List[float]:
    """P-values corrected for their number (Holm, 1979): the probability that any of so many
    comparisons without a difference gives a p-value below 0.05 is 0.05 at most."""
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def effect_size(row: Values, other: Values) -> float:
    """The mean of the differences paired by seed, in their standard deviations (Cohen's d_z)."""
    differences = paired(row, other)
    deviation = np.std(differences, ddof=1) if len(differences) > 1 else 0.0
    return float(np.mean(differences) / deviation) if deviation > 0 else float("nan")


def detectable(row: Values, other: Values) -> float:
    """The true difference that the two-sided paired t-test at 0.05, not corrected, finds four times
    in five, with as many seeds as there are, and differences that vary as these do."""
    differences = paired(row, other)
    number = len(differences)
    if number < 2:
        return float("nan")
    # The square of a t-statistic is an F-statistic, and its shift a non-centrality.
    quantile = stats.f.ppf(CONFIDENCE, 1, number - 1)
    high = 1.0
    while stats.ncf.sf(quantile, 1, number - 1, high) < POWER:
        high *= 2
    noncentrality = optimize.brentq(
        lambda value: stats.ncf.sf(quantile, 1, number - 1, value) - POWER, 0.0, high
    )
    shift = np.sqrt(noncentrality)
    return float(shift * np.std(differences, ddof=1) / np.sqrt(number))
