"""Reading images, also gray ones of more than 8 bits."""

import logging
import warnings
from typing import Optional, Tuple

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image, UnidentifiedImageError

from balanced_d2.utils.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageError(UserError):
    """An image that cannot be read."""


def read_image(
    path: str, format: str = "BGR", what: str = "image", gray_range: Optional[float] = None
) -> np.ndarray:
    """Read an image, rotated as its EXIF data says, as Detectron2 does.

    Detectron2 clips gray images of more than 8 bits (16-bit, 32-bit and float) at 255; here, their
    values from 0 to ``gray_range`` become 0 to 255. Alpha is ignored.

    Args:
        format: order of the channels, such as ``"BGR"`` or ``"RGB"``.
        what: what the message calls the image.
        gray_range: ``INPUT.GRAY_RANGE`` of the model; 0 if it has none, None to take the image's
            own (:func:`range_of`).

    Returns:
        uint8, shape (H, W, 3).

    Raises:
        ImageError: if it cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _pixels_of(image, format, gray_range)
    except READ_ERRORS as error:
        raise ImageError(f"cannot read the {what} {path}: {reason_of(error)}") from error


def take_image(
    image: np.ndarray | Image.Image, what: str = "the image", gray_range: Optional[float] = None
) -> np.ndarray:
    """An image that has been read already, as :func:`read_image` gives it in BGR.

    Args:
        image: of Pillow, or an array: uint8 of shape (H, W, 3), BGR as OpenCV reads it, or with
            alpha as the fourth channel, which is ignored; or gray of shape (H, W), of any type.
        what: what the message calls the image.
        gray_range: as for :func:`read_image`.

    Returns:
        uint8, shape (H, W, 3). An array that has this form is not copied.

    Raises:
        ImageError: if it is not such an image.
    """
    try:
        if isinstance(image, Image.Image):
            return _pixels_of(image, "BGR", gray_range)
        if not image.size:
            raise ValueError("it is empty")
        if image.ndim == 2:
            gray = image if image.dtype == np.uint8 else _to_8_bits(image, gray_range)
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] not in (3, 4) or image.dtype != np.uint8:
            raise ValueError(
                f"it is {image.dtype} of shape {image.shape}, not uint8 of shape (H, W, 3)"
            )
        return image[:, :, :3]
    except READ_ERRORS as error:
        raise ImageError(f"cannot take {what}: {reason_of(error)}") from error


def _pixels_of(image: Image.Image, format: str, gray_range: Optional[float]) -> np.ndarray:
    image.load()  # first, because it rotates a TIFF itself
    upright = detection_utils._apply_exif_orientation(image)
    if is_deep(image):
        upright = Image.fromarray(_to_8_bits(np.asarray(upright), gray_range))
    return detection_utils.convert_PIL_to_numpy(upright, format)


def reason_of(error: BaseException) -> str:
    """Why an image cannot be read, as text for the user."""
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it has more than the {max_pixels() / 1e6:.0f} megapixels allowed: cut it into tiles"
        )
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a format that Pillow reads"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def max_pixels() -> float:
    """How many pixels an image may have; Pillow refuses larger ones."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else np.inf


def size_of(image: Image.Image) -> Tuple[int, int]:
    """Width and height of an opened image once it is rotated, without reading its pixels."""
    width, height = image.size
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF data, which reading ignores too
        orientation = None
    is_turned = orientation in TURNED and image.format != "TIFF"  # whose size Pillow has turned
    return (height, width) if is_turned else (width, height)


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image is gray with more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def largest_value(path: str) -> Tuple[float, bool]:
    """The largest value of an image, and whether it has floats; 0 unless it :func:`is_deep`.

    Raises:
        ImageError: if it cannot be read, or has values that no range can have.
    """
    try:
        with Image.open(path) as image:
            if not is_deep(image):
                return 0.0, False
            pixels = np.asarray(image)
            _check_values(pixels)
            return float(pixels.max()), pixels.dtype.kind == "f"
    except READ_ERRORS as error:
        raise ImageError(f"cannot read the image {path}: {reason_of(error)}") from error


def range_of(largest: float, is_float: bool) -> float:
    """The range of gray images whose largest value is given: the next 2ⁿ - 1, at least 255; of
    floats 1, if none is above."""
    if is_float and largest <= 1:
        return 1.0
    return float(2 ** max(8, int(np.ceil(largest)).bit_length()) - 1)


def _check_values(pixels: np.ndarray) -> None:
    if not np.isfinite(pixels).all():
        raise ValueError("it has values that are not finite")
    if pixels.min() < 0:
        raise ValueError(
            f"it is gray with values from {pixels.min():g}: add a number so that 0 is black"
        )


def _to_8_bits(pixels: np.ndarray, gray_range: Optional[float]) -> np.ndarray:
    _check_values(pixels)
    if gray_range is None:
        gray_range = range_of(float(pixels.max()), pixels.dtype.kind == "f")
        log_first_n(
            logging.WARNING,
            "the range of gray images with more than 8 bits is not known (INPUT.GRAY_RANGE): it is "
            f"taken from each image, {gray_range:g} for the first",
            key="caller",
        )
    if not gray_range:
        raise ValueError(
            "it is gray with more than 8 bits, unlike the images that the model was trained on; "
            "set INPUT.GRAY_RANGE to the value that is white"
        )
    scaled = pixels.astype(np.float64) * (255 / gray_range)
    return np.rint(scaled).clip(0, 255).astype(np.uint8)
