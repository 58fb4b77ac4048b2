"""Balancing changes nothing that others hold, and can be differentiated in every way."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn
from torch.utils.checkpoint import checkpoint

from balanced_d2 import load_config
from balanced_d2.layers import FeatureBalancer, NonLocal2d
from balanced_d2.layers.feature_balancer import REFINEMENTS
from balanced_d2.modeling import BalancedFPN

from .conftest import TINY_CONFIG

# Multiples of each other, and others.
SIZES = {"multiples": ((8, 4), (4, 2), (2, 1)), "odd": ((7, 5), (4, 3), (2, 2))}


@pytest.fixture(params=REFINEMENTS.names())
def balancer(request):
    return random_balancer(request.param)


def random_balancer(refine_type):
    balancer = FeatureBalancer(2, 1, refine_type).double()
    for parameter in balancer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return balancer


def pyramid(sizes, requires_grad=True):
    return [
        torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=requires_grad)
        for size in SIZES[sizes]
    ]


def function_of_tensors(balancer, levels):
    """The balancing as a function of levels and parameters, and what to call it with."""
    names = [name for name, _ in balancer.named_parameters()]
    num_levels = len(levels)

    def balance(*values):
        given = dict(zip(names, values[num_levels:]))
        return tuple(torch.func.functional_call(balancer, given, (values[:num_levels],)))

    return balance, (*levels, *balancer.parameters())


def balanced_fpn():
    cfg = load_config(TINY_CONFIG, ["MODEL.DEVICE", "cpu"])
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    fpn = BalancedFPN(bottom_up, ["res2", "res3", "res4", "res5"], 8, top_block=LastLevelMaxPool())
    nn.init.normal_(fpn.balancer.refine.conv_out.weight)
    return fpn


def output_layers(fpn):
    return {name: layer for name, layer in fpn.named_children() if name.startswith("fpn_output")}


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_layers_keep_what_they_were_given(training):
    fpn, image, held = balanced_fpn(), torch.randn(1, 3, 64, 96), []
    with torch.set_grad_enabled(training):
        unbalanced = FPN.forward(fpn, image)
        for layer in output_layers(fpn).values():
            layer.register_forward_hook(lambda _, __, output: held.append(output))
        fpn.top_block.register_forward_hook(lambda _, __, output: held.append(output[0]))
        features = fpn(image)
        if training:
            sum(x.square().sum() for x in features.values()).backward()
    assert len(held) == 5
    # The layers run from coarse to fine, the top block last.
    for name, value in zip(("p5", "p4", "p3", "p2", "p6"), held):
        assert torch.equal(value, unbalanced[name]), name
        assert not torch.equal(value, features[name]), name


def test_a_loss_can_be_computed_in_a_hook():
    """Of the layers' unbalanced outputs, beside that of the balanced ones."""
    fpn, image = balanced_fpn().double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)

    def gradients(run):
        fpn.zero_grad()
        run().backward()
        return [parameter.grad.clone() for parameter in fpn.parameters()]

    def with_hooks():
        losses = []
        handles = [
            layer.register_forward_hook(lambda _, __, x: losses.append(x.square().mean()))
            for layer in output_layers(fpn).values()
        ]
        features = fpn(image)
        for handle in handles:
            handle.remove()
        return sum(losses) + sum(x.square().mean() for x in features.values())

    def by_hand():
        levels = list(FPN.forward(fpn, image).values())
        losses = [x.square().mean() for x in levels[:4]]  # the fifth comes from the top block
        return sum(losses) + sum(x.square().mean() for x in fpn.balancer(levels))

    for got, expected in zip(gradients(with_hooks), gradients(by_hand)):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gradient", [True, False])
