"""The ``--register`` argument: a user's own dataset without Python code."""

import argparse

from balanced_d2.data.datasets.coco import register_coco


def add_register_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--register",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS.json", "IMAGE_DIR"),
        help="register a COCO-format dataset under a name (repeatable)",
    )


def register_from(args: argparse.Namespace) -> None:
    """Register the datasets of ``--register``. Each process has to do this for itself.

    Raises:
        UserError: if a name is already taken.
    """
    for name, json_file, image_root in args.register:
        register_coco(name, json_file, image_root)
