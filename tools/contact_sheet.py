#!/usr/bin/env python3
"""Draw detections beside the ground truth: the same as ``balanced-d2 contact-sheet``."""

import sys

from balanced_d2.commands.contact_sheet import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
