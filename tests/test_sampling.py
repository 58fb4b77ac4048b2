"""Balanced samplers: exact counts, and statistics with bounds that a biased sampler fails."""

import math

import pytest
import torch

from balanced_d2.layers import sample_instance_balanced, sample_iou_balanced, sampling
from balanced_d2.utils.errors import UserError


@pytest.fixture(autouse=True, params=["on the CPU", "on other devices"])
def both_forms(request, monkeypatch):
    """Run every test on the form for other devices too, which also works on the CPU."""
    if request.param == "on other devices":
        monkeypatch.setattr(sampling, "_sample_with_numpy", sampling._sample_without_waiting)


def ious_in_bins(*counts, low=0.0, high=0.5):
    """Shuffled IoUs, with the given number in each bin."""
    width = (high - low) / len(counts)
    values = [low + (k + torch.rand(n)) * width for k, n in enumerate(counts)]
    # Away from the edges, where rounding decides.
    values = torch.cat(values).clamp(low, high - 1e-4)
    return values[torch.randperm(len(values))]


def bin_counts(ious, indices, num_bins=3, low=0.0, high=0.5):
    counts = [0] * num_bins
    for value in ious[indices].tolist():
        counts[int((value - low) / (high - low) * num_bins)] += 1
    return counts


def assert_valid(indices, num_expected, num_candidates):
    assert indices.dtype == torch.long and indices.shape == (num_expected,)
    assert len(set(indices.tolist())) == num_expected
    assert all(0 <= i < num_candidates for i in indices.tolist())


