"""Export by ``torch.export``: a program to load, or compiled ahead of time by AOTInductor."""

import json
import os
import shutil
import zipfile

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

COMPILERS = ("g++", "clang++")


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


def export_aoti(model: nn.Module, image: torch.Tensor, path: str, metadata: dict) -> None:
    """Write a detector as a package that AOTInductor has compiled for this kind of machine.

    Args:
        model, image, metadata: as for :func:`export_pt2`.
        path: the same, ending in ``.pt2``.

    Raises:
        UserError: also if there is no C++ compiler.
    """
    check_compiler()
    program = export_program(model, image)
    with replacing(path) as temporary, no_export_warnings():
        torch._inductor.aoti_compile_and_package(program, package_path=temporary)
        # Where torch.export.save has it, so that readers find it in the same way.
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{folder}/extra/{METADATA_FILE}", json.dumps(metadata))


def check_compiler() -> None:
    """Raise :class:`UserError` if there is no C++ compiler, which AOTInductor needs."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--format aoti needs a C++ compiler, and none of {', '.join(names)} was found; "
            "install g++, or use --format pt2"
        )


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
        strict: whether Python's bytecode is analysed, as for ``torch.export.export``.
    """
    deployable = BatchDeployable(model, suppression)
    example = image.float().expand(2, -1, -1, -1).contiguous()  # one would be taken for a constant
    shapes = {
        0: torch.export.Dim("batch", min=1, max=MAX_BATCH),
        2: torch.export.Dim("height", min=1, max=MAX_SIDE),
        3: torch.export.Dim("width", min=1, max=MAX_SIDE),
    }
    with no_export_warnings(), torch.no_grad():
        return torch.export.export(
            deployable, (example,), dynamic_shapes={"images": shapes}, strict=strict
        )
