"""Images of the user's."""

import numpy as np
from detectron2.data.detection_utils import read_image

from balanced_d2.errors import UserError


def read_bgr(path: str) -> np.ndarray:
    """Read an image, turned as its EXIF says.

    Returns:
        uint8, shape (H, W, 3), BGR.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return read_image(path, format="BGR")
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read the image {path}: {reason}") from error
