"""Progress of what is logged about meanwhile."""

import logging
from typing import Iterator, Sized

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

LOGGERS = ("balanced_d2", "detectron2", "fvcore")


class WithBar:
    """An iterable that shows in a terminal how far it is, and in a log file nothing.

    Lines that are logged meanwhile are written above the bar.

    Args:
        iterable: of known length.
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
