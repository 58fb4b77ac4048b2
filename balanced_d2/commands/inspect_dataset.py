"""Show what is imbalanced in datasets: one HTML page and one picture.

Images and boxes by class, sizes against the levels of the pyramid, overlaps, the rarest class, the
smallest and the largest boxes, what the data check finds, and what follows for a training. The
first dataset is taken for the training data.
"""

import argparse
import os
from typing import Optional

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.images import look_at
from balanced_d2.analysis.inspection import inspect
from balanced_d2.analysis.sampling import (
    SampledNegatives,
    check_samples_proposals,
    sample_negatives,
)
from balanced_d2.config.zoo import get_config_file
from balanced_d2.data import check_registered
from balanced_d2.data.checks.collect import findings_of, image_findings
from balanced_d2.data.checks.records import report
from balanced_d2.data.datasets.register import add_register_argument
from balanced_d2.engine import build_predictor, config_from, prepare_datasets
from balanced_d2.utils.arguments import DOTTED_KEY, split_at_key
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import check_writable
from balanced_d2.utils.progress import WithBar
from balanced_d2.visualization.crops import crop_groups
from balanced_d2.visualization.dataset_page import totals, write_page
from balanced_d2.visualization.dataset_sheet import draw_dataset_sheet
from balanced_d2.visualization.figure import save_figure

# isort: split
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

CONFIG = "Base-RCNN-FPN.yaml"


def main(args: argparse.Namespace) -> None:
    if args.iterations < 1:
        raise UserError(f"--iterations is {args.iterations}, but has to be at least 1")
    split_options(args)
    cfg = config_from(args)
    has_model = "MODEL.WEIGHTS" in args.opts
    if has_model:
        check_samples_proposals(cfg)
    folder = args.output or os.path.join(cfg.OUTPUT_DIR, "inspect")
    page, sheet = (os.path.join(folder, name) for name in ("inspect.html", "inspect.png"))
    check_writable(page)

    for name in args.names:
        check_registered(name)
    bar = WithBar(args.names, desc="checking data", unit="dataset")
    checked = {name: findings_of(name) for name in bar}
    for name, (of_split, _) in checked.items():
        report(name, [finding for finding in of_split if finding.refused])
    findings = {name: of_split for name, (of_split, _) in checked.items()}
    records = {name: of_split for name, (_, of_split) in checked.items()}

    looks = None
    if args.images:
        everything = [record for of_split in records.values() for record in of_split]
        looks = look_at(everything, os.path.join(folder, "images.json"))
        problems = {r["file_name"]: look.problem for r, look in zip(everything, looks)}
        for name in args.names:
            files = {record["file_name"] for record in records[name]}
            findings[name] += image_findings(
                {path: what for path, what in problems.items() if what and path in files}
            )
    negatives = negatives_of(cfg, args.names[0], args.iterations) if has_model else None

    found = inspect(cfg, records, findings, looks, negatives)
    if not len(found.data.boxes):
        raise UserError(f"there are no boxes in {', '.join(args.names)}: nothing to inspect")
    groups = crop_groups(found)
    config = os.path.relpath(args.config_file)
    write_page(found, groups, config, page)
    save_figure(draw_dataset_sheet(found, groups, f"{', '.join(args.names)}, {config}"), sheet)

    for name, numbers in totals(found):
        print(f"{name}: {', '.join(f'{number} {what}' for number, what in numbers)}")
    for name in args.names:
        for note in MetadataCatalog.get(name).get("notes", ()):
            print(f"data set {name!r}: {note}")
    for name, of_split in found.findings.items():
        for finding in of_split:
            print(f"data set {name!r}: {finding}")
    for line in found.advice:
        print(f"- {line}")
    print(f"page: {page}; picture: {sheet}")


def negatives_of(cfg: CfgNode, name: str, num_iterations: int) -> Optional[SampledNegatives]:
    """What each sampler takes of the model's proposals on a dataset."""
    cfg = cfg.clone()
    cfg.SEED = max(cfg.SEED, 0)  # the same figures every time
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    prepare_datasets(cfg)
    return sample_negatives(cfg, build_predictor(cfg, "sample from").model, num_iterations)


def split_options(args: argparse.Namespace) -> None:
    """Move ``KEY VALUE`` pairs that have been taken for names to the options."""
    names, args.opts = split_at_key(args.names, key=DOTTED_KEY)
    args.names = list(dict.fromkeys(names))
    if not args.names:
        raise UserError("give the name of at least one dataset")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME [NAME ...] [KEY VALUE ...]",
        help="registered datasets, the training data first; then config options, of which "
        "MODEL.WEIGHTS adds the hard share of that model's negatives",
    )
    parser.add_argument(
        "--config-file",
        default=get_config_file(CONFIG),
        metavar="FILE.yaml",
        help="for the size of images and the levels of the pyramid (default: configs/"
        "Base-RCNN-FPN.yaml)",
    )
    parser.add_argument(
        "--images",
        action="store_true",
        help="also open every image: which cannot be read, and which are there twice",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=20,
        metavar="N",
        help="with MODEL.WEIGHTS, number of batches of SOLVER.IMS_PER_BATCH images (default: 20)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of inspect.html and inspect.png (default: inspect in the config's OUTPUT_DIR)",
    )
    add_register_argument(parser)
    # Options may stand before and after the names.
    return parser.parse_intermixed_args()
