#!/usr/bin/env python3
"""Plot the IoU of the negatives that are sampled: the same as ``balanced-d2 plot-sampling``."""

import sys

from balanced_d2.commands.plot_sampling import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
