"""Progress bars that leave room for log messages."""

import logging
from typing import Iterator, Sized

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOGGERS = ("balanced_d2", "detectron2", "fvcore")


class WithBar:
    """An iterable with a progress bar, shown in a terminal but not written to a log file.

    Messages that are logged during the iteration are printed above the bar.

    Args:
        iterable: an iterable of known length.
        desc, unit: as for ``tqdm``.
    """

    def __init__(self, iterable: Sized, desc: str, unit: str):
        self.iterable = iterable
        self.desc, self.unit = desc, unit

    def __len__(self) -> int:
        return len(self.iterable)

    def __iter__(self) -> Iterator:
        with tqdm(self.iterable, desc=self.desc, unit=self.unit, disable=None) as bar:
            if bar.disable:
                yield from bar
                return
            with logging_redirect_tqdm(list(map(logging.getLogger, LOGGERS))):
                yield from bar
