"""Turn a Libra R-CNN checkpoint of MMDetection into one for configs/MMDetection/libra_*.yaml.

Nothing that is pickled in the checkpoint is run, and MMDetection is not needed.
"""

import argparse

# First, so that importing Detectron2 is quiet.
from balanced_d2.checkpoint import conversion, mmdet
from balanced_d2.checkpoint.unpickle import load_inert
from balanced_d2.config import load_config
from balanced_d2.config.zoo import get_config_file


def main(args: argparse.Namespace) -> None:
    conversion.convert_file(
        args.checkpoint,
        args.output,
        load_inert(args.checkpoint),
        mmdet.recognise,
        mmdet.convert,
        lambda config, options: load_config(get_config_file(config), options),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT.pth", help="of MMDetection")
    parser.add_argument("output", metavar="OUTPUT.pth")
    return parser.parse_args()
