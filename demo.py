#!/usr/bin/env python3
"""Run a detector on images and videos: the same as ``balanced-d2 detect``."""

import sys

from balanced_d2.commands.detect import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
