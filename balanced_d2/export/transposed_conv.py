"""Transposed convolutions as plain ones."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from balanced_d2.utils.errors import UserError


def convolve_transposed(conv: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """What a transposed convolution gives, by a convolution and a pixel shuffle.

    With stride s, outputs whose places have the same remainder r by s are a convolution of the
    input with every s-th weight, from the r-th on. Those of all remainders are channels of one
    convolution (sub-pixel convolution, Shi et al., 2016), which are then put side by side.

    Args:
        conv: with one group and without dilation.
        x: shape (N, C, H, W).

    Returns:
        As ``conv(x)``, equal but for rounding.

    Raises:
        UserError: if the convolution is of another kind.
    """
    stride = conv.stride[0]
    if conv.groups != 1 or set(conv.dilation) != {1} or set(conv.stride) != {stride}:
        raise UserError(
            "a transposed convolution with groups, dilation or two strides cannot be exported in "
            "this form; use --format pt2"
        )
    rows, columns = (
        -(-(size + more) // stride) for size, more in zip(conv.kernel_size, conv.output_padding)
    )
    missing = [n * stride - size for n, size in zip((rows, columns), conv.kernel_size)]
    weight = F.pad(conv.weight, (0, missing[1], 0, missing[0]))
    weight = weight.unflatten(3, (columns, stride)).unflatten(2, (rows, stride))
    # (C, D, rows, s, columns, s) to (D s s, C, rows, columns), flipped: convolutions correlate.
    weight = weight.permute(1, 3, 5, 0, 2, 4).flip(4, 5).flatten(0, 2)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(stride**2)
    y = F.pixel_shuffle(F.conv2d(x, weight, bias, padding=(rows - 1, columns - 1)), stride)
    paddings: Any = conv.padding  # never a word, as it can be of other convolutions
    for dim, size, padding, more in zip((2, 3), conv.kernel_size, paddings, conv.output_padding):
        y = y.narrow(dim, padding, (x.shape[dim] - 1) * stride + size - 2 * padding + more)
    return y
