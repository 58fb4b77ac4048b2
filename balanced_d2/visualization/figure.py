"""Figures of matplotlib that are drawn without a window and written whole."""

import os
from typing import Any, Dict, Optional

from matplotlib.figure import Figure

from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import check_writable, replacing

FORMATS = (".pdf", ".png", ".svg", ".webp")
COLORS = ("#3b6ea5", "#c8553d", "#4f9d69", "#8e6bb0", "#c9a227", "#4aa3a2", "#8a8a8a", "#b0668f")
GREY = "#555555"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, which does not touch the state of pyplot."""
    return Figure((width, height), dpi=100, layout="constrained")


def place_picture(output: Optional[str], folder: str, name: str) -> str:
    """Where a program writes its figure, before it is drawn.

    Args:
        output: what the user asks for, a file or a folder; None for the default.
        folder: where it goes by default.
        name: of the file in a folder.

    Raises:
        UserError: if it cannot be written there, or in the format that its name ends in.
    """
    path = output or folder
    suffix = os.path.splitext(path)[1].lower()
    if not output or os.path.isdir(path) or not suffix:
        path = os.path.join(path, name)
    elif suffix not in FORMATS:
        raise UserError(f"{path}: the name of a picture has to end in {', '.join(FORMATS)}")
    check_writable(path)
    return path


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure in the format that its name ends in.

    Raises:
        UserError: if the folder cannot be written to.
    """
    # Smaller files of the same picture; the other formats know no such option.
    options: Dict[str, Any] = {}
    if path.lower().endswith(".png"):
        options["pil_kwargs"] = {"optimize": True}
    with replacing(path) as file:
        figure.savefig(file, **options)
