"""The ``--register`` argument: a user's own data set without Python."""

import argparse

from balanced_d2.data.datasets.coco import register_coco


def add_register_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--register",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "ANNOTATIONS.json", "IMAGE_DIR"),
        help="register a COCO-format data set under a name (repeatable)",
    )


def register_from(args: argparse.Namespace) -> None:
    """Register what was asked for. Needed in every process: data sets are registered per process.

    Raises:
        UserError: if a name is taken.
    """
    for name, json_file, image_root in args.register:
        register_coco(name, json_file, image_root)
