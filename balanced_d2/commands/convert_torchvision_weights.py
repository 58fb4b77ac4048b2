"""Convert a COCO detector of torchvision for configs/Torchvision/*.yaml.

No pickled code in a checkpoint is run.
"""

import argparse
import os

# First, so that importing Detectron2 is quiet.
from balanced_d2.checkpoint import conversion, torchvision
from balanced_d2.checkpoint.unpickle import load_inert
from balanced_d2.config import load_config
from balanced_d2.config.zoo import get_config_file
from balanced_d2.utils.errors import UserError


def main(args: argparse.Namespace) -> None:
    is_file = os.path.exists(args.weights) or args.weights.endswith((".pth", ".pt"))
    checkpoint = load_inert(args.weights) if is_file else torchvision.download(args.weights)
    conversion.check_output(args.weights, args.output)
    try:
        state = conversion.state_dict_of(checkpoint, "model")
        recognised = torchvision.recognise(state, args.epsilon)
        cfg = load_config(
            get_config_file(f"{recognised.project}/{recognised.config}"), recognised.options
        )
        converted = torchvision.convert(state, recognised, cfg)
    except UserError as error:
        raise UserError(f"{args.weights}: {error}") from error
    conversion.write(converted, recognised, args.output)


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
