"""The range of a dataset's gray images of more than 8 bits (``INPUT.GRAY_RANGE``)."""

import logging
from typing import Sequence

from balanced_d2.data.checks.for_model import load
from balanced_d2.data.checks.image_headers import Header
from balanced_d2.data.image import largest_value, range_of
from balanced_d2.utils.progress import WithBar


def find_gray_range(names: Sequence[str]) -> float:
    """The range of all such images in the datasets together, 0 if there are none.

    All images are read.

    Args:
        names: the datasets that have such images, as
            :func:`balanced_d2.data.checks.for_model.check_datasets` says.

    Raises:
        UserError: if one cannot be read, or has negative values.
    """
    largest, any_float = 0.0, False
    for name in names:
        paths = list(dict.fromkeys(record["file_name"] for record in load(name)))
        for path in WithBar(paths, desc=f"range of {name}", unit="image"):
            if not isinstance(Header.of(path), Header):
                continue  # training reports it, or skips it
            value, is_float = largest_value(path)
            largest, any_float = max(largest, value), any_float or is_float
    if not names:
        return 0.0
    white = range_of(largest, any_float)
    logging.getLogger(__name__).info(
        f"{', '.join(names)}: gray images of more than 8 bits, with values up to {largest:g}: "
        f"{white:g} is white (INPUT.GRAY_RANGE)"
    )
    return white
