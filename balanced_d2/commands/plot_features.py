"""Draw a trained model's feature pyramid for one image, before and after balancing.

Prints the energy of each level: the squared norm of the features, averaged over the positions.
"""

import argparse
import os

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.features import balance_levels, energy
from balanced_d2.data.image import read_image
from balanced_d2.engine import add_model_arguments, build_predictor, config_from
from balanced_d2.utils.files import check_keeps_inputs
from balanced_d2.visualization.feature_sheet import draw_features
from balanced_d2.visualization.figure import place_picture, save_figure


def main(args: argparse.Namespace) -> None:
    cfg = config_from(args)
    picture = place_picture(args.output, cfg.OUTPUT_DIR, "features.png")
    check_keeps_inputs([picture], [args.input])
    predictor = build_predictor(cfg, "visualize")
    image = read_image(args.input, gray_range=predictor.cfg.INPUT.GRAY_RANGE or None)
    levels = balance_levels(predictor, image)

    print(f"{'level':<6}{'size':>10}{'before':>12}{'after':>12}{'added':>12}{'after / before':>16}")
    for level in levels:
        before, after, added = map(energy, (level.before, level.after, level.added))
        size = "{} x {}".format(*level.before.shape)
        ratio = f"{after / before:.2f}" if before else "-"
        print(f"{level.name:<6}{size:>10}{before:>12.4g}{after:>12.4g}{added:>12.4g}{ratio:>16}")
    save_figure(draw_features(image[:, :, ::-1], levels, os.path.basename(args.input)), picture)
    print(f"picture: {picture}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, metavar="IMAGE")
    parser.add_argument(
        "--output", metavar="FILE.png|DIR", help="default: features.png in the config's OUTPUT_DIR"
    )
    add_model_arguments(parser)
    return parser.parse_args()
