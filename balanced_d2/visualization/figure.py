"""Matplotlib figures that need no window and are written completely or not at all."""

import os
from typing import Any, Dict, Optional, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import check_writable, replacing

FORMATS = (".pdf", ".png", ".svg", ".webp")
COLORS = ("#3b6ea5", "#c8553d", "#4f9d69", "#8e6bb0", "#c9a227", "#4aa3a2", "#8a8a8a", "#b0668f")
GREY = "#555555"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure with a size in inches, which does not affect the state of pyplot."""
    return Figure((width, height), dpi=100, layout="constrained")


def place_picture(
    output: Optional[str], folder: str, name: str, formats: Sequence[str] = FORMATS
) -> str:
    """The path to which a program will write its figure, checked before it is drawn.

    Args:
        output: the file or folder given by the user; None for the default.
        folder: the default folder.
        name: name of the file within a folder.
        formats: the suffixes of files that can be written.

    Raises:
        UserError: if the path is not writable, or its suffix is not a supported format.
    """
    path = output or folder
    suffix = os.path.splitext(path)[1].lower()
    if not output or os.path.isdir(path) or not suffix:
        path = os.path.join(path, name)
    elif suffix not in formats:
        raise UserError(f"{path}: the name of a picture has to end in one of {', '.join(formats)}")
    check_writable(path)
    return path


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure in the format given by the suffix of its path.

    Raises:
        UserError: if the folder cannot be written to.
    """
    # Makes the file smaller; the other formats do not have this option.
    options: Dict[str, Any] = {}
    if path.lower().endswith(".png"):
        options["pil_kwargs"] = {"optimize": True}
    with replacing(path) as file:
        figure.savefig(file, **options)


def as_image(figure: Figure) -> np.ndarray:
    """A figure as pixels: uint8, shape (H, W, 3), RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
