"""Measure this project against plain Detectron2 and straightforward code.

All variants of a comparison take turns (A B A B ...) in one process; a table shows the median, the
range and the median of the ratios turn by turn, so that a slow moment of the machine falls on all.
"""

import argparse
import json
import platform
import re
from datetime import date
from pathlib import Path

# First, so that importing Detectron2 is quiet.
from balanced_d2.benchmark import PARTS, Bench
from balanced_d2.engine.speed import has_fast_bfloat16
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import check_writable, raise_if_unwritable

# isort: split
import detectron2
import torch

# Export takes minutes, and packages that not everyone has.
DEFAULT_PARTS = [part for part in PARTS if part != "export"]
# Below, images would be smaller than the strides of a pyramid.
MIN_SCALE = 0.05


def processor() -> str:
    """The name of the CPU, and whether it has instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    name = names[0] if names else platform.machine()
    return f"{name}, {'with' if has_fast_bfloat16() else 'without'} bfloat16"


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs CUDA, which is not available")
    if args.turns < 1 or not MIN_SCALE <= args.scale <= 1:
        raise UserError(f"--turns has to be 1 or more, and --scale from {MIN_SCALE} to 1")
    if args.output:
        check_output(args.output)
    machine = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
        "turns": args.turns,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    torch.manual_seed(0)
    bench = Bench(args.device, args.turns)
    for name in args.only or DEFAULT_PARTS:
        PARTS[name](bench, args.scale)
    if args.output:
        text = json.dumps({"machine": machine, "results": bench.results}, indent=1)
        with raise_if_unwritable(args.output):
            Path(args.output).write_text(text + "\n")


def check_output(path: str) -> None:
    """Raise :class:`UserError` if figures could not be written to a file."""
    if Path(path).is_dir():
        raise UserError(f"--output {path} is a folder; give the name of a file in it")
    check_writable(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="what to measure (default: all but export)"
    )
    parser.add_argument("--turns", type=int, default=9, help="runs of each variant (default: 9)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help=f"scale of all images, for a quick look, from {MIN_SCALE} to 1 (default: 1)",
    )
    parser.add_argument("--output", metavar="FILE.json", help="also write all figures there")
    return parser.parse_args()
