"""Export by ``torch.export`` and AOTInductor: a program compiled ahead of time."""

import json
import os
import shutil
import zipfile

import torch
from torch import nn

from balanced_d2.export.batched import size_divisibility
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.program import export_padded_program
from balanced_d2.export.tracing import no_export_warnings
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

COMPILERS = ("g++", "clang++")
# Weights are laid out for oneDNN's convolutions. PyTorch's own are slower, and wrong where the
# number of boxes is data: the compiler takes their outputs for laid out in another way.
COMPILER_OPTIONS = {"freezing": True}


def export_aoti(model: nn.Module, image: torch.Tensor, path: str, metadata: dict) -> None:
    """Write a detector as a package compiled for the kind of CPU that this program runs on.

    A process loads it by ``torch._inductor.aoti_load_package`` with torch and torchvision alone; no
    compiler is needed there. What it takes and returns is said by
    :class:`balanced_d2.export.batched.PaddedDeployable`.

    Args:
        model: as for :class:`PaddedDeployable`. It stays as it is.
        image: an example, shape (3, H, W).
        path: the file, whose name ends in ``.pt2``. One that is there is replaced when the new one
            is complete.
        metadata: stored in the file as JSON, see :func:`balanced_d2.export.describe`, with
            ``size_divisibility``, what height and width of its input are multiples of.

    Raises:
        UserError: if there is no C++ compiler, the model cannot be exported or the file not be
            written.
    """
    if not path.endswith(".pt2"):
        raise UserError(f"{path}: the name of an AOTInductor package has to end in .pt2")
    check_compiler()
    program = export_padded_program(model, image)
    # Weights can be frozen only without gradients.
    with replacing(path) as temporary, no_export_warnings(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            program, package_path=temporary, inductor_configs=dict(COMPILER_OPTIONS)
        )
        # Where torch.export.save has it, so that readers find it in the same way.
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].split("/")[0]
            described = {**metadata, "size_divisibility": size_divisibility(model)}
            archive.writestr(f"{folder}/extra/{METADATA_FILE}", json.dumps(described))


def check_compiler() -> None:
    """Raise :class:`UserError` if there is no C++ compiler, which AOTInductor needs."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--format aoti needs a C++ compiler, and there is no {' or '.join(names)}; install "
            "one, or use --format pt2"
        )
