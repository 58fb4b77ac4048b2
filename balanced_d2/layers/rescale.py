"""Rescaling between the levels of a pyramid: fast, and in a form that PyTorch's exporters take.

Where the sizes of two levels are multiples of each other, as nearly always, rows and columns are
treated one after the other, which is several times faster on CPUs than PyTorch's general kernels
and gives the same values. In training, what costs most on CPUs is to allocate tensors of the size
of the finest levels; the gradients here, and sums in place, do with fewer of them.

Adaptive pooling to a size that is only known at run time is not an ONNX operator, and
``torch.export`` takes its output size for a constant. For both, everything is computed as what it
is, a choice of rows and columns.
"""

from typing import Tuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from balanced_d2.layers.exporting import is_exporting, is_plain_eager


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


def fork_pooled(x: torch.Tensor, like: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """``x`` and ``adaptive_max_pool(x, like)``, for both to be used further on.

    The gradient of the pooling is added to that of ``x`` in place, which needs no tensor of zeros.
    """
    if not torch.jit.is_scripting() and torch.is_grad_enabled() and is_plain_eager():
        return _ForkPooled.apply(x, like.shape[-2:])
    return x, adaptive_max_pool(x, like)


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
        inplace: whether ``x`` may be overwritten, which saves the time to allocate the result. Not
            with a leaf that requires a gradient.
    """
    if not torch.jit.is_scripting():
        if is_exporting():
            return x + nearest(y, x)
        if torch.is_grad_enabled() and is_plain_eager():
            return _AddNearest.apply(x, y, inplace)
    return _add_nearest(x, y, inplace)


class _ForkPooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        pooled, index = F.adaptive_max_pool2d(x, size, return_indices=True)
        ctx.save_for_backward(index)
        return x.detach(), pooled  # an alias: autograd takes no sum in place into the input itself

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, pooled_gradient):
        (index,) = ctx.saved_tensors
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.flatten(2).scatter_add_(2, index.flatten(2), pooled_gradient.flatten(2))
        return gradient, None


class _AddNearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, inplace):
        ctx.size, ctx.y_shape = x.shape[-2:], y.shape
        if inplace:
            ctx.mark_dirty(x)
        return _add_nearest(x, y, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        backward = torch.ops.aten.upsample_nearest2d_backward
        return gradient, backward(gradient, ctx.size, ctx.y_shape), None


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
    rescaled = F.interpolate(y, size=x.shape[-2:], mode="nearest")
    return x.add_(rescaled) if inplace else x + rescaled


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
