"""Export by ``torch.export``."""

import json
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator, List

import torch
from torch import nn
from torch.nn import functional as F

from balanced_d2.export.batched import BatchDeployable, Suppression
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.nms import suppress
from balanced_d2.export.tracing import no_export_warnings
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

# What an exported program takes at most.
MAX_BATCH = 1024
MAX_SIDE = 16384


def export_pt2(model: nn.Module, image: torch.Tensor, path: str, metadata: dict) -> None:
    """Write a detector as a ``torch.export`` program, which needs only torch and torchvision.

    Args:
        model: as for :class:`BatchDeployable`. It stays as it is.
        image: an example, shape (3, H, W).
        path: the file. One that is there is replaced when the new one is complete.
        metadata: stored in the file as JSON, see :func:`balanced_d2.export.describe`.

    Raises:
        UserError: if the model cannot be exported or the file not be written.
    """
    program = export_program(model, image)
    with replacing(path) as temporary, no_export_warnings():
        torch.export.save(program, temporary, extra_files={METADATA_FILE: json.dumps(metadata)})


def export_program(
    model: nn.Module, image: torch.Tensor, suppression: Suppression = suppress
) -> torch.export.ExportedProgram:
    """:class:`BatchDeployable` of a model as a program for images of every number and size.

    Args:
        model, suppression: as for :class:`BatchDeployable`.
        image: an example, shape (3, H, W).

    Raises:
        UserError: if the model cannot be exported, or by this version of PyTorch.
    """
    if not hasattr(torch, "while_loop"):
        raise UserError(
            f"this export needs torch.while_loop, which PyTorch {torch.__version__} does not have; "
            "update PyTorch (2.14 is tried)"
        )
    deployable = BatchDeployable(model, suppression)
    example = image.float().expand(2, -1, -1, -1).contiguous()  # one would be taken for a constant
    shapes = {
        0: torch.export.Dim("batch", min=1, max=MAX_BATCH),
        2: torch.export.Dim("height", min=1, max=MAX_SIDE),
        3: torch.export.Dim("width", min=1, max=MAX_SIDE),
    }
    with no_export_warnings(), torch.no_grad(), _constant_padding(model):
        return torch.export.export(
            deployable, (example,), dynamic_shapes={"images": shapes}, strict=False
        )


@contextmanager
def _constant_padding(model: nn.Module) -> Iterator[None]:
    """Let timm's convolutions with "same" padding pad by constants.

    They compute the padding from the size of their input, in expressions that ``torch.export``
    cannot simplify. A detector pads its images to multiples of the coarsest stride, so that every
    input is a multiple of its convolution's stride, and then the padding is always the same.
    """
    convs: Any = [m for m in model.modules() if type(m).__name__ == "Conv2dSame"]
    for conv in convs:
        conv.forward = partial(_pad_and_convolve, conv)
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def _pad_and_convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    padding: List[int] = []
    for size, stride, dilation in zip(conv.kernel_size, conv.stride, conv.dilation):
        total = max((size - 1) * dilation + 1 - stride, 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the width
    x = F.pad(x, padding)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
