"""Deformable convolution, versions 1 and 2, with torchvision's operator, on the CPU and on CUDA.

Part of the pure-Python build of Detectron2 0.6; replaces its compiled operators.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d


def deform_conv(
    input,
    offset,
    weight,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    deformable_groups=1,
    im2col_step=64,
):
    """Deformable convolution (Dai et al., 2017): every sample of the kernel has an offset.

    Args:
        input: (N, C, H, W).
        offset: (N, 2 * deformable_groups * kernel height * kernel width, output height, output
            width), y before x.
        weight: (output channels, C / groups, kernel height, kernel width).
        im2col_step: not used; accepted for compatibility.
    """
    return modulated_deform_conv(
        input, offset, None, weight, None, stride, padding, dilation, groups, deformable_groups
    )


def modulated_deform_conv(
    input,
    offset,
    mask,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    deformable_groups=1,
):
    """Modulated deformable convolution (Zhu et al., 2019): every sample also has a weight.

    Args:
        mask: (N, deformable_groups * kernel height * kernel width, output height, output width).

    The other arguments are those of :func:`deform_conv`.

    Raises:
        RuntimeError: if the shapes do not fit together.
    """
    num_samples = deformable_groups * weight.shape[2] * weight.shape[3]
    # torchvision infers both numbers of groups from the shapes.
    expected = [("offset", offset.shape[1], 2 * num_samples)]
    expected.append(("input", input.shape[1], weight.shape[1] * groups))
    if mask is not None:
        expected.append(("mask", mask.shape[1], num_samples))
    for name, actual, wanted in expected:
        if actual != wanted:
            raise RuntimeError(
                f"deformable convolution: {name} has {actual} channels, not {wanted}"
            )
    if input.numel() == 0:  # not accepted by torchvision; this has the same shape and a gradient
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return deform_conv2d(
        input, offset, weight, bias, _pair(stride), _pair(padding), _pair(dilation), mask
    )


class _DeformConvBase(nn.Module):
    """Parameters and options of both versions."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        deformable_groups,
        bias,
        norm,
        activation,
    ):
        super().__init__()
        assert in_channels % groups == 0, f"{in_channels} channels cannot form {groups} groups"
        assert out_channels % groups == 0, f"{out_channels} channels cannot form {groups} groups"
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _finish(self, x):
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
        names += ["groups", "deformable_groups"]
        options = [f"{name}={getattr(self, name)}" for name in names]
        return ", ".join([*options, f"bias={self.bias is not None}"])


class DeformConv(_DeformConvBase):
    """Deformable convolution with the arguments of Detectron2's ``Conv2d``.

    Args:
        deformable_groups: number of groups of channels, each with its own offsets.
        norm: a layer applied after the convolution, or None.
        activation: a function applied after ``norm``, or None.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deformable_groups=1,
        bias=False,
        norm=None,
        activation=None,
    ):
        assert not bias, "DeformConv has no bias"
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            _pair(stride),
            _pair(padding),
            _pair(dilation),
            groups,
            deformable_groups,
            bias,
            norm,
            activation,
        )

    def forward(self, x, offset):
        """Shapes as for :func:`deform_conv`."""
        x = deform_conv(
            x,
            offset,
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deformable_groups,
        )
        return self._finish(x)


class ModulatedDeformConv(_DeformConvBase):
    """Modulated deformable convolution; arguments as for :class:`DeformConv`."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deformable_groups=1,
        bias=True,
        norm=None,
        activation=None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deformable_groups,
            bias,
            norm,
            activation,
        )
        self.with_bias = bias

    def forward(self, x, offset, mask):
        """Shapes as for :func:`modulated_deform_conv`."""
        x = modulated_deform_conv(
            x,
            offset,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deformable_groups,
        )
        return self._finish(x)
