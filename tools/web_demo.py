#!/usr/bin/env python3
"""Show a detector on a page in the browser: the same as ``balanced-d2 web-demo``."""

import sys

from balanced_d2.commands.web_demo import main, parse_args
from balanced_d2.utils.errors import report_user_errors

if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
