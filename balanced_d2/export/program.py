"""Export by ``torch.export``."""

import json
from types import MappingProxyType
from typing import Any, Callable, Mapping

import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes_config

from balanced_d2.export.batched import BatchDeployable, PaddedDeployable, Suppression
from balanced_d2.export.forwards import computed_by, constant_padding, symmetric_padding
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.nms import suppress
from balanced_d2.export.tracing import no_export_warnings
from balanced_d2.export.transposed_conv import convolve_transposed
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

# What an exported program takes at most.
MAX_BATCH = 1024
MAX_SIDE = 16384
# Of the example of padded images: three positions of a level of stride 256.
LEAST_SIDE = 768


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
    # A level of a single row or column would be taken for always so.
    sides = (max(side, LEAST_SIDE) for side in image.shape[1:])
    height, width = (-(-side // multiple) * multiple for side in sides)
    example = image.new_zeros(2, 3, height, width, dtype=torch.float32)
    sizes = torch.tensor([[height, width]] * 2)
    dims = {
        i: multiple * Dim(name, min=1, max=MAX_SIDE // multiple)
        for i, name in ((2, "rows"), (3, "columns"))
    }
    batch = _batch()
    transposed = (m for m in model.modules() if isinstance(m, nn.ConvTranspose2d))
    # Sizes of 1 are as good as others.
    patch = symbolic_shapes_config.patch  # type: ignore[attr-defined]
    with patch(backed_size_oblivious=True):
        return _export(
            deployable,
            (example, sizes),
            ({0: batch, **dims}, {0: batch}),
            forwards={
                # AOTInductor miscompiles them where the number of boxes is data.
                **dict.fromkeys(transposed, convolve_transposed),
                **symmetric_padding(model),
            },
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _batch() -> Dim:
    return Dim("batch", min=1, max=MAX_BATCH)


def _export(
    deployable: BatchDeployable,
    example: tuple,
    shapes: tuple,
    forwards: Mapping[nn.Module, Callable] = MappingProxyType({}),
    **options: Any,
) -> torch.export.ExportedProgram:
    """
    Args:
        forwards: for modules that are computed otherwise, see :func:`computed_by`.
        options: of ``torch.export.export``.
    """
    if not hasattr(torch, "while_loop"):
        raise UserError(
            f"this export needs torch.while_loop, which PyTorch {torch.__version__} does not have; "
            "update PyTorch (2.14 is tried)"
        )
    forwards = {**constant_padding(deployable), **forwards}
    with no_export_warnings(), torch.no_grad(), computed_by(forwards):
        return torch.export.export(deployable, example, dynamic_shapes=shapes, **options)
