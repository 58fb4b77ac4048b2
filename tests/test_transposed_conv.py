"""Transposed convolutions, computed as plain ones."""

import pytest
import torch
from torch import nn

from balanced_d2.export.transposed_conv import convolve_transposed
from balanced_d2.utils.errors import UserError


def transposed(conv, x):
    """In a loop: each input adds its weights to the outputs that it reaches."""
    (stride, _), (top, left) = conv.stride, conv.padding
    (rows, columns), more = conv.kernel_size, conv.output_padding
    number, _, height, width = x.shape
    full = x.new_zeros(
        number,
        conv.out_channels,
        (height - 1) * stride + rows + more[0],
        (width - 1) * stride + columns + more[1],
    )
    for i in range(height):
        for j in range(width):
            reached = torch.einsum("nc,cdkl->ndkl", x[:, :, i, j], conv.weight)
            y, z = i * stride, j * stride
            full[:, :, y : y + rows, z : z + columns] += reached
    kept = full[:, :, top : full.shape[2] - top, left : full.shape[3] - left]
    return kept if conv.bias is None else kept + conv.bias[:, None, None]


@pytest.mark.parametrize(
    "kernel, stride, padding, more",
    [
        *((2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 1, 1, 0), (2, 3, 0, 2), (1, 2, 0, 0)),
        *((5, 3, 2, 1), ((3, 2), 2, (1, 0), (0, 1))),
    ],
)
def test_equal_to_a_loop(kernel, stride, padding, more):
    torch.manual_seed(0)
    for bias in (True, False):
        conv = nn.ConvTranspose2d(3, 4, kernel, stride, padding, more, bias=bias).double()
        for size in ((4, 5), (1, 3), (3, 3)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            expected = transposed(conv, x)
            torch.testing.assert_close(conv(x), expected)
            torch.testing.assert_close(convolve_transposed(conv, x), expected)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"stride": (1, 2)}])
def test_other_kinds_are_refused(options):
    conv = nn.ConvTranspose2d(4, 4, 3, **options)
    with pytest.raises(UserError, match="groups, dilation or two strides"):
        convolve_transposed(conv, torch.zeros(1, 4, 5, 5))
