"""What follows from how many objects of each class the training data have."""

import math
from typing import Sequence

import numpy as np
import torch

from balanced_d2.utils.errors import UserError

GROUPS = ("rare", "common", "frequent")
"""The names of the groups that :func:`class_groups` numbers."""


def class_groups(counts: Sequence[int]) -> np.ndarray:
    """Divide classes into rare, common and frequent ones: the terciles of their counts.

    Args:
        counts: the number of training objects of each of K classes.

    Returns:
        Int (K,): the index in :data:`GROUPS`, or -1 for classes without an object. The groups have
        the same number of classes, or differ by one; of classes with equal counts the first is
        taken for rarer. Everything is -1 if fewer than three classes have objects.
    """
    numbers = np.asarray(counts, dtype=np.int64).reshape(-1)
    groups = np.full(len(numbers), -1)
    present = np.flatnonzero(numbers > 0)
    if len(present) >= len(GROUPS):
        order = present[np.argsort(numbers[present], kind="stable")]
        for group, members in enumerate(np.array_split(order, len(GROUPS))):
            groups[members] = group
    return groups


def weights_of_counts(counts: Sequence[int], beta: float) -> torch.Tensor:
    """Weights of classes by the effective number of their objects (Cui et al., CVPR 2019).

    A class of n objects weighs ``(1 - beta) / (1 - beta**n)`` (equation 3 of the paper): for
    ``beta`` 0 all classes weigh the same, and towards 1 it becomes the inverse frequency, 1 / n,
    which is taken at 1.

    The weights are then scaled so that those of all objects have the mean 1. The paper scales
    the sum over classes to K instead; but where there is a background, whose weight is 1, that
    would make the objects of data with a long tail, nearly all of frequent classes, weigh little
    against it.

    Args:
        counts: the number of training objects of each of K classes; of none counts as of one.
        beta: in [0, 1].

    Returns:
        Float64 (K,), on the CPU.

    Raises:
        UserError: if ``beta`` is out of range.
    """
    if not 0 <= beta <= 1:
        raise UserError(
            f"beta of the effective number (MODEL.ROI_BOX_HEAD.CLASS_WEIGHT_BETA) is {beta}; it "
            "has to be from 0 (equal weights) to 1 (inverse frequency)"
        )
    numbers = torch.as_tensor(counts, dtype=torch.float64, device="cpu").clamp(min=1)
    if beta == 1:
        weights = 1 / numbers
    elif beta == 0:
        weights = torch.ones_like(numbers)
    else:
        weights = (1 - beta) / -torch.expm1(numbers * math.log(beta))
    return weights * numbers.sum() / (weights * numbers).sum()
