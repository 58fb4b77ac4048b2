"""Progress bars are shown in a terminal, but not written to a log file."""

import io
import logging
import sys

import pytest

from balanced_d2.utils.progress import WithBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "log file"])
def test_bar(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    logger, handler = logging.getLogger("balanced_d2"), logging.StreamHandler(stream)
    monkeypatch.setattr(logger, "handlers", [handler])
    bar = WithBar([3, 4, 5], desc="counting", unit="number")
    assert stream.getvalue() == ""  # nothing before the iteration starts
    assert len(bar) == 3
    for number in bar:
        if number == 4:
            logger.warning("in the middle")
    assert logger.handlers == [handler]
    text = stream.getvalue()
    if not stream.isatty():
        assert text == "in the middle\n"
        return
    assert "counting: 100%" in text and "3/3" in text
    # The line stands alone: the bar is cleared before it and drawn again after it.
    before, after = text.split("in the middle\n")
    assert before.endswith("\r") and "counting" in after
