#!/usr/bin/env python3
"""Train and evaluate a detector: the same as ``balanced-d2 train``."""

import sys

from balanced_d2.commands.train import main, parse_args
from balanced_d2.engine import run

if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
