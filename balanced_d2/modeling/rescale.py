"""Rescaling between the levels of a pyramid, in a form that PyTorch's exporters take too.

Adaptive pooling to a size that is only known at run time is not an ONNX operator, and
``torch.export`` takes its output size for a constant. While exporting, both functions are therefore
computed as what they are, a choice of rows and columns; otherwise by PyTorch's own kernels.
"""

from typing import List

import torch
from torch.nn import functional as F

from balanced_d2.compat import is_exporting


def adaptive_max_pool(x: torch.Tensor, size: List[int]) -> torch.Tensor:
    """``F.adaptive_max_pool2d``, with the same values, traceable for every exporter.

    Args:
        x: shape (N, C, H, W).
        size: (height, width) of the output.

    Returns:
        Tensor of shape (N, C, height, width): each value the maximum of the input's rows
        ``floor(i * H / height)`` to ``ceil((i + 1) * H / height) - 1``, columns likewise.
    """
    if not torch.jit.is_scripting() and is_exporting():
        x = x[:, :, _windows(x.shape[2], size[0], x.device)].amax(dim=3)
        return x[:, :, :, _windows(x.shape[3], size[1], x.device)].amax(dim=4)
    return F.adaptive_max_pool2d(x, size)


def nearest(x: torch.Tensor, size: List[int]) -> torch.Tensor:
    """``F.interpolate(mode="nearest")``, with the same values, traceable for every exporter.

    Args:
        x: shape (N, C, H, W).
        size: (height, width) of the output.

    Returns:
        Tensor of shape (N, C, height, width): each value that of the input's row
        ``floor(i * H / height)`` and of the column likewise, computed in single precision as
        PyTorch does. ONNX's Resize rounds otherwise, which at some sizes picks another row.
    """
    if not torch.jit.is_scripting() and is_exporting():
        x = x[:, :, _nearest_index(x.shape[2], size[0], x.device)]
        return x[:, :, :, _nearest_index(x.shape[3], size[1], x.device)]
    return F.interpolate(x, size=size, mode="nearest")


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
