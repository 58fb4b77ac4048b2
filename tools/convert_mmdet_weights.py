#!/usr/bin/env python3
"""Convert a Libra R-CNN checkpoint of MMDetection for configs/MMDetection/libra_*.yaml.

No pickled code in the checkpoint is run, and MMDetection is not needed.
"""

import argparse
import os
import sys
from pathlib import Path

# First, so that importing Detectron2 is quiet.
from balanced_d2.checkpoint import mmdet
from balanced_d2.checkpoint.unpickle import load_inert
from balanced_d2.config import load_config
from balanced_d2.utils.errors import UserError, report_user_errors
from balanced_d2.utils.files import check_writable, replacing

# isort: split
import torch

ROOT = Path(__file__).resolve().parent.parent


def main(args: argparse.Namespace) -> None:
    checkpoint = load_inert(args.checkpoint)
    if os.path.exists(args.output) and os.path.samefile(args.checkpoint, args.output):
        raise UserError(f"the output would replace the checkpoint {args.checkpoint}")
    check_writable(args.output)
    try:
        state = mmdet.state_dict_of(checkpoint)
        recognised = mmdet.recognise(state)
        config = f"configs/MMDetection/{recognised.config}"
        cfg = load_config(str(ROOT / config), recognised.options)
        converted = mmdet.convert(state, recognised, cfg)
    except UserError as error:
        raise UserError(f"{args.checkpoint}: {error}") from error
    print(f"recognised: {recognised}", flush=True)
    write(converted, args.output)
    size = os.path.getsize(args.output) / 1e6
    print(f"written: {args.output} ({len(converted)} tensors, {size:.1f} MB)")
    options = " ".join(["MODEL.WEIGHTS", args.output, *recognised.options])
    print(f"use it with: --config-file {config} {options}")


def write(state: mmdet.State, path: str) -> None:
    try:
        with replacing(path) as temporary:
            torch.save({"model": state, "__author__": "MMDetection"}, temporary)
    except (OSError, RuntimeError) as error:  # PyTorch raises the second for a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}") from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT.pth", help="MMDetection's checkpoint")
    parser.add_argument("output", metavar="OUTPUT.pth")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
