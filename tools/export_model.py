#!/usr/bin/env python3
"""Write a trained detector as one file: the same as ``balanced-d2 export``."""

import sys

from balanced_d2.commands.export_model import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
