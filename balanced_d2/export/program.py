"""Export by ``torch.export``."""

import json

import torch
from torch import nn

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
    with no_export_warnings(), torch.no_grad():
        return torch.export.export(
            deployable, (example,), dynamic_shapes={"images": shapes}, strict=False
        )
