"""Reading the user's images."""

import numpy as np
from detectron2.data import detection_utils

from balanced_d2.utils.errors import UserError


def read_image(path: str, format: str = "BGR", what: str = "image") -> np.ndarray:
    """Read an image with Detectron2's reader, rotated as its EXIF data says.

    Args:
        format: order of the channels, such as ``"BGR"`` or ``"RGB"``.
        what: what the message calls the image.

    Returns:
        uint8, shape (H, W, 3).

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return detection_utils.read_image(path, format=format)
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read the {what} {path}: {reason}") from error
