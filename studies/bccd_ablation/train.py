#!/usr/bin/env python3
"""Train every row of the ablation over several seeds, and write one JSON line for each run.

Runs of one seed start from the same weights, where shapes agree, and see the same images in the
same order. A run that already has its line is not repeated, and one that was interrupted continues
from its last checkpoint.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.metrics import read_metrics
from balanced_d2.config import load_config
from balanced_d2.data.datasets.shapes import CLASSES, ShapesConfig, ensure_shapes
from balanced_d2.utils.errors import UserError, check_choice, first_of, report_user_errors
from balanced_d2.utils.files import check_writable, open_replacing
from balanced_d2.utils.randomness import seed_all

# isort: split
import torch
from detectron2.modeling import build_model
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "BCCD" / "faster_rcnn_R_18_FPN.yaml")

SAMPLING = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced"]
FEATURES = ["MODEL.BALANCED_FPN.ENABLED", "True"]
LOSS = ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_l1"]
INSTANCES = ["MODEL.ROI_HEADS.POSITIVE_SAMPLER", "instance_balanced"]
ROWS = {
    "plain": [],
    "sampling": SAMPLING,
    "feature balance": FEATURES,
    "Balanced L1": LOSS,
    "sampling and Balanced L1": [*SAMPLING, *LOSS],
    "all": [*SAMPLING, *FEATURES, *LOSS],
    "all, instance-balanced positives": [*SAMPLING, *FEATURES, *LOSS, *INSTANCES],
}
"""The options of each row, on top of the plain config."""

VARIANTS = {
    "plain, smooth L1": ["MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0"],
    "sampling and Balanced L1, 10 bins": [*SAMPLING, *LOSS, "MODEL.ROI_HEADS.NUM_BINS", "10"],
    "sampling and Balanced L1, box loss twice": [
        *(*SAMPLING, *LOSS, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "2.0")
    ],
    "all, averaged only": [*ROWS["all"], "MODEL.BALANCED_FPN.REFINE_TYPE", "none"],
    "all, refined at P3": [*ROWS["all"], "MODEL.BALANCED_FPN.REFINE_LEVEL", "1"],
}
"""Rows for tuning, which run only if they are named."""

ALL_ROWS = {**ROWS, **VARIANTS}

SHAPES = {
    "shapes_1": ShapesConfig(shape_size=(28.0, 36.0)),
    "shapes_3": ShapesConfig(shape_size=(18.3, 55.0)),
    "shapes_7": ShapesConfig(),
}
"""Generated data, named by the approximate ratio of its largest to its smallest shape."""

# Identifies the random numbers of initial weights; each use of a seed has its own number.
WEIGHT_SEEDS = 4


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
        check_choice("row", row, ALL_ROWS)
    check_writable(args.results)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    study = Study(args.output, args.results, threads, args.opts)
    done = {Run(line["data"], line["row"], line["seed"]) for line in read_lines(args.results)}
    runs = [Run(args.data, row, seed) for seed in args.seeds for row in args.rows]
    todo = [run for run in runs if run not in done]
    if args.data in SHAPES:
        ensure_shapes(shapes_folder(study, args.data), SHAPES[args.data])
    for seed in sorted({run.seed for run in todo}):
        write_initial_weights(study, args.data, seed)
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


def read_lines(path: str) -> List[Dict]:
    """The lines of a results file, none if there is no file."""
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is not a results file: {error}") from error


def shapes_folder(study: Study, data: str) -> str:
    return os.path.join(study.output, "data", data)


def initial_weights(study: Study, data: str, seed: int) -> str:
    return os.path.join(study.output, data, f"initial-{seed}.pth")


def options(study: Study, run: Run) -> List[str]:
    """The options of a run, except for its weights."""
    opts = ["SEED", str(run.seed), "OUTPUT_DIR", run.folder(study.output)]
    opts += ["SOLVER.CHECKPOINT_PERIOD", "100"]
    # By hand, because the initial weights are written without data.
    number = len(CLASSES) if run.data in SHAPES else 3
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", str(number)]
    if run.data in SHAPES:
        opts += ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]
        opts += ["SOLVER.MAX_ITER", "280"]
        opts += ["INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "128"]
    return [*opts, *ALL_ROWS[run.row], *study.opts]


def write_initial_weights(study: Study, data: str, seed: int) -> None:
    """Write weights of the plain model, from which every row of the seed starts."""
    path = initial_weights(study, data, seed)
    if os.path.exists(path):
        return
    check_writable(path)
    opts = [*options(study, Run(data, "plain", seed)), "MODEL.DEVICE", "cpu"]
    seed_all(WEIGHT_SEEDS, seed)
    model = build_model(load_config(CONFIG, opts))
    with open_replacing(path, "wb") as file:
        torch.save({"model": model.state_dict()}, file)


def train(study: Study, run: Run) -> str:
    """Train, evaluate and write the line of a run; return the error, or ""."""
    folder = run.folder(study.output)
    os.makedirs(folder, exist_ok=True)
    opts = options(study, run)
    register = []
    if run.data in SHAPES:
        shapes = shapes_folder(study, run.data)
        for split in ("train", "val"):
            files = os.path.join(shapes, f"{split}.json"), os.path.join(shapes, split)
            register += ["--register", split, *files]
    weights = ["MODEL.WEIGHTS", initial_weights(study, run.data, run.seed)]
    error, figures = measure(CONFIG, [*opts, *weights], register, study.threads)
    if not error:
        options_of_row = [*ALL_ROWS[run.row], *study.opts]
        append_line(study.results, {**run._asdict(), **figures, "options": options_of_row})
    return error


def measure(
    config: str, opts: Sequence[str], register: Sequence[str], threads: int
) -> Tuple[str, Dict]:
    """Train and evaluate, or go on where a training was interrupted.

    Args:
        config: the YAML file.
        opts: its options, with ``OUTPUT_DIR``, which exists.
        register: arguments ``--register NAME PATH PATH`` of ``train_net.py``, repeated.
        threads: how many PyTorch uses.

    Returns:
        The error, or "", and the figures of the run.
    """
    folder = opts[list(opts).index("OUTPUT_DIR") + 1]
    with open(os.path.join(folder, "output.txt"), "a") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "train_net.py"), "--resume", *register),
                *("--config-file", config, *opts),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return f"exit code {process.returncode}, see {log.name}", {}
    metrics = read_metrics(folder)
    cfg = load_config(config, [*opts, "MODEL.DEVICE", "meta"])
    parameters = sum(p.numel() for p in build_model(cfg).parameters())
    return "", {
        "iterations": cfg.SOLVER.MAX_ITER,
        "results": {
            name.removeprefix("bbox/"): list(values.values())[-1]
            for name, values in metrics.items()
            if name.startswith("bbox/")
        },
        "parameters": parameters,
        "seconds_per_iteration": statistics.median(metrics["time"].values()),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
        "threads": threads,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def append_line(path: str, line: Dict) -> None:
    """Append a line to a results file, on disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="bccd", choices=["bccd", *SHAPES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--results", required=True, metavar="FILE.jsonl", help="lines are appended to it"
    )
    parser.add_argument(
        "--output", default="output/study", metavar="DIR", help="for checkpoints and logs"
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