@pytest.mark.parametrize("num_samples, num_bins", [(96, 3), (100, 4), (7, 7), (384, 1)])
def test_full_bins_give_equal_quotas(num_samples, num_bins):
    ious = ious_in_bins(*[500] * num_bins)
    indices = sample_iou_balanced(ious, num_samples, num_bins)
    assert_valid(indices, num_samples, len(ious))
    assert bin_counts(ious, indices, num_bins) == [num_samples // num_bins] * num_bins


def test_remainder_goes_to_any_bin():
    ious = ious_in_bins(300, 300, 300)
    for _ in range(20):
        counts = bin_counts(ious, sample_iou_balanced(ious, 98))
        assert sum(counts) == 98 and min(counts) >= 32


def test_a_short_bin_is_taken_whole_and_the_rest_drawn_from_all_bins():
    ious = ious_in_bins(1000, 500, 10)
    totals = [0, 0, 0]
    repetitions = 200
    for _ in range(repetitions):
        indices = sample_iou_balanced(ious, 300)
        assert_valid(indices, 300, len(ious))
        counts = bin_counts(ious, indices)
        assert counts[2] == 10 and counts[0] >= 100 and counts[1] >= 100
        totals = [total + count for total, count in zip(totals, counts)]
    # 90 more, hypergeometric from 900 + 400 not taken: 62.3 on average, variance 17.8.
    extra = totals[0] / repetitions - 100
    assert extra == pytest.approx(90 * 900 / 1300, abs=5 * math.sqrt(17.8 / repetitions))


@pytest.mark.parametrize("num_candidates", [0, 1, 5, 64])
def test_few_candidates_are_all_taken(num_candidates):
    ious = torch.rand(num_candidates) * 0.5
    indices = sample_iou_balanced(ious, 64)
    assert sorted(indices.tolist()) == list(range(num_candidates))
    groups = torch.randint(3, (num_candidates,))
    assert sorted(sample_instance_balanced(groups, 64).tolist()) == list(range(num_candidates))


def test_every_candidate_of_a_bin_is_equally_likely():
    # A full bin, a short one, and another full one; the rest is drawn from the full ones.
    ious = torch.cat([torch.full((60,), 0.05), torch.full((5,), 0.2), torch.full((30,), 0.4)])
    repetitions = 4000
    times = torch.zeros(len(ious))
    for _ in range(repetitions):
        times[sample_iou_balanced(ious, 45)] += 1
    share = times / repetitions
    assert (share[60:65] == 1).all()
    for members, quota in ((slice(0, 60), 15), (slice(65, 95), 15)):
        n = len(share[members])
        # 15 by quota, and 10 from the 45 and 15 that are left.
        expected = (quota + 10 * (n - quota) / 60) / n
        sigma = math.sqrt(expected * (1 - expected) / repetitions)
        assert share[members].mean().item() == pytest.approx(expected, abs=5 * sigma)
        assert (share[members] - expected).abs().max() < 5 * sigma


def test_all_ious_zero():
    assert_valid(sample_iou_balanced(torch.zeros(1000), 384), 384, 1000)


def test_bins_span_the_given_range():
    """The share of hard negatives does not depend on IoUs above the range."""
    low, high = 0.1, 0.6
    ious = torch.cat([ious_in_bins(100, 100, low=low, high=high), torch.tensor([0.05, 0.9, 1.0])])
    indices = sample_iou_balanced(ious, 100, num_bins=2, iou_range=(low, high))
    assert bin_counts(ious, indices, 2, low, high) == [50, 50]


def test_candidates_outside_the_range_only_fill_up():
    ious = torch.cat([torch.full((10,), 0.1), torch.full((90,), 0.7)])
    indices = sample_iou_balanced(ious, 60)
    assert_valid(indices, 60, 100)
    assert set(range(10)) <= set(indices.tolist())


def test_bin_edges_belong_to_the_bin_above():
    ious = torch.tensor([0.0, 0.25, 0.25, 0.25])
    for _ in range(20):
        assert 0 in sample_iou_balanced(ious, 2, num_bins=2)


def test_fewer_samples_than_bins():
    ious = ious_in_bins(50, 50, 50)
    for _ in range(20):
        assert max(bin_counts(ious, sample_iou_balanced(ious, 2))) == 1
    assert sample_iou_balanced(ious, 0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    assert_valid(sample_iou_balanced(ious_in_bins(50, 50, 50).to(dtype), 30), 30, 150)


def test_ious_with_a_gradient():
    """As of boxes that a network has just predicted."""
    ious = ious_in_bins(50, 50, 50).requires_grad_()
    indices = sample_iou_balanced(ious, 30)
    assert_valid(indices, 30, 150)
    assert bin_counts(ious.detach(), indices) == [10, 10, 10]


def test_instances_get_equal_quotas():
    groups = torch.tensor([0] * 40 + [3] * 20 + [7] * 12)[torch.randperm(72)]
    indices = sample_instance_balanced(groups, 36)
    assert_valid(indices, 36, 72)
    assert sorted(groups[indices].tolist()) == [0] * 12 + [3] * 12 + [7] * 12


def test_a_short_instance_is_taken_whole_and_no_positive_is_lost():
    groups = torch.tensor([0] * 100 + [1] * 3 + [2] * 50)
    totals = torch.zeros(3)
    repetitions = 300
    for _ in range(repetitions):
        indices = sample_instance_balanced(groups, 60)
        assert_valid(indices, 60, 153)
        counts = torch.bincount(groups[indices])
        assert counts[1] == 3 and counts[0] >= 20 and counts[2] >= 20
        totals += counts
    # 17 more from the 80 and 30 that are left: hypergeometric, variance 2.88.
    extra = totals[0].item() / repetitions - 20
    assert extra == pytest.approx(17 * 80 / 110, abs=5 * math.sqrt(2.88 / repetitions))


def test_more_instances_than_samples():
    groups = torch.arange(50).repeat_interleave(3)
    indices = sample_instance_balanced(groups, 20)
    assert_valid(indices, 20, 150)
    assert len(set(groups[indices].tolist())) == 20


def test_more_instances_than_samples_are_chosen_at_random():
    """Large ones are not preferred."""
    groups = torch.arange(20).repeat_interleave(torch.tensor([40] * 10 + [2] * 10))
    repetitions = 1000
    times = torch.zeros(20)
    for _ in range(repetitions):
        times[groups[sample_instance_balanced(groups, 10)]] += 1
    sigma = math.sqrt(0.25 / repetitions)
    assert (times / repetitions - 0.5).abs().max() < 5 * sigma


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: sample_iou_balanced(v, 2, num_bins=0), "NUM_BINS"),
        (lambda v: sample_iou_balanced(v, 2, iou_range=(0.5, 0.5)), "iou_range"),
        (lambda v: sample_iou_balanced(v, -1), "num_samples"),
        (lambda v: sample_instance_balanced(v.long(), -1), "num_samples"),
        (lambda v: sample_iou_balanced(v[:, None], 2), r"\(5, 1\), but need a single dimension"),
        (lambda v: sample_instance_balanced(v[None].long(), 9), "give the largest"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.rand(5))
