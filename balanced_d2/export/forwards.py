"""Modules that are computed otherwise while a model is exported."""

from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Mapping

import torch
from detectron2.modeling.backbone import FPN
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
    same = (module for module in model.modules() if type(module).__name__ == "Conv2dSame")
    return dict.fromkeys(same, _pad_and_convolve)


def _pad_and_convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    padding: List[int] = []
    for size, stride, dilation in zip(conv.kernel_size, conv.stride, conv.dilation):
        total = max((size - 1) * dilation + 1 - stride, 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the width
    x = F.pad(x, padding)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def unrelated_sizes(model: nn.Module) -> Dict[nn.Module, Callable]:
    """For :func:`computed_by`: the levels that convolutions add above those of the backbone, with
    sizes that are symbols of their own.

    As expressions of the image's size, divided and rounded once more for each level, they take a
    compiler more than half an hour to simplify, wherever these levels are read.
    """
    pyramids = [module for module in model.modules() if isinstance(module, FPN)]
    added = [module for fpn in pyramids if fpn.top_block for module in fpn.top_block.modules()]
    convs = (module for module in added if isinstance(module, nn.Conv2d))
    return dict.fromkeys(convs, _without_relation)


def _without_relation(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    x = type(conv).forward(conv, x)
    for dim in (2, 3):
        # Through a tensor, whose value is not followed.
        length: Any = torch.full((), x.shape[dim], dtype=torch.float32).floor().long().item()
        torch._check(length >= 1)
        # Not narrow(), which asserts the relation, and whose strides would still have it.
        x = x.index_select(dim, torch.arange(length, device=x.device))
    return x
