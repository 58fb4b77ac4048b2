"""Plot the IoU of the negatives that are sampled from a trained model's proposals.

Random and IoU-balanced sampling choose from the same proposals on the images of DATASETS.TRAIN.
Writes a picture and, beside it, the counts as CSV; prints the share of each pyramid level.
"""

import argparse
import os

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.levels import levels_of
from balanced_d2.analysis.sampling import (
    HARD_IOU,
    check_samples_proposals,
    sample_negatives,
)
from balanced_d2.config.checks import check_weights
from balanced_d2.engine import (
    add_model_arguments,
    build_predictor,
    config_from,
    prepare_datasets,
)
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization.figure import place_picture, save_figure
from balanced_d2.visualization.sampling_plot import draw_sampling, write_histogram


def main(args: argparse.Namespace) -> None:
    if args.iterations < 1:
        raise UserError(f"--iterations is {args.iterations}, but has to be at least 1")
    cfg = config_from(args)
    check_samples_proposals(cfg)
    picture = place_picture(args.output, cfg.OUTPUT_DIR, "sampling.png")
    cfg.SEED = max(cfg.SEED, 0)  # the same plot every time
    cfg.DATASETS.TEST = ()
    check_weights(cfg, "sample from")
    prepare_datasets(cfg)
    model = build_predictor(cfg, "sample from").model
    negatives = sample_negatives(cfg, model, args.iterations)

    levels = levels_of(cfg)
    for name, of in (*negatives.sampled.items(), ("all negatives", negatives.available)):
        shares = zip(levels.names, levels.shares(of.sizes))
        print(
            f"{name:<14} {len(of.ious):>9,} negatives, {of.hard:6.1%} hard (IoU > {HARD_IOU:g}), "
            f"{', '.join(f'{share:.1%} on {level}' for level, share in shares)}"
        )
    table = os.path.splitext(picture)[0] + ".csv"
    title = f"{', '.join(cfg.DATASETS.TRAIN)}: {negatives.num_images} images"
    save_figure(draw_sampling(negatives, title), picture)
    write_histogram(negatives, table)
    print(f"picture: {picture}; counts: {table}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=50,
        metavar="N",
        help="number of batches of SOLVER.IMS_PER_BATCH images (default: 50)",
    )
    parser.add_argument(
        "--output", metavar="FILE.png|DIR", help="default: sampling.png in the config's OUTPUT_DIR"
    )
    add_model_arguments(parser)
    return parser.parse_args()
