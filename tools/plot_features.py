#!/usr/bin/env python3
"""Draw a model's feature pyramid: the same as ``balanced-d2 plot-features``."""

import sys

from balanced_d2.commands.plot_features import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
