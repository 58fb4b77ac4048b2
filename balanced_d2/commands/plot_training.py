"""Plot curves of one or several training runs from their metrics.json.

Shows loss terms, learning rate, AP, how many negatives were sampled from each bin of IoU, and how
rare, common and frequent classes fare: positives, their score, AP.
"""

import argparse

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.metrics import names_of_runs, read_metrics
from balanced_d2.visualization.figure import place_picture, save_figure
from balanced_d2.visualization.training_plot import draw_training


def main(args: argparse.Namespace) -> None:
    runs = {
        name: read_metrics(folder)
        for name, folder in zip(names_of_runs(args.folders), args.folders, strict=True)
    }
    picture = place_picture(args.output, args.folders[0], "training.png")
    save_figure(draw_training(runs), picture)
    print(f"picture: {picture}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of a training run")
    parser.add_argument(
        "--output", metavar="FILE.png|DIR", help="default: training.png in the first folder"
    )
    return parser.parse_args()
