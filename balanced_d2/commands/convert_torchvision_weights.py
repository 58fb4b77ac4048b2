"""Convert a COCO detector of torchvision for configs/Torchvision/*.yaml.

No pickled code in a checkpoint is run.
"""

import argparse
import os
from functools import partial

# First, so that importing Detectron2 is quiet.
from balanced_d2.checkpoint import conversion, torchvision
from balanced_d2.checkpoint.unpickle import load_inert
from balanced_d2.config import load_config
from balanced_d2.config.zoo import get_config_file


def main(args: argparse.Namespace) -> None:
    is_file = os.path.exists(args.weights) or args.weights.endswith((".pth", ".pt"))
    checkpoint = load_inert(args.weights) if is_file else torchvision.download(args.weights)
    conversion.convert_file(
        args.weights,
        args.output,
        checkpoint,
        partial(torchvision.recognise, epsilon=args.epsilon),
        torchvision.convert,
        lambda config, options: load_config(get_config_file(config), options),
        key="model",
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a file with a state dict, or weights that torchvision downloads, such as "
        "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    )
    parser.add_argument("output", metavar="OUTPUT.pth")
    parser.add_argument(
        "--epsilon",
        type=float,
        help="of the model's batch norm, if it is not that of the published weights: 1e-5 for a "
        "version 1 that was trained with frozen batch norm from ImageNet weights only",
    )
    return parser.parse_args()
