"""Properties of sampler, balancer and loss, on thousands of random and degenerate inputs.

``HYPOTHESIS_EXAMPLES`` sets the number for each; `make soak` takes many more.
"""

import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from balanced_d2.layers.feature_balancer import REFINEMENTS
from balanced_d2.layers.sampling import _sample_without_waiting, iou_bins
from balanced_d2.modeling import (
    FeatureBalancer,
    balanced_l1_loss,
    sample_evenly,
    sample_instance_balanced,
    sample_iou_balanced,
)

examples = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "300")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ious = hnp.arrays(
    np.float32,
    st.integers(0, 300),
    elements=st.one_of(
        st.floats(0, 1, width=32), st.sampled_from([0.0, 0.1666667, 0.25, 0.5, 1.0]).map(np.float32)
    ),
)


def assert_balanced(groups, num_groups, num_samples, chosen):
    """As many as requested, without repeats, and from each group its share or all it has."""
    assert chosen.dtype == torch.long
    assert len(chosen) == len(set(chosen.tolist())) == min(num_samples, len(groups))
    assert set(chosen.tolist()) <= set(range(len(groups)))
    share = num_samples // num_groups
    for k in range(num_groups):
        available = int((groups == k).sum())
        assert int((groups[chosen] == k).sum()) >= min(share, available)


@examples
@given(ious, st.integers(0, 400), st.integers(1, 8), st.floats(0, 0.4), st.floats(0.45, 1))
def test_iou_balanced_sampling(values, num_samples, num_bins, low, high):
    values = torch.from_numpy(values)
    chosen = sample_iou_balanced(values, num_samples, num_bins, (low, high))
    groups = iou_bins(values, num_bins, (low, high))
    assert_balanced(groups, num_bins, num_samples, chosen)


@examples
@given(
    hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(-1, 12)),
    st.integers(1, 12),
    st.data(),
)
def test_sampling_on_other_devices(groups, num_groups, data):
    groups = torch.from_numpy(groups)
    num_samples = data.draw(st.integers(0, len(groups) - 1))
    quota = max(1, num_samples // num_groups)
    chosen = _sample_without_waiting(groups, num_groups, num_samples, quota)
    assert_balanced(groups, num_groups, num_samples, chosen)
    assert_balanced(groups, num_groups, num_samples, sample_evenly(groups, num_groups, num_samples))


@examples
@given(hnp.arrays(np.int64, st.integers(0, 300), elements=st.integers(0, 40)), st.integers(0, 400))
def test_instance_balanced_sampling(instances, num_samples):
    instances = torch.from_numpy(instances)
    chosen = sample_instance_balanced(instances, num_samples)
    occurring, groups = torch.unique(instances, return_inverse=True)
    assert_balanced(groups, max(1, len(occurring)), num_samples, chosen)


sizes = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=5)


@examples
@given(
    sizes,
    st.data(),
    st.sampled_from(REFINEMENTS.names()),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 3),
    st.floats(0, 1e4),
)
def test_balancer(level_sizes, data, refine_type, dtype, batch, scale):
    """Any sizes and huge values: shapes do not change, and finite values stay finite."""
    refine_level = data.draw(st.integers(0, len(level_sizes) - 1))
    balancer = FeatureBalancer(3, refine_level, refine_type).to(dtype)
    levels = [
        (scale * torch.randn(batch, 3, *size)).to(dtype).requires_grad_() for size in level_sizes
    ]
    balanced = balancer(levels)
    assert [x.shape for x in balanced] == [x.shape for x in levels]
    assert all(torch.isfinite(x).all() for x in balanced)
    sum(x.float().sum() for x in balanced).backward()
    assert all(torch.isfinite(x.grad).all() for x in levels)


numbers = st.floats(-(2.0**99), 2.0**99, width=32)


@examples
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, min_side=0, max_side=9), elements=numbers),
    st.data(),
    st.floats(0.05, 10),
    st.floats(0.05, 10),
    st.floats(1e-3, 10),
)
def test_balanced_l1(values, data, alpha, steepness, beta):
    """Never negative, 0 only at 0, symmetric, finite, with a gradient bounded by gamma."""
    gamma = alpha * steepness
    target = data.draw(hnp.arrays(np.float32, values.shape, elements=numbers))
    input = torch.from_numpy(values).requires_grad_()
    target = torch.from_numpy(target)
    loss = balanced_l1_loss(input, target, alpha, gamma, beta)
    assert loss.shape == input.shape and torch.isfinite(loss).all()
    assert (loss >= -1e-6).all()
    assert (loss[input == target] == 0).all()
    torch.testing.assert_close(balanced_l1_loss(target, input, alpha, gamma, beta), loss)
    loss.sum().backward()
    assert torch.isfinite(input.grad).all()
    assert (input.grad.abs() <= gamma * (1 + 1e-4)).all()
    for reduction in ("mean", "sum"):
        total = balanced_l1_loss(input.double(), target.double(), alpha, gamma, beta, reduction)
        assert torch.isfinite(total)
