#!/usr/bin/env python3
"""Show where a detector loses AP: the same as ``balanced-d2 analyze``."""

import sys

from balanced_d2.commands.analyze_errors import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
