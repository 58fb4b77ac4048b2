"""Balanced L1 against the method's two-branch formula in plain float64."""

import math

import numpy as np
import pytest
import torch
from fvcore.nn import smooth_l1_loss

from balanced_d2.modeling import balanced_l1_loss
from balanced_d2.utils.errors import UserError

SETTINGS = [(0.5, 1.5, 1.0), (0.5, 1.5, 0.11), (0.3, 1.0, 2.5), (1.0, 0.7, 1.0)]


def reference(x, alpha, gamma, beta):
    """Value and gradient at the difference ``x``."""
    b = math.e ** (gamma / alpha) - 1
    size, sign = abs(x), math.copysign(1, x)
    if size < beta:
        value = alpha / b * (b * size + beta) * math.log(b * size / beta + 1) - alpha * size
        return value, sign * alpha * math.log(b * size / beta + 1)
    return gamma * size + gamma * beta / b - alpha * beta, sign * gamma


@pytest.mark.parametrize("setting", SETTINGS)
def test_value_and_gradient(setting):
    differences = np.concatenate([np.linspace(-4, 4, 401), [1e-9, 1e4, -1e4, setting[2]]])
    target = torch.randn(len(differences), dtype=torch.float64)
    input = (target + torch.from_numpy(differences)).requires_grad_()
    loss = balanced_l1_loss(input, target, *setting)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    for got, slope, difference in zip(loss.tolist(), gradient.tolist(), differences):
        value, derivative = reference(difference, *setting)
        assert got == pytest.approx(value, rel=1e-9, abs=1e-12)
        if difference != 0:
            assert slope == pytest.approx(derivative, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradcheck(setting):
    # Away from 0 and beta, where the second derivative jumps.
    target = torch.zeros(6, dtype=torch.float64)
    input = torch.tensor([-3.1, -0.7, -0.05, 0.02, 0.4, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: balanced_l1_loss(x, target, *setting), input.requires_grad_()
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_continuous_at_beta(setting):
    beta, step = setting[2], 1e-7
    input = torch.tensor([beta - step, beta, beta + step], dtype=torch.float64).requires_grad_()
    loss = balanced_l1_loss(input, torch.zeros_like(input), *setting)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert loss.max() - loss.min() < 1e-6
    torch.testing.assert_close(gradient, torch.full_like(gradient, setting[1]), rtol=1e-5, atol=0)


def test_published_shape_at_default_settings():
    """At 1 the loss is gamma + gamma / b - alpha = 1.0786 and the gradient 1.5; 0 at 0."""
    loss = balanced_l1_loss(torch.tensor([0.0, 1.0]), torch.zeros(2))
    assert loss.tolist() == pytest.approx([0.0, 1.5 + 1.5 / (math.e**3 - 1) - 0.5])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (0,)])
def test_reductions_follow_fvcore(reduction, shape):
    input = torch.randn(shape, requires_grad=True)
    target = torch.randn(shape)
    loss = balanced_l1_loss(input, target, reduction=reduction)
    assert loss.shape == smooth_l1_loss(input, target, 1.0, reduction=reduction).shape
    assert torch.isfinite(loss).all()
    each = balanced_l1_loss(input, target)
    if reduction != "none" and input.numel() > 0:
        torch.testing.assert_close(loss, getattr(each, reduction)())
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert gradient.shape == input.shape and torch.isfinite(gradient).all()


def test_far_outliers_stay_finite_in_half_precision():
    input = torch.tensor([3e4, -3e4], dtype=torch.bfloat16, requires_grad=True)
    loss = balanced_l1_loss(input, torch.zeros_like(input))
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert torch.isfinite(loss).all()
    assert gradient.tolist() == [1.5, -1.5]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"alpha": 0.0}, "BALANCED_L1_ALPHA"),
        ({"gamma": -1.0}, "BALANCED_L1_GAMMA"),
        ({"beta": float("nan")}, "BALANCED_L1_BETA"),
        ({"alpha": 0.001}, "gamma / alpha"),
        ({"reduction": "average"}, "average"),
    ],
)
def test_wrong_arguments(setting, message):
    with pytest.raises(UserError, match=message):
        balanced_l1_loss(torch.zeros(1), torch.zeros(1), **setting)
