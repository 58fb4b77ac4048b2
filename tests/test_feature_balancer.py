"""Feature balancing against plain loops in float64, written from the method's description."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from balanced_d2.layers.feature_balancer import REFINEMENTS
from balanced_d2.modeling import FeatureBalancer, NonLocal2d
from balanced_d2.utils.errors import UserError


def max_pool_loops(x, size):
    """Adaptive max pooling of (C, H, W): each output looks at all inputs it overlaps."""
    channels, height, width = x.shape
    out = np.empty((channels, *size))
    for c in range(channels):
        for i in range(size[0]):
            for j in range(size[1]):
                rows = range(i * height // size[0], math.ceil((i + 1) * height / size[0]))
                columns = range(j * width // size[1], math.ceil((j + 1) * width / size[1]))
                out[c, i, j] = max(x[c, row, column] for row in rows for column in columns)
    return out


def nearest_loops(x, size):
    channels, height, width = x.shape
    out = np.empty((channels, *size))
    for c in range(channels):
        for i in range(size[0]):
            for j in range(size[1]):
                out[c, i, j] = x[c, i * height // size[0], j * width // size[1]]
    return out


def conv_loops(x, weight, bias):
    """Convolution with a square kernel of odd size, zero-padded to the size of the input."""
    channels, height, width = x.shape
    reach = weight.shape[-1] // 2
    out = np.empty((len(bias), height, width))
    for o in range(len(bias)):
        for i in range(height):
            for j in range(width):
                total = bias[o]
                for c in range(channels):
                    for di in range(-reach, reach + 1):
                        for dj in range(-reach, reach + 1):
                            if 0 <= i + di < height and 0 <= j + dj < width:
                                tap = weight[o, c, di + reach, dj + reach]
                                total += tap * x[c, i + di, j + dj]
                out[o, i, j] = total
    return out


def pool_by_two_loops(x):
    """Max pooling by 2, with smaller windows at the end of an odd size."""
    channels, height, width = x.shape
    out = np.empty((channels, (height + 1) // 2, (width + 1) // 2))
    for c in range(channels):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                out[c, i, j] = x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max()
    return out


def non_local_loops(x, weights, pool_keys=False):
    channels, height, width = x.shape

    def conv(name, value):
        return conv_loops(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    attended_to = pool_by_two_loops(x) if pool_keys else x
    values = conv("theta", x), conv("phi", attended_to), conv("g", attended_to)
    theta, phi, g = (tokens.reshape(channels, -1) for tokens in values)
    y = np.zeros_like(theta)
    for i in range(height * width):
        similarity = [math.exp(theta[:, i] @ phi[:, j]) for j in range(phi.shape[1])]
        for j in range(phi.shape[1]):
            y[:, i] += similarity[j] / sum(similarity) * g[:, j]
    return x + conv("conv_out", y.reshape(x.shape))


def balance_loops(levels, refine_level, refine):
    size = levels[refine_level].shape[-2:]
    gathered = [
        max_pool_loops(x, size) if i < refine_level else nearest_loops(x, size)
        for i, x in enumerate(levels)
    ]
    refined = refine(sum(gathered) / len(gathered))
    return [
        x
        + (
            nearest_loops(refined, x.shape[-2:])
            if i < refine_level
            else max_pool_loops(refined, x.shape[-2:])
        )
        for i, x in enumerate(levels)
    ]


def random_parameters(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


def state(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


PYRAMIDS = {
    "powers of two": ([(16, 24), (8, 12), (4, 6), (2, 3)], 2),
    "odd sizes": ([(19, 13), (10, 7), (5, 4), (3, 2), (2, 1)], 2),
    "refined at the finest": ([(7, 5), (4, 3), (2, 2)], 0),
    "refined at the coarsest": ([(7, 9), (4, 5), (2, 3)], 2),
    "levels of any size": ([(3, 11), (9, 2), (5, 5)], 1),
    "one level": ([(5, 3)], 0),
}


@pytest.mark.parametrize("refine_type", REFINEMENTS.names())
@pytest.mark.parametrize("sizes, refine_level", PYRAMIDS.values(), ids=PYRAMIDS.keys())
def test_equals_plain_loops(sizes, refine_level, refine_type):
    channels, batch = 3, 2
    balancer = random_parameters(FeatureBalancer(channels, refine_level, refine_type))
    levels = [torch.randn(batch, channels, *size, dtype=torch.float64) for size in sizes]
    weights = state(balancer.refine)
    refine = {
        "none": lambda x: x,
        "conv": lambda x: np.maximum(
            conv_loops(x, weights["conv.weight"], weights["conv.bias"]), 0
        ),
        "non_local": lambda x: non_local_loops(x, weights),
        "non_local_pooled": lambda x: non_local_loops(x, weights, pool_keys=True),
    }[refine_type]

    balanced = balancer(levels)
    with torch.no_grad():
        without_gradient = balancer(levels)
    for got, want in zip(without_gradient, balanced):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    balanced = [x.detach() for x in balanced]

    assert [x.shape for x in balanced] == [x.shape for x in levels]
    for n in range(batch):
        expected = balance_loops([x[n].numpy() for x in levels], refine_level, refine)
        for got, want in zip(balanced, expected):
            np.testing.assert_allclose(got[n].numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("refine_type", REFINEMENTS.names())
def test_gradients(refine_type):
    balancer = random_parameters(FeatureBalancer(2, 1, refine_type))
    levels = [
        torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)
        for size in [(6, 5), (3, 3), (2, 1)]
    ]
    names, parameters = zip(*balancer.named_parameters()) if refine_type != "none" else ((), ())

    def balance(*values):
        given = dict(zip(names, values[3:]))
        return tuple(torch.func.functional_call(balancer, given, (list(values[:3]),)))

    assert torch.autograd.gradcheck(balance, (*levels, *parameters))


@pytest.mark.parametrize("refine_type", REFINEMENTS.names())
def test_compiles_as_one_graph(refine_type):
    torch.compiler.reset()  # which counts the compilations of all tests together
    balancer = FeatureBalancer(8, 1, refine_type)
    for parameter in balancer.parameters():
        torch.nn.init.normal_(parameter)
    compiled = torch.compile(balancer, backend="eager", fullgraph=True)
    for sizes in (((6, 8), (3, 4), (2, 2)), ((5, 9), (3, 5), (2, 3))):
        levels = [torch.randn(1, 8, *size) for size in sizes]
        for expected, got in zip(balancer(levels), compiled(levels)):
            torch.testing.assert_close(got, expected)


def test_new_non_local_block_is_the_identity():
    x = torch.randn(2, 8, 5, 7)
    assert torch.equal(NonLocal2d(8)(x), x)


@pytest.mark.parametrize("pool_keys", [False, True])
def test_non_local_block_keeps_the_memory_format(pool_keys):
    block = random_parameters(NonLocal2d(4, pool_keys))
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    got = block(x.to(memory_format=torch.channels_last))
    assert block(x).is_contiguous() and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, block(x))


def test_state_keys_and_parameters():
    balancer = FeatureBalancer(256)
    assert set(balancer.state_dict()) == {
        f"refine.{conv}.{kind}"
        for conv in ("theta", "phi", "g", "conv_out")
        for kind in ("weight", "bias")
    }
    assert sum(p.numel() for p in balancer.parameters()) == 263_168
    assert not FeatureBalancer(8, refine_type="none").state_dict()


@pytest.mark.parametrize("training", [False, True])
def test_attention_matrix_is_not_materialised(training):
    """The matrix of 10,000 positions would be 400 MB; nothing near it may be allocated."""
    block = NonLocal2d(4)
    x = torch.randn(1, 4, 100, 100, requires_grad=training)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = block(x)
        if training:
            y.sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 50e6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"refine_type": "nonlocal"}, "nonlocal"),
        ({"refine_level": -1}, "REFINE_LEVEL"),
        ({"refine_type": nn.Identity}, "refine_type is .*Identity.*; give its name, or a module"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        FeatureBalancer(4, **arguments)


@pytest.mark.parametrize(
    "refinement, shape",
    [
        (nn.Conv2d(4, 1, 1), "(1, 1, 4, 4)"),
        (nn.AdaptiveAvgPool2d(1), "(1, 4, 1, 1)"),
        (nn.Conv2d(4, 4, 3), "(1, 4, 2, 2)"),
    ],
)
def test_refinements_keep_the_shape(refinement, shape):
    """The first two could be added to the levels, as they are."""
    balancer = FeatureBalancer(4, 1, refinement)
    with pytest.raises(UserError) as error:
        balancer([torch.rand(1, 4, 8, 8), torch.rand(1, 4, 4, 4)])
    assert f"{type(refinement).__name__} " in str(error.value)
    assert f"makes {shape} of (1, 4, 4, 4)" in str(error.value)


def test_refine_level_outside_the_levels():
    with pytest.raises(UserError, match="is 2, but the pyramid has 2 levels; choose 0 to 1"):
        FeatureBalancer(4)([torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 2, 2)])


def test_zero_init_starts_as_the_identity_and_learns():
    torch.manual_seed(0)
    balancer = FeatureBalancer(8, 1, "conv", zero_init=True)
    features = [torch.randn(2, 8, size, size) for size in (16, 8, 4)]
    for before, after in zip(features, balancer(features)):
        assert torch.equal(before, after)
    loss = sum((x**3).sum() for x in balancer(features))
    loss.backward()
    assert balancer.scale.grad.abs().min() > 0
    assert not balancer.refine.conv.weight.grad.any()  # only from the second step on
    with torch.no_grad():
        balancer.scale -= 0.01 * balancer.scale.grad
    plain = FeatureBalancer(8, 1, "conv")
    plain.load_state_dict({k: v for k, v in balancer.state_dict().items() if k != "scale"})
    for x, with_factor, without in zip(features, balancer(features), plain(features)):
        # What is rescaled to each level is the refined mean times the factor of its channel.
        if x.shape[-1] >= 8:
            expected = x + balancer.scale * (without - x)
            assert torch.allclose(with_factor, expected, atol=1e-5)


@pytest.mark.parametrize("refine_type", ["none", "conv", "non_local", "non_local_pooled"])
def test_levels_keep_their_type_in_mixed_precision(refine_type):
    """A factor in float32 would make all that follows compute in it, and twice the memory."""
    balancer = FeatureBalancer(8, 1, refine_type, zero_init=True)
    features = [torch.randn(1, 8, size, size, dtype=torch.bfloat16) for size in (16, 8, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        balanced = balancer(features)
    assert {x.dtype for x in balanced} == {torch.bfloat16}
    sum(x.float().sum() for x in balanced).backward()
    assert balancer.scale.grad.dtype == torch.float32 and balancer.scale.grad.any()
