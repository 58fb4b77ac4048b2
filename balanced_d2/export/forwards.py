"""Modules that are computed otherwise while a model is exported."""

from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping

import torch
from torch import nn
from torch.nn import functional as F


@contextmanager
def computed_by(forwards: Mapping[Any, Callable]) -> Iterator[None]:
    """Let each of the modules be computed by a function of it and its input."""
    for module, forward in forwards.items():
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def constant_padding(model: nn.Module) -> Dict[nn.Module, Callable]:
    """For :func:`computed_by`: timm's convolutions with "same" padding, padded by constants.

    They compute the padding from the size of their input, in expressions that ``torch.export``
    cannot simplify; and OpenVINO pads wrongly by what is computed, if the model is in int8. A
    detector pads its images to multiples of the coarsest stride, so that every input is a multiple
    of its convolution's stride, and then the padding is always the same.
    """
    return dict.fromkeys(_same_convs(model), _pad_and_convolve)


def _pad_and_convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    padding: List[int] = []
    for total in _total_padding(conv):
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the width
    x = F.pad(x, padding)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def symmetric_padding(model: nn.Module) -> Dict[nn.Module, Callable]:
    """The same with as much padding at the beginning as at the end, which convolutions do
    themselves; padding before copies the input, in AOTInductor a tenth of a detector's time.

    Where one more belongs to the end, the kernel begins with a zero. OpenVINO has slow convolutions
    for such kernels.
    """
    undilated = (conv for conv in _same_convs(model) if max(conv.dilation) == 1)
    return dict.fromkeys(undilated, _convolve_padded)


def _convolve_padded(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    padding: List[int] = []
    zeros: List[int] = []
    for total in _total_padding(conv):
        padding.append(total - total // 2)
        zeros = [total % 2, 0, *zeros]
    weight = F.pad(conv.weight, zeros)
    return F.conv2d(x, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def _same_convs(model: nn.Module) -> List[nn.Conv2d]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and type(module).__name__ == "Conv2dSame"
    ]


def _total_padding(conv: nn.Conv2d) -> List[int]:
    """Of height and width, of an input that is a multiple of the stride."""
    return [
        max((size - 1) * dilation + 1 - stride, 0)
        for size, stride, dilation in zip(conv.kernel_size, conv.stride, conv.dilation)
    ]
