"""Balanced sampling of proposals (Libra R-CNN, section 3.1).

Both samplers put the candidates in groups, by IoU or by ground-truth instance, and take the same
number at random from each. What short groups cannot give is drawn at random from all candidates
not yet taken. Within a group every candidate is equally likely.
"""

from typing import Any, Callable, Dict, Tuple

import numpy as np
import torch

from balanced_d2.utils.errors import UserError
from balanced_d2.utils.registry import Registry

Sampler = Callable[[torch.Tensor, int], torch.Tensor]
"""What each of M candidates has, (M,), and the number wanted, to the indices of those sampled."""

NEGATIVE_SAMPLERS = Registry("NEGATIVE_SAMPLERS", "MODEL.ROI_HEADS.NEGATIVE_SAMPLER")
"""They are given the largest IoU of each candidate with any ground-truth box."""
POSITIVE_SAMPLERS = Registry("POSITIVE_SAMPLERS", "MODEL.ROI_HEADS.POSITIVE_SAMPLER")
"""They are given the index of the ground-truth instance of each candidate."""


@NEGATIVE_SAMPLERS.register(name="random")
@POSITIVE_SAMPLERS.register(name="random")
def sample_random(candidates: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Indices of ``num_samples`` of the candidates, or of all if they are fewer.

    Draws just as Detectron2's ``subsample_labels`` does.
    """
    return torch.randperm(len(candidates), device=candidates.device)[:num_samples]


def sample_evenly(groups: torch.Tensor, num_groups: int, num_samples: int) -> torch.Tensor:
    """Sample candidates evenly over groups.

    Each group gives ``num_samples // num_groups`` (at least 1) of its candidates, or all it has;
    the rest is drawn at random from all candidates not yet taken.

    Args:
        groups: shape (M,), the number of each candidate's group; others than 0 to
            ``num_groups - 1`` are in none.
        num_groups: how many groups there are.
        num_samples: how many to sample. With M of them or fewer, all are taken.

    Returns:
        LongTensor of shape (min(num_samples, M),): indices into ``groups``, without repeats, in no
        particular order, on the device of ``groups``.

    Raises:
        UserError: if ``num_samples`` is negative, or ``groups`` has another number of dimensions.
    """
    if groups.dim() != 1:
        raise UserError(
            f"the candidates have the shape {tuple(groups.shape)}, but need a single dimension: of "
            "IoUs with several boxes, give the largest of each candidate"
        )
    if num_samples < 0:
        raise UserError(f"num_samples is {num_samples}; it cannot be negative")
    if len(groups) <= num_samples:
        return torch.arange(len(groups), device=groups.device)
    quota = max(1, num_samples // num_groups)
    sample = _sample_with_numpy if groups.device.type == "cpu" else _sample_without_waiting
    return sample(groups, num_groups, num_samples, quota)


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
        LongTensor of shape (min(num_samples, M),): indices into ``ious``, without repeats, in no
        particular order, on the device of ``ious``.

    Raises:
        UserError: if ``num_bins`` is below 1, ``iou_range`` empty or ``num_samples`` negative.
    """
    return sample_evenly(iou_bins(ious, num_bins, iou_range), num_bins, num_samples)


@NEGATIVE_SAMPLERS.register(name="iou_balanced")
class IoUBalancedSampler:
    """:func:`sample_iou_balanced` with its parameters, for negatives.

    Args:
        num_bins, iou_range: as for :func:`sample_iou_balanced`, with its errors.
    """

    def __init__(self, num_bins: int = 3, iou_range: Tuple[float, float] = (0.0, 0.5)):
        check_bins(num_bins, iou_range)
        self.num_bins, self.iou_range = num_bins, iou_range

    @classmethod
    def from_config(cls, node: Any, iou_range: Tuple[float, float]) -> Dict[str, Any]:
        """
        Args:
            node: ``MODEL.ROI_HEADS``.
            iou_range: the IoU that the proposal matcher calls negative.
        """
        return {"num_bins": node.NUM_BINS, "iou_range": iou_range}

    def __call__(self, ious: torch.Tensor, num_samples: int) -> torch.Tensor:
        return sample_iou_balanced(ious, num_samples, self.num_bins, self.iou_range)


@POSITIVE_SAMPLERS.register(name="instance_balanced")
def sample_instance_balanced(gt_indices: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Sample positives evenly over the ground-truth instances that they belong to.

    Each of the G instances that occur gives ``num_samples // G`` (at least 1) of its candidates,
    or all it has; the rest is drawn at random from all candidates not yet taken.

    Args:
        gt_indices: shape (M,), the index of the ground-truth instance of each candidate.
        num_samples: how many to sample. With M of them or fewer, all are taken.

    Returns:
        LongTensor of shape (min(num_samples, M),): indices into ``gt_indices``, without repeats,
        in no particular order, on its device.

    Raises:
        UserError: if ``num_samples`` is negative.
    """
    instances, groups = torch.unique(gt_indices, return_inverse=True)
    return sample_evenly(groups, len(instances), num_samples)


def iou_bins(ious: torch.Tensor, num_bins: int, iou_range: Tuple[float, float]) -> torch.Tensor:
    """The number of each candidate's bin.

    Args:
        ious, num_bins, iou_range: as for :func:`sample_iou_balanced`.

    Returns:
        Tensor of shape (M,), of the dtype of ``ious``: the number of the bin, from 0 on. Candidates
        outside ``iou_range`` have a number below 0, or ``num_bins`` and above.
    """
    check_bins(num_bins, iou_range)
    low, high = iou_range
    return (ious - low).mul_(num_bins / (high - low)).floor_()


def members(groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Which candidate is in which group.

    Args:
        groups: shape (M,), the number of each candidate's group.

    Returns:
        BoolTensor of shape (num_groups, M).
    """
    numbers = torch.arange(num_groups, dtype=groups.dtype, device=groups.device)
    return groups == numbers[:, None]


def check_bins(num_bins: int, iou_range: Tuple[float, float]) -> None:
    """Raise :class:`UserError` if there is no such split of ``iou_range``."""
    if num_bins < 1:
        raise UserError(f"num_bins (MODEL.ROI_HEADS.NUM_BINS) is {num_bins}; at least 1 is needed")
    low, high = iou_range
    if not low < high:
        raise UserError(f"iou_range is {iou_range}; the lower bound has to be below the upper one")


def _sample_with_numpy(
    groups: torch.Tensor, num_groups: int, num_samples: int, quota: int
) -> torch.Tensor:
    """For the CPU, where a PyTorch operation on so few values takes longer to start than to run."""
    shuffle = torch.randperm(len(groups)).numpy()
    # Numbers that are no group's become -1 and num_groups.
    group = groups.detach().float().numpy().clip(-1, num_groups).astype(np.int16)[shuffle]
    order = group.argsort(kind="stable")
    by_group = shuffle[order]  # in random order within each
    begins = group[order].searchsorted(np.arange(num_groups + 1, dtype=np.int16)).tolist()
    # The first of each group are its share.
    cuts = [min(begin + quota, end) for begin, end in zip(begins, begins[1:])]
    shares = np.concatenate([by_group[begin:cut] for begin, cut in zip(begins, cuts)])
    if len(shares) >= num_samples:
        return torch.from_numpy(_draw(shares, num_samples))
    rest = np.concatenate(
        [by_group[cut:begin] for cut, begin in zip([0, *cuts, begins[-1]], [*begins, None])]
    )
    rest = _draw(rest, num_samples - len(shares))
    return torch.from_numpy(np.concatenate([shares, rest]))


def _draw(values: np.ndarray, number: int) -> np.ndarray:
    return values[torch.randperm(len(values)).numpy()[:number]]


def _sample_without_waiting(
    groups: torch.Tensor, num_groups: int, num_samples: int, quota: int
) -> torch.Tensor:
    """For other devices: the same with sizes known beforehand, so that the host need not wait."""
    shuffle = torch.randperm(len(groups), device=groups.device)
    is_member = members(groups[shuffle], num_groups)
    in_share = is_member.cumsum(dim=1).le(quota).logical_and_(is_member)
    # The rest fill up in a random order of their own: in the first one, those left of a group come
    # the later the larger its share was.
    order = torch.rand(len(groups), device=groups.device)
    order -= in_share.view(torch.uint8).amax(dim=0)  # shares first
    return shuffle[order.topk(num_samples, largest=False, sorted=False).indices]
