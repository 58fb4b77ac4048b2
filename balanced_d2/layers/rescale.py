"""Rescaling between the levels of a pyramid: fast, and in a form that PyTorch's exporters take.

Where the sizes of two levels are multiples of each other, as they nearly always are, cheaper
operators than PyTorch's general ones give the same values: several times faster on CPUs.

Adaptive pooling to a size that is only known at run time is not an ONNX operator, and
``torch.export`` takes its output size for a constant. For both, everything is computed as what it
is, a choice of rows and columns.
"""

import functools
from typing import Sequence

import torch
from torch.nn import functional as F

from balanced_d2.layers.exporting import is_exporting, is_known


def adaptive_max_pool(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``F.adaptive_max_pool2d`` to the size of another tensor.

    Args:
        x: shape (N, C, H, W).
        like: shape (..., height, width).

    Returns:
        Tensor of shape (N, C, height, width): each value the maximum of the input's rows
        ``floor(i * H / height)`` to ``ceil((i + 1) * H / height) - 1``, columns likewise.
    """
    height, width = like.shape[-2:]
    is_multiple = [_is_multiple(x.shape[2], height), _is_multiple(x.shape[3], width)]
    # The indices of the maxima make the gradient cheap.
    if all(is_multiple) and (torch.is_grad_enabled() or is_exporting()):
        return F.max_pool2d(x, (int(x.shape[2] // height), int(x.shape[3] // width)))
    if is_exporting():
        return _max_of_windows(_max_of_windows(x, 2, height), 3, width)
    if torch.is_grad_enabled():
        return F.adaptive_max_pool2d(x, (height, width))
    if is_multiple[0]:
        x = _max_of_blocks(x, 2, height)
    if is_multiple[1]:
        x = _max_of_blocks(x, 3, width)
    return x if all(is_multiple) else F.adaptive_max_pool2d(x, (height, width))


def nearest(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``F.interpolate(mode="nearest")`` to the size of another tensor.

    Args:
        x: shape (N, C, H, W).
        like: shape (..., height, width).

    Returns:
        Tensor of shape (N, C, height, width): each value that of the input's row
        ``floor(i * H / height)`` and of the column likewise, computed in single precision as
        PyTorch does. ONNX's Resize rounds otherwise, which at some sizes picks another row.
    """
    if is_exporting():
        for dim in (2, 3):
            x = x.index_select(dim, _nearest_index(x.shape[dim], like.shape[dim - 4], x.device))
        return x
    return _interpolate(x, like.shape[-2:])


def add_nearest(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x + nearest(y, like=x)``.

    Args:
        x: shape (N, C, H, W).
        y: shape (N, C, height, width).
    """
    height = y.shape[2]
    if is_exporting() or not _is_multiple(x.shape[2], height):
        return x + nearest(y, x)
    # Wide rows, each added to the rows that it is the nearest of.
    rows = _interpolate(y, (height, x.shape[3])).unsqueeze(3)
    return (x.unflatten(2, (height, -1)) + rows).flatten(2, 3)


def _interpolate(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    # On GPUs autocast computes it in float32. The levels have to keep one dtype: RoIAlign's outputs
    # of all of them go into one tensor.
    return F.interpolate(x, size=size, mode="nearest").to(x.dtype)


def _is_multiple(length: int, of: int) -> bool:
    # What is exported is to take every size, not only those that are multiples as the example's.
    if torch.jit.is_tracing():
        return False
    return is_known(length % of == 0) if is_exporting() else length % of == 0


def _max_of_blocks(x: torch.Tensor, dim: int, number: int) -> torch.Tensor:
    """The maxima along one dimension of that many blocks of equal length."""
    # Several times faster on CPUs than amax, which is not vectorised over channels_last.
    return functools.reduce(torch.maximum, x.unflatten(dim, (number, -1)).unbind(dim + 1))


def _max_of_windows(x: torch.Tensor, dim: int, number: int) -> torch.Tensor:
    """The maxima along one dimension of that many windows of an adaptive pooling."""
    index = _windows(x.shape[dim], number, x.device)
    # Indices of one dimension: behind a choice that adds a dimension, OpenVINO multiplies the wrong
    # one by the factors of the channels, if the model is in int8.
    shape = (*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    return x.index_select(dim, index.flatten()).reshape(shape).amax(dim=dim + 1)


def _windows(length: int, windows: int, device: torch.device) -> torch.Tensor:
    """What each window of an adaptive pooling looks at: indices of shape (windows, longest).

    A window shorter than the longest repeats its last index, which changes no maximum.
    """
    # As floats: OpenVINO rounds the division of integers, and AOTInductor takes minutes to simplify
    # it. With the half, exact, because no quotient is near an integer: OpenVINO divides by
    # multiplying with what it takes for the reciprocal.
    i = torch.arange(windows, dtype=torch.float32, device=device)
    begin = ((i * length + 0.5) / windows).floor().long()
    end = (((i + 1) * length + (windows - 0.5)) / windows).floor().long()
    longest = (length + windows - 1) // windows + 1
    index = begin[:, None] + torch.arange(longest, device=device)
    return torch.minimum(index, end[:, None] - 1)


def _nearest_index(length: int, size: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(size, device=device) * _quotient(length, size, device)
    return index.floor().long().clamp(max=length - 1)


def _quotient(a: int, b: int, device: torch.device) -> torch.Tensor:
    """``a / b`` in float32, to the nearest: also where a division is a multiplication with the
    reciprocal, as in OpenVINO, whose half of 82 would be less than 41 and choose other rows.

    Of shape (1,). For sizes of levels of one pyramid, at most 4,096.
    """
    quotient = torch.full((1,), 1.0, device=device) * a / b
    # What it lacks: both products are exact, since each of their factors has at most 12 bits or so.
    high = (quotient * 4096).floor() / 4096
    rest = (a - high * b) - (quotient - high) * b
    return quotient + rest / b
