#!/usr/bin/env python3
"""Convert a COCO detector of torchvision: the same as ``balanced-d2 convert-torchvision``."""

import sys

from balanced_d2.commands.convert_torchvision_weights import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