def test_balancing_leaves_its_inputs(balancer, gradient):
    levels = pyramid("multiples")
    before = [x.detach().clone() for x in levels]
    with torch.set_grad_enabled(gradient):
        balanced = balancer(levels)
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(levels, before))
    pointers = {x.untyped_storage().data_ptr() for x in levels}
    assert pointers.isdisjoint(x.untyped_storage().data_ptr() for x in balanced)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_of_gradients(balancer, sizes):
    balance, values = function_of_tensors(balancer, pyramid(sizes))
    assert torch.autograd.gradcheck(balance, values)
    assert torch.autograd.gradgradcheck(balance, values, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_forward_mode_equals_finite_differences(balancer, sizes):
    balance, values = function_of_tensors(balancer, pyramid(sizes, requires_grad=False))
    values = tuple(x.detach() for x in values)
    direction = tuple(torch.randn_like(x) for x in values)
    outputs, derivatives = torch.func.jvp(balance, values, direction)
    step = 1e-6
    there, back = (
        balance(*(x + sign * step * d for x, d in zip(values, direction))) for sign in (1, -1)
    )
    for output, expected in zip(outputs, balance(*values)):
        torch.testing.assert_close(output, expected)
    for derivative, a, b in zip(derivatives, there, back):
        torch.testing.assert_close(derivative, (a - b) / (2 * step), rtol=1e-5, atol=1e-6)


def test_torch_func_equals_autograd(balancer):
    """A gradient, and the product of a Hessian with a vector in two ways."""
    levels = pyramid("multiples")
    direction = [torch.randn_like(x) for x in levels]

    def loss(*levels):
        return sum(x.square().sum() for x in balancer(levels))

    every = tuple(range(len(levels)))
    gradient = torch.func.grad(loss, argnums=every)
    expected = torch.autograd.grad(loss(*levels), levels, create_graph=True)
    product = torch.autograd.grad(expected, levels, direction)
    _, forward_over_reverse = torch.func.jvp(gradient, tuple(levels), tuple(direction))
    _, reverse_over_reverse = torch.func.vjp(gradient, *levels)
    for got, want in (
        (gradient(*levels), expected),
        (forward_over_reverse, product),
        (reverse_over_reverse(tuple(direction)), product),
    ):
        torch.testing.assert_close(got, want)


def test_gradient_with_and_without_create_graph():
    """That of the explicit attention, and the fused one's own, also twice from one graph."""
    block = NonLocal2d(8)
    nn.init.normal_(block.conv_out.weight)
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    loss = block(x).square().sum()
    once = torch.autograd.grad(loss, x, retain_graph=True)
    again = torch.autograd.grad(loss, x, retain_graph=True)
    twice = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(once[0], again[0])
    torch.testing.assert_close(once, tuple(x.detach() for x in twice))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(balancer, use_reentrant):
    levels = pyramid("odd")
    variables = [*levels, *balancer.parameters()]

    def gradients(outputs):
        loss = sum((x * w).sum() for x, w in zip(outputs, weights))
        balancer.zero_grad()
        for x in levels:
            x.grad = None
        loss.backward()
        return [x.grad.clone() for x in variables]

    weights = [torch.randn_like(x) for x in levels]
    expected = gradients(balancer(levels))
    got = gradients(
        checkpoint(lambda *levels: tuple(balancer(levels)), *levels, use_reentrant=use_reentrant)
    )
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def has_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # its own class of errors has moved between versions
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
def test_compiled_balancing_gives_equal_values_and_gradients(sizes):
    if not has_compiler():
        pytest.skip("torch.compile needs a C++ compiler")
    torch.compiler.reset()  # which counts the compilations of all tests together
    balancer, levels = random_balancer("non_local"), pyramid(sizes)
    compiled = torch.compile(balancer, fullgraph=True)
    variables = [*levels, *balancer.parameters()]
    weights = [torch.randn_like(x) for x in levels]
    results = []
    for function in (balancer, compiled):
        outputs = function(levels)
        loss = sum((x * w).sum() for x, w in zip(outputs, weights))
        results.append((outputs, torch.autograd.grad(loss, variables)))
    torch.testing.assert_close(*reversed(results), rtol=1e-9, atol=1e-9)
