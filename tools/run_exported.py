#!/usr/bin/env python3
"""Run an exported detector on images: see balanced_d2/export/run_exported.py.

That file needs nothing of this project and can be copied beside the exported one.
"""

import runpy
from pathlib import Path

PROGRAM = "balanced_d2/export/run_exported.py"

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / PROGRAM), run_name="__main__")
