"""A convolution, a sum and an activation in one pass over the output, on CPUs."""

from typing import Optional

import torch
from torch import nn

from balanced_d2.layers.exporting import is_exporting

# How oneDNN calls what it computes after a convolution, and its parameters.
ACTIVATIONS: dict = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}
AFTER_SUM = (nn.ReLU,)


def can_fuse(
    conv: nn.Conv2d,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    activation: Optional[nn.Module] = None,
    add: Optional[torch.Tensor] = None,
) -> bool:
    """Whether :func:`fused_conv` takes these arguments: on x86 CPUs with PyTorch's oneDNN, in
    float32 or bfloat16 and channels_last, where no gradient is computed and nothing is traced."""
    read = [t for t in (x, weight, bias, add) if t is not None]
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and (_is_channels_last(x) or _is_channels_last(weight))
        and (activation is None or type(activation) in ACTIVATIONS)
        and (add is None or conv.groups == 1)
        and (add is None or activation is None or type(activation) in AFTER_SUM)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read))
        and not (torch.jit.is_tracing() or torch.compiler.is_compiling() or is_exporting())
        # MKL stands for x86: on other processors oneDNN hands convolutions to other libraries.
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
    )


def fused_conv(
    conv: nn.Conv2d,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    activation: Optional[nn.Module] = None,
    add: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """``activation(conv(x) + add)``. Computed one after the other, sum and activation each read and
    write the whole output again, which takes longer than many a convolution.

    Args:
        conv: gives stride, padding, dilation and groups.
        x: shape (N, C, H, W).
        weight: shape (O, C / groups, height, width), of the dtype of ``x``.
        bias: shape (O,), of that dtype, or None.
        activation: of a class in ``ACTIVATIONS``; after a sum, in ``AFTER_SUM``.
        add: of the output's shape. It stays as it is.

    Returns:
        Tensor of the shape and dtype that the convolution gives.
    """
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    name, parameters = (None, []) if activation is None else ACTIVATIONS[type(activation)]
    x = x.contiguous(memory_format=torch.channels_last)
    operator = torch.ops.mkldnn._convolution_pointwise
    if add is None:
        return operator(x, weight, bias, *geometry, name or "none", parameters, "")
    add = add.to(x.dtype, memory_format=torch.channels_last)
    return operator.binary(x, add, weight, bias, *geometry, "add", 1.0, name, parameters, "")


def _is_channels_last(x: torch.Tensor) -> bool:
    """As PyTorch's convolutions see it: 1 x 1 images and kernels can be both."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
