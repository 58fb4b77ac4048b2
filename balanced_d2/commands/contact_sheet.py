"""Draw detections beside the ground truth of a dataset, as one picture."""

import argparse

# First, because it says which OpenCV to install if there is none.
from balanced_d2.data import add_register_argument, check_registered, register_from
from balanced_d2.evaluation.predictions import add_predictions_argument, load_predictions
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing
from balanced_d2.visualization import draw_contact_sheet
from balanced_d2.visualization.figure import place_picture

# isort: split
import cv2

NAME = "contact_sheet.png"
FORMATS = (".jpeg", ".jpg", ".png", ".webp")


def main(args: argparse.Namespace) -> None:
    if args.num_images < 1:
        raise UserError(f"--num-images is {args.num_images}, but has to be at least 1")
    picture = place_picture(args.output, ".", NAME, FORMATS)
    register_from(args)
    check_registered(args.dataset)
    sheet = draw_contact_sheet(
        args.dataset, load_predictions(args.predictions), args.num_images, args.threshold
    )
    with replacing(picture) as file:
        if not cv2.imwrite(file, sheet):
            raise UserError(f"cannot write {picture}")
    print(f"contact sheet: {picture}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_predictions_argument(parser)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered dataset")
    parser.add_argument("--output", required=True, metavar="FILE.png|DIR")
    parser.add_argument("--num-images", type=int, default=12, metavar="N")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="minimum score of a detection to be drawn",
    )
    add_register_argument(parser)
    return parser.parse_args()
