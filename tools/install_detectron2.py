#!/usr/bin/env python3
"""Install Detectron2 0.6 without compiling it: see balanced_d2/installation/."""

import runpy
from pathlib import Path

PROGRAM = "balanced_d2/installation/install_detectron2.py"

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / PROGRAM), run_name="__main__")
