#!/usr/bin/env python3
"""Print what is wrong in datasets: the same as ``balanced-d2 check``."""

import sys

from balanced_d2.commands.check_dataset import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
