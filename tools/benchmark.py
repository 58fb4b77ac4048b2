#!/usr/bin/env python3
"""Measure this project against plain Detectron2: the same as ``balanced-d2 benchmark``."""

import sys

from balanced_d2.commands.benchmark import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
