"""Names as they are, in matplotlib: no dollar sign begins a formula, and scripts need a font."""

import logging
import warnings
from functools import cache
from typing import Tuple

from matplotlib import font_manager, rcParams
from matplotlib.ft2font import FT2Font

rcParams["text.parse_math"] = False
# Said once, by use_font_for.
warnings.filterwarnings("ignore", message="Glyph .* missing from")


@cache
def use_font_for(names: Tuple[str, ...]) -> None:
    """Let matplotlib draw in an installed font that has all characters of some names.

    It stays as it is if it has them; if none has, there is a warning, and boxes are drawn.
    """
    needed = {ord(character) for name in names for character in name if not character.isspace()}
    default = font_manager.findfont(font_manager.FontProperties(family=["sans-serif"]))
    if needed <= _characters(default):
        return
    # Matplotlib's own LastResort has a box for every character.
    fonts = [f for f in font_manager.fontManager.ttflist if "LastResort" not in f.fname]
    upright = [f for f in fonts if f.style == "normal"]
    for font in sorted(upright, key=lambda f: (f.weight not in (400, "normal"), f.name)):
        if needed <= _characters(font.fname):
            rcParams["font.sans-serif"] = [font.name, *rcParams["font.sans-serif"]]
            return
    missing = "".join(map(chr, sorted(needed - _characters(default))))[:20]
    logging.getLogger(__name__).warning(
        f"no installed font has all characters of the class names, such as {missing}: boxes are "
        "drawn for them (on Debian, fonts-noto-cjk has those of Chinese, Japanese and Korean)"
    )


@cache
def _characters(file: str) -> frozenset:
    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):  # a font that matplotlib cannot read
        return frozenset()
