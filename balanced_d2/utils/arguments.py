"""Words of a command line that argparse cannot tell apart."""

import os
import re
from typing import List, Sequence, Tuple

# SOLVER.MAX_ITER, or train.max_iter=5 of a LazyConfig.
KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*|[+~]*[A-Za-z_][\w.]*=.*", re.DOTALL)
# Where the words before may be names in capitals.
DOTTED_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")


def split_at_key(
    words: Sequence[str], start: int = 0, key: re.Pattern = KEY
) -> Tuple[List[str], List[str]]:
    """Divide words into names and the options of a config that follow them.

    Args:
        start: the first word that may be an option.
        key: what a key looks like.

    Returns:
        The words up to the first that looks like a key of a config and is not a file, and the rest.
    """
    for i, word in enumerate(words):
        if i >= start and key.fullmatch(word) and not os.path.exists(word):
            return list(words[:i]), list(words[i:])
    return list(words), []
