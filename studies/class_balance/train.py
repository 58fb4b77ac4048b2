#!/usr/bin/env python3
"""Train every way of balancing classes over several seeds, and write one JSON line for each run.

Run from the project's root: python -m studies.class_balance.train. Runs of one seed see the same
images in the same order, but for the rows that sample images. A run that already has its line is
not repeated, and one that was interrupted continues from its last checkpoint, so the study can be
run in parts. docs/imbalance.md says how it is analysed.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, NamedTuple

# First, so that importing Detectron2 is quiet.
from balanced_d2.data.class_balance import repeat_threshold
from balanced_d2.data.datasets.shapes import TAIL, ensure_shapes
from balanced_d2.utils.errors import UserError, check_choice, first_of, report_user_errors
from balanced_d2.utils.files import check_writable
from studies.bccd_ablation.train import append_line, measure, read_lines

# isort: split
from tqdm import tqdm

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

LOSS = "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE"
BETA = "MODEL.ROI_BOX_HEAD.CLASS_WEIGHT_BETA"
# THRESHOLD stands for the one that the training data suggest.
REPEAT = [
    *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
    *("DATALOADER.REPEAT_THRESHOLD", "THRESHOLD"),
]
ROWS = {
    "plain": [],
    "repeat factors": REPEAT,
    "uniform classes": ["DATALOADER.SAMPLER_TRAIN", "UniformClassTrainingSampler"],
    "inverse frequency": [LOSS, "weighted_cross_entropy", BETA, "1.0"],
    "effective number": [LOSS, "weighted_cross_entropy"],
    "focal": [LOSS, "focal"],
    "balanced softmax": [LOSS, "balanced_softmax"],
    "seesaw": [LOSS, "seesaw"],
    "seesaw, no objectness": [LOSS, "seesaw", "MODEL.ROI_BOX_HEAD.SEESAW_OBJECTNESS", "False"],
    "repeat factors and seesaw": [*REPEAT, LOSS, "seesaw"],
    "OHEM": ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem"],
}
"""The options of each row, on top of the plain config."""

DATA = {
    # Recommended for photographs; Aquarium's rarest class has 78 objects, its most frequent 1,960.
    "aquarium": "Aquarium/balanced_faster_rcnn_lite0_FPN_1x.yaml",
    # Generated, anew for each seed, with another order of the classes by frequency.
    "tail": "Demo/balanced_faster_rcnn_R_18_FPN.yaml",
}
"""The config of each data set, in configs/."""
TAIL_OPTIONS = ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]
TAIL_OPTIONS += ["SOLVER.MAX_ITER", "560"]


class Run(NamedTuple):
    data: str
    row: str
    seed: int

    def folder(self, output: str) -> str:
        return os.path.join(output, self.data, f"{self.row.replace(' ', '_')}-{self.seed}")


class Study(NamedTuple):
    """Settings that all runs share."""

    output: str
    results: str
    threads: int
    opts: List[str]
    """Config options for all rows."""


def main(args: argparse.Namespace) -> None:
    for row in args.rows:
        check_choice("row", row, ROWS)
    check_writable(args.results)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    study = Study(args.output, args.results, threads, args.opts)
    done = {Run(line["data"], line["row"], line["seed"]) for line in read_lines(args.results)}
    runs = [Run(args.data, row, seed) for seed in args.seeds for row in args.rows]
    todo = [run for run in runs if run not in done]
    if args.data == "tail":
        for seed in sorted({run.seed for run in todo}):
            ensure_shapes(tail_folder(study, seed), TAIL._replace(seed=seed))
    failed = []
    with (
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=len(todo), desc=args.data, unit="run", disable=None) as bar,
    ):
        for run, error in zip(todo, pool.map(lambda run: train(study, run), todo)):
            bar.update()
            failed += [f"{run.row}, seed {run.seed}: {error}"] if error else []
    if failed:
        raise UserError(f"{len(failed)} run(s) failed: {first_of(failed)}")


def tail_folder(study: Study, seed: int) -> str:
    return os.path.join(study.output, "data", f"tail-{seed}")


def annotations(study: Study, run: Run) -> str:
    """The annotation file of a run's training data."""
    if run.data == "tail":
        return os.path.join(tail_folder(study, run.seed), "train.json")
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, run.data, "train.json")


def threshold(json_file: str) -> float:
    """``DATALOADER.REPEAT_THRESHOLD`` as ``tools/inspect_dataset.py`` suggests it."""
    try:
        content = json.loads(Path(json_file).read_text())
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror}") from error
    images: Dict[int, set] = {}
    for annotation in content["annotations"]:
        images.setdefault(annotation["category_id"], set()).add(annotation["image_id"])
    number = len(set().union(*images.values()))
    return repeat_threshold([len(of_class) for of_class in images.values()], number)


def train(study: Study, run: Run) -> str:
    """Train, evaluate and write the line of a run; return the error, or ""."""
    row = ROWS[run.row]
    if "THRESHOLD" in row:
        found = f"{threshold(annotations(study, run)):g}"
        row = [found if word == "THRESHOLD" else word for word in row]
    folder = run.folder(study.output)
    os.makedirs(folder, exist_ok=True)
    opts = ["SEED", str(run.seed), "OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", "100"]
    register: List[str] = []
    if run.data == "tail":
        opts += TAIL_OPTIONS
        for split in ("train", "val"):
            data = tail_folder(study, run.seed)
            register += ["--register", split, f"{data}/{split}.json", f"{data}/{split}"]
    opts += [*row, *study.opts]
    error, figures = measure(str(CONFIGS / DATA[run.data]), opts, register, study.threads)
    if not error:
        options = [*row, *study.opts]
        append_line(study.results, {**run._asdict(), **figures, "options": options})
    return error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="tail", choices=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--results", required=True, metavar="FILE.jsonl", help="lines are appended to it"
    )
    parser.add_argument(
        "--output", default="output/class_balance", metavar="DIR", help="for checkpoints and logs"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at the same time, sharing the cores"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options for all rows"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
