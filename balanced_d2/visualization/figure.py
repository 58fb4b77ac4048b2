"""Figures of matplotlib that are drawn without a window and written whole."""

from typing import Any, Dict

from matplotlib.figure import Figure

from balanced_d2.errors import UserError
from balanced_d2.files import check_writable, replacing

FORMATS = (".pdf", ".png", ".svg", ".webp")
COLORS = ("#3b6ea5", "#c8553d", "#4f9d69", "#8e6bb0", "#c9a227", "#4aa3a2", "#8a8a8a", "#b0668f")
GREY = "#555555"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, which does not touch the state of pyplot."""
    return Figure((width, height), dpi=100, layout="constrained")


def check_picture(path: str) -> None:
    """Raise :class:`UserError` if a figure cannot be written to ``path``, before it is drawn."""
    if not path.lower().endswith(FORMATS):
        raise UserError(f"{path}: the name of a picture has to end in {', '.join(FORMATS)}")
    check_writable(path)


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
