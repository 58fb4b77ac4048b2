"""Export by ``torch.export``."""

import json
from contextlib import contextmanager
from functools import partial
from typing import Any, Iterator, List

import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes_config
from torch.nn import functional as F

from balanced_d2.export.batched import BatchDeployable, PaddedDeployable, Suppression
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
    model: nn.Module,
    image: torch.Tensor,
    suppression: Suppression = suppress,
    strict: bool = False,
) -> torch.export.ExportedProgram:
    """:class:`BatchDeployable` of a model as a program for images of every number and size.

    Args:
        model, suppression: as for :class:`BatchDeployable`.
        image: an example, shape (3, H, W).
        strict: whether Python's bytecode is analysed, as for ``torch.export.export``, which checks
            more and takes longer. The program computes the same.

    Raises:
        UserError: if the model cannot be exported, or by this version of PyTorch.
    """
    deployable = BatchDeployable(model, suppression)
    example = image.float().expand(2, -1, -1, -1).contiguous()  # one would be taken for a constant
    sides = {2: Dim("height", min=1, max=MAX_SIDE), 3: Dim("width", min=1, max=MAX_SIDE)}
    return _export(deployable, (example,), ({0: _batch(), **sides},), strict=strict)


def export_padded_program(model: nn.Module, image: torch.Tensor) -> torch.export.ExportedProgram:
    """:class:`PaddedDeployable` of a model as a program for images of every number and size.

    Args:
        model, image: as for :func:`export_program`.

    Raises:
        UserError: as :func:`export_program` does.
    """
    deployable = PaddedDeployable(model)
    multiple = deployable.multiple
    padding = [length for side in image.shape[:0:-1] for length in (0, -side % multiple)]
    example = F.pad(image.float(), padding).expand(2, -1, -1, -1).contiguous()
    sizes = torch.tensor([image.shape[1:]] * 2)
    sides = {
        i: multiple * Dim(name, min=1, max=MAX_SIDE // multiple)
        for i, name in ((2, "rows"), (3, "columns"))
    }
    batch = _batch()
    # Sizes of 1 are as good as others.
    patch = symbolic_shapes_config.patch  # type: ignore[attr-defined]
    with patch(backed_size_oblivious=True):
        return _export(
            deployable,
            (example, sizes),
            ({0: batch, **sides}, {0: batch}),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _batch() -> Dim:
    return Dim("batch", min=1, max=MAX_BATCH)


def _export(
    deployable: BatchDeployable, example: tuple, shapes: tuple, **options: Any
) -> torch.export.ExportedProgram:
    if not hasattr(torch, "while_loop"):
        raise UserError(
            f"this export needs torch.while_loop, which PyTorch {torch.__version__} does not have; "
            "update PyTorch (2.14 is tried)"
        )
    with no_export_warnings(), torch.no_grad(), constant_padding(deployable.model):
        return torch.export.export(deployable, example, dynamic_shapes=shapes, **options)


@contextmanager
def constant_padding(model: nn.Module) -> Iterator[None]:
    """Let timm's convolutions with "same" padding pad by constants.

    They compute the padding from the size of their input, in expressions that ``torch.export``
    cannot simplify; and OpenVINO pads wrongly by what is computed, if the model is in int8. A
    detector pads its images to multiples of the coarsest stride, so that every input is a multiple
    of its convolution's stride, and then the padding is always the same.
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
