"""Rescaling between the levels of a pyramid: fast, and in a form that PyTorch's exporters take.

Where the sizes of two levels are multiples of each other, as nearly always, rows and columns are
treated one after the other, which is several times faster on CPUs than PyTorch's general kernels
and gives the same values.

Adaptive pooling to a size that is only known at run time is not an ONNX operator, and
``torch.export`` takes its output size for a constant. For both, everything is computed as what it
is, a choice of rows and columns.
"""

import torch
from torch.nn import functional as F

from balanced_d2.compat import is_exporting


def adaptive_max_pool(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``F.adaptive_max_pool2d`` to the size of another tensor.

    Args:
        x: shape (N, C, H, W).
        like: shape (..., height, width).

    Returns:
        Tensor of shape (N, C, height, width): each value the maximum of the input's rows
        ``floor(i * H / height)`` to ``ceil((i + 1) * H / height) - 1``, columns likewise.
    """
    if not torch.jit.is_scripting() and is_exporting():
        x = x[:, :, _windows(x.shape[2], like.shape[-2], x.device)].amax(dim=3)
        return x[:, :, :, _windows(x.shape[3], like.shape[-1], x.device)].amax(dim=4)
    return _adaptive_max_pool(x, like)


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
    if not torch.jit.is_scripting() and is_exporting():
        x = x[:, :, _nearest_index(x.shape[2], like.shape[-2], x.device)]
        return x[:, :, :, _nearest_index(x.shape[3], like.shape[-1], x.device)]
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")


def add_nearest(x: torch.Tensor, y: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``x + nearest(y, like=x)``.

    Args:
        x: shape (N, C, H, W).
        y: shape (N, C, height, width).
        inplace: whether ``x`` may be overwritten, which saves the time to allocate the result.
    """
    if not torch.jit.is_scripting() and is_exporting():
        return x + nearest(y, x)
    return _add_nearest(x, y, inplace)


# As scripts, these two decide at run time when they are traced, too.
@torch.jit.script_if_tracing
def _adaptive_max_pool(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    height, width = like.shape[-2], like.shape[-1]
    is_multiple = x.shape[2] % height == 0 and x.shape[3] % width == 0
    # The gradient of a pooling with indices is cheaper.
    if is_multiple and not torch.is_grad_enabled():
        rows = x.unflatten(2, [height, -1]).amax(dim=3)
        return rows.unflatten(3, [width, -1]).amax(dim=4)
    return F.adaptive_max_pool2d(x, [height, width])


@torch.jit.script_if_tracing
def _add_nearest(x: torch.Tensor, y: torch.Tensor, inplace: bool) -> torch.Tensor:
    height, width = y.shape[-2], x.shape[-1]
    if x.shape[2] % height == 0:
        # Wide rows, each added to the rows that it is the nearest of.
        rows = F.interpolate(y, size=[height, width], mode="nearest").unsqueeze(3)
        blocks = x.unflatten(2, [height, -1])
        if inplace:
            blocks.add_(rows)
            return x
        return (blocks + rows).flatten(2, 3)
    return x + F.interpolate(y, size=x.shape[-2:], mode="nearest")


def _windows(length: int, windows: int, device: torch.device) -> torch.Tensor:
    """What each window of an adaptive pooling looks at: indices of shape (windows, longest).

    A window shorter than the longest repeats its last index, which changes no maximum.
    """
    i = torch.arange(windows, device=device)
    begin = torch.div(i * length, windows, rounding_mode="trunc")
    end = torch.div((i + 1) * length + windows - 1, windows, rounding_mode="trunc")
    longest = (length + windows - 1) // windows + 1
    index = begin[:, None] + torch.arange(longest, device=device)
    return torch.minimum(index, end[:, None] - 1)


def _nearest_index(length: int, size: int, device: torch.device) -> torch.Tensor:
    scale = torch.full((1,), 1.0, device=device) * length / size
    index = (torch.arange(size, device=device) * scale).floor().long()
    return index.clamp(max=length - 1)
