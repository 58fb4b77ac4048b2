"""Convolutions that compute sum and activation in the same pass."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_d2.layers.fused_conv import can_fuse, fused_conv
from balanced_d2.modeling.fold_norm import fold_norm

from .test_fold_norm import with_statistics

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()),
    reason="needs PyTorch's oneDNN on an x86 CPU",
)


class Operators(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    def count(self, part):
        return sum(part in name for name in self.names)


def in_plain_loops(x, weight, bias, stride, padding, groups):
    x = nn.functional.pad(x.double(), (padding,) * 4)
    out_channels, per_group, height, width = weight.shape
    rows = (x.shape[2] - height) // stride + 1
    columns = (x.shape[3] - width) // stride + 1
    out = torch.zeros(x.shape[0], out_channels, rows, columns, dtype=torch.float64)
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for i in range(rows):
            for j in range(columns):
                seen = x[:, first : first + per_group, i * stride :, j * stride :]
                seen = seen[:, :, :height, :width]
                out[:, o, i, j] = (seen * weight[o].double()).sum((1, 2, 3)) + bias[o].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize(
    "size, stride, padding, groups, with_sum",
    [(1, 1, 0, 1, True), (3, 2, 1, 1, True), (3, 1, 1, 4, False), (5, 2, 0, 2, False)],
)
def test_equals_the_sums_of_the_definition(
    dtype, activation, size, stride, padding, groups, with_sum
):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, size, stride=stride, padding=padding, groups=groups)
    conv.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
    x = (3 * torch.randn(2, 4, 9, 7)).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = in_plain_loops(x, conv.weight, conv.bias, stride, padding, groups)
    add = torch.randn_like(expected).to(dtype) if with_sum else None
    if with_sum:
        expected = expected + add.double()
    if activation is not None:
        expected = expected.clamp(0, 6 if isinstance(activation, nn.ReLU6) else None)
    given = [None if t is None else t.clone() for t in (x, conv.weight, conv.bias, add)]
    assert can_fuse(conv, x, conv.weight, conv.bias, activation, add) == (
        not (with_sum and isinstance(activation, nn.ReLU6))
    )
    if with_sum and isinstance(activation, nn.ReLU6):
        return  # oneDNN has no such pass
    out = fused_conv(conv, x, conv.weight, conv.bias, activation, add)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert torch.allclose(out.double(), expected, rtol=tolerance, atol=tolerance)
    for before, after in zip(given, (x, conv.weight, conv.bias, add)):
        assert before is None or torch.equal(before, after)


def test_what_is_not_fused():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 9, 7).contiguous(memory_format=torch.channels_last)

    def fuses(x=x, conv=conv, activation=None, add=None):
        with torch.no_grad():
            return can_fuse(conv, x, conv.weight, conv.bias, activation, add)

    assert fuses()
    assert not can_fuse(conv, x, conv.weight, conv.bias)  # its weights have gradients
    assert can_fuse(conv, x, conv.weight.detach(), conv.bias.detach())
    assert not fuses(x.double())
    assert not fuses(x[:0])
    assert not fuses(activation=nn.SiLU())
    assert not fuses(conv=nn.Conv2d(4, 8, 3, padding="same"))
    assert not fuses(conv=nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    grouped = nn.Conv2d(4, 8, 3, groups=2).to(memory_format=torch.channels_last)
    assert fuses(conv=grouped) and not fuses(conv=grouped, add=torch.zeros(1, 8, 7, 5))
    plain = nn.Conv2d(4, 8, 3)  # neither it nor its image in channels_last
    assert not fuses(x.contiguous(), plain)
    assert not torch.jit.trace(lambda x: torch.tensor(fuses(x)), x, check_trace=False)(x)


BLOCKS = {
    "basic": (lambda: BasicBlock(8, 8, norm="FrozenBN"), 2),
    "basic with shortcut": (lambda: BasicBlock(8, 16, stride=2, norm="BN"), 3),
    "bottleneck": (lambda: BottleneckBlock(8, 8, bottleneck_channels=4, norm="BN"), 3),
    "bottleneck in groups": (
        lambda: BottleneckBlock(8, 16, bottleneck_channels=8, num_groups=2, norm="FrozenBN"),
        4,
    ),
    "stem": (lambda: BasicStem(8, 16, norm="FrozenBN"), 1),
    "with activation": (lambda: Conv2d(8, 8, 3, activation=nn.ReLU()), 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    """Equal in value and gradient; where no gradient is asked for, nothing but convolutions."""
    build, num_convs = BLOCKS[name]
    torch.manual_seed(0)
    plain = with_statistics(build()).eval().to(memory_format=torch.channels_last)
    folded = copy.deepcopy(plain)
    fold_norm(folded)
    x = torch.randn(2, 8, 16, 12).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    with torch.no_grad():
        expected = plain(x)
        folded(x)  # computes the weights
        with Operators() as operators:
            out = folded(x)
        assert torch.equal(x, given)
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
        assert operators.count("_convolution_pointwise") == num_convs
        assert operators.count("relu") == operators.count("aten.add") == 0
    results = []
    for model in (plain, folded):
        image = x.clone().requires_grad_()
        out = model(image)
        (out * torch.arange(float(out.shape[1]))[:, None, None]).sum().backward()
        results.append([out, image.grad, *(p.grad for p in model.parameters())])
    for expected, value in zip(*results):
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-3)


def test_hooks_see_what_they_saw():
    """Forward hooks on convolutions fire, with the output of what the convolution computes."""
    torch.manual_seed(0)
    block = with_statistics(BasicBlock(8, 8, norm="BN")).eval()
    fold_norm(block)
    seen = []
    for conv in (block.conv1, block.conv2):
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        out = block(torch.randn(1, 8, 4, 4))
    assert len(seen) == 2 and torch.equal(seen[-1], out)


def test_batch_norm_that_is_trained_stays():
    torch.manual_seed(0)
    plain = with_statistics(BottleneckBlock(8, 8, bottleneck_channels=4, norm="BN")).train()
    folded = copy.deepcopy(plain)
    fold_norm(folded)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(folded(x), plain(x))
    assert torch.equal(folded.conv3.norm.running_mean, plain.conv3.norm.running_mean)


def test_autocast_computes_in_bfloat16():
    torch.manual_seed(0)
    plain = with_statistics(BasicBlock(8, 8, norm="FrozenBN")).eval()
    plain.to(memory_format=torch.channels_last)
    folded = copy.deepcopy(plain)
    fold_norm(folded)
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = folded(x)
        # The weights in bfloat16 are not kept for those in float32.
        assert torch.allclose(folded(x), expected, rtol=1e-4, atol=1e-5)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() <= 0.03 * expected.abs().max()
