"""Balanced sampling of proposals (Libra R-CNN, section 3.1).

Both samplers put the candidates in groups, by IoU or by ground-truth instance, and take the same
number at random from each. What short groups cannot give is drawn at random from all candidates
not yet taken. Within a group every candidate is equally likely.
"""

from typing import Tuple

import torch

from balanced_d2.errors import UserError


def sample_random(candidates: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Indices of ``num_samples`` of the candidates, or of all if they are fewer.

    Draws just as Detectron2's ``subsample_labels`` does.
    """
    return torch.randperm(len(candidates), device=candidates.device)[:num_samples]


def sample_iou_balanced(
    ious: torch.Tensor,
    num_samples: int,
    num_bins: int = 3,
    iou_range: Tuple[float, float] = (0.0, 0.5),
) -> torch.Tensor:
    """Sample negatives evenly over bins of their IoU with the ground truth.

    Each bin gives ``num_samples // num_bins`` (at least 1) of its candidates, or all it has; the
    rest is drawn at random from all candidates not yet taken, those outside ``iou_range`` among
    them.

    Args:
        ious: shape (M,), the largest IoU of each candidate with any ground-truth box, in [0, 1].
        num_samples: how many to sample. With M of them or fewer, all are taken.
        num_bins: into how many bins of the same width ``iou_range`` is split.
        iou_range: lower bound (included) and upper bound (excluded) of the bins.

    Returns:
        LongTensor of shape (min(num_samples, M),): indices into ``ious``, without repeats, in
        random order, on the device of ``ious``.

    Raises:
        UserError: if ``num_bins`` is below 1, ``iou_range`` empty or ``num_samples`` negative.
    """
    return _sample_evenly(iou_bins(ious, num_bins, iou_range), num_samples)


def sample_instance_balanced(gt_indices: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Sample positives evenly over the ground-truth instances that they belong to.

    Each of the G instances that occur gives ``num_samples // G`` (at least 1) of its candidates,
    or all it has; the rest is drawn at random from all candidates not yet taken.

    Args:
        gt_indices: shape (M,), the index of the ground-truth instance of each candidate.
        num_samples: how many to sample. With M of them or fewer, all are taken.

    Returns:
        LongTensor of shape (min(num_samples, M),): indices into ``gt_indices``, without repeats,
        in random order, on its device.

    Raises:
        UserError: if ``num_samples`` is negative.
    """
    return _sample_evenly(gt_indices == torch.unique(gt_indices)[:, None], num_samples)


def iou_bins(ious: torch.Tensor, num_bins: int, iou_range: Tuple[float, float]) -> torch.Tensor:
    """Which candidate is in which bin.

    Args:
        ious, num_bins, iou_range: as for :func:`sample_iou_balanced`.

    Returns:
        BoolTensor of shape (num_bins, M). A candidate outside ``iou_range`` is in no bin.
    """
    check_bins(num_bins, iou_range)
    edges = torch.linspace(*iou_range, num_bins + 1, dtype=ious.dtype, device=ious.device)[:, None]
    return (ious >= edges[:-1]) & (ious < edges[1:])


def check_bins(num_bins: int, iou_range: Tuple[float, float]) -> None:
    """Raise :class:`UserError` if there is no such split of ``iou_range``."""
    if num_bins < 1:
        raise UserError(f"num_bins (MODEL.ROI_HEADS.NUM_BINS) is {num_bins}; at least 1 is needed")
    low, high = iou_range
    if not low < high:
        raise UserError(f"iou_range is {iou_range}; the lower bound has to be below the upper one")


def _sample_evenly(groups: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Sample candidates, the same number from each group.

    Args:
        groups: BoolTensor of shape (G, M), the members of each group. Groups do not overlap.
    """
    if num_samples < 0:
        raise UserError(f"num_samples is {num_samples}; it cannot be negative")
    num_groups, num_candidates = groups.shape
    shuffle = torch.randperm(num_candidates, device=groups.device)
    # The first of each group, in random order, are its share.
    quota = max(1, num_samples // max(1, num_groups))
    shuffled = groups[:, shuffle]
    in_share = torch.empty_like(shuffle, dtype=torch.bool)
    in_share[shuffle] = (shuffled & (shuffled.cumsum(dim=1) <= quota)).any(dim=0)
    # The rest fill up in an order of their own: in the first one, those left of a group come the
    # later the larger its share was. A stable sort needs no host synchronisation, as a mask would.
    shuffle = torch.randperm(num_candidates, device=groups.device)
    shares_first = torch.argsort(~in_share[shuffle], stable=True)
    return shuffle[shares_first[:num_samples]]
