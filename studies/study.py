"""What all studies share: rows of options, trained over several seeds, with one JSON line a run.

Runs of one seed start from the same weights, where shapes agree, and see the same images in the
same order, unless a row is about the choice of images. A run that already has its line is not
repeated, and one that was interrupted continues from its last checkpoint.
"""

import argparse
import datetime
import fcntl
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Callable, Dict, List, NamedTuple, Optional, Sequence, Set

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.metrics import read_metrics
from balanced_d2.config import load_config
from balanced_d2.data.datasets.shapes import ShapesConfig, ensure_shapes
from balanced_d2.utils.arguments import DOTTED_KEY, split_at_key
from balanced_d2.utils.errors import UserError, check_choice, first_of, report_user_errors
from balanced_d2.utils.files import check_writable, open_replacing
from balanced_d2.utils.randomness import seed_all
from studies.levels import ap_by_level

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# Identifies the random numbers of initial weights; each use of a seed has its own number.
WEIGHT_SEEDS = 4

Options = Sequence[str] | Callable[[str], Sequence[str]]
"""Keys and values of a config, or a function that gives them for the training data's annotations,
a file in COCO's format."""


class Data(NamedTuple):
    """A data set of a study, and how it is trained on."""

    config: str
    """The YAML file of the plain row, in ``configs/``."""
    num_classes: int
    options: Sequence[str] = ()
    shapes: Optional[Callable[[int], ShapesConfig]] = None
    """For generated data: what is drawn for a seed."""


class Study(NamedTuple):
    rows: Dict[str, Options]
    """The options of each row, on top of the plain config."""
    variants: Dict[str, Options]
    """Rows that run only if they are named."""
    data: Dict[str, Data]
    program: str = "train_net.py"
    """What trains, from the project's root."""


class Run(NamedTuple):
    data: str
    row: str
    seed: int


def command(study: Study, description: str, output: str) -> int:
    """The program of a study: parse its arguments, train what is left to do; the exit code.

    Args:
        description: for ``--help``.
        output: the default folder for checkpoints and logs.
    """
    args = _parse_args(study, description, output)
    return report_user_errors(lambda args: _Program(study, args).run(), args)


class _Program:
    def __init__(self, study: Study, args: argparse.Namespace):
        self.args = args
        self.rows = {**study.rows, **study.variants}
        self.data = study.data[args.data]
        self.program = str(ROOT / study.program)
        self.config = str(ROOT / "configs" / self.data.config)
        self.threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)

    def run(self) -> None:
        args = self.args
        for row in args.rows:
            check_choice("row", row, self.rows)
        check_writable(args.results)
        lines = [line for line in read_lines(args.results) if line["data"] == args.data]
        iterations = self._load_config().SOLVER.MAX_ITER
        if any(line["iterations"] != iterations for line in lines):
            raise UserError(
                f"{args.results} has runs on {args.data} that are not of {iterations} iterations; "
                "give each length a file of its own"
            )
        self._check_output()
        done = self._done()
        runs = [Run(args.data, row, seed) for seed in args.seeds for row in args.rows]
        todo = [run for run in dict.fromkeys(runs) if run not in done]
        for seed in sorted({run.seed for run in todo}):
            if self.data.shapes is not None:
                ensure_shapes(self._shapes_folder(seed), self.data.shapes(seed))
            self._write_initial_weights(seed)
        failed = []
        with (
            ThreadPoolExecutor(args.jobs) as pool,
            tqdm(total=len(todo), desc=args.data, unit="run", disable=None) as bar,
        ):
            for run, error in zip(todo, pool.map(self._train, todo)):
                bar.update()
                failed += [f"{run.row}, seed {run.seed}: {error}"] if error else []
        if failed:
            raise UserError(f"{len(failed)} run(s) failed: {first_of(failed)}")

    def _check_output(self) -> None:
        """Raise :class:`UserError` if the output folder has runs of other options: these would be
        continued, and their initial weights used."""
        path = os.path.join(self.args.output, self.args.data, "options.json")
        check_writable(path)
        options = [self.data.config, *self._options()]
        if not os.path.exists(path):
            with open_replacing(path, "w") as file:
                json.dump(options, file)
        if json.loads(Path(path).read_text()) != options:
            raise UserError(
                f"{os.path.dirname(path)} has runs with other options, those in {path}; give these "
                "an --output of their own"
            )

    def _done(self) -> Set[Run]:
        lines = read_lines(self.args.results)
        return {Run(line["data"], line["row"], line["seed"]) for line in lines}

    def _shapes_folder(self, seed: int) -> str:
        """Data that are the same for all seeds are drawn once."""
        assert self.data.shapes is not None
        drawn_with = self.data.shapes(seed).seed
        return os.path.join(self.args.output, "data", f"{self.args.data}-{drawn_with}")

    def _annotations(self, seed: int, split: str) -> str:
        if self.data.shapes is not None:
            return os.path.join(self._shapes_folder(seed), f"{split}.json")
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        return os.path.join(root, self.args.data, f"{split}.json")

    def _initial_weights(self, seed: int) -> str:
        return os.path.join(self.args.output, self.args.data, f"initial-{seed}.pth")

    def _write_initial_weights(self, seed: int) -> None:
        """Write weights of the plain model, from which every row of the seed starts."""
        path = self._initial_weights(seed)
        if os.path.exists(path):
            return
        check_writable(path)
        seed_all(WEIGHT_SEEDS, seed)
        model = build_model(self._load_config())
        with open_replacing(path, "wb") as file:
            torch.save({"model": model.state_dict()}, file)

    def _options(self, row: Sequence[str] = ()) -> List[str]:
        # The number of classes by hand, because the initial weights are written without data.
        opts = ["MODEL.ROI_HEADS.NUM_CLASSES", str(self.data.num_classes), *self.data.options]
        if self.data.shapes is not None:
            opts += ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]
        return [*opts, *row, *self.args.opts]

    def _load_config(self, row: Sequence[str] = ()) -> CfgNode:
        return load_config(self.config, [*self._options(row), "MODEL.DEVICE", "cpu"])

    def _train(self, run: Run) -> str:
        """Train, evaluate and write the line of a run; return the error, or ""."""
        name = f"{run.row.replace(' ', '_')}-{run.seed}"
        folder = os.path.join(self.args.output, run.data, name)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "output.txt"), "a") as log:
            try:
                # A training holds it, too, and goes on if this program is killed.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "another process is at it"
            if run in self._done():  # meanwhile, by another process
                return ""
            return self._train_in(folder, run, log)

    def _train_in(self, folder: str, run: Run, log: IO[str]) -> str:
        row = self.rows[run.row]
        if callable(row):
            row = row(self._annotations(run.seed, "train"))
        opts = ["SEED", str(run.seed), "OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", "100"]
        opts += self._options(row)
        register = []
        if self.data.shapes is not None:
            for split in ("train", "val"):
                images = os.path.join(self._shapes_folder(run.seed), split)
                register += ["--register", split, self._annotations(run.seed, split), images]
        process = subprocess.Popen(
            [
                *(sys.executable, self.program, "--resume", *register),
                *("--config-file", self.config, *opts),
                *("MODEL.WEIGHTS", self._initial_weights(run.seed)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            return f"exit code {process.returncode}, see {log.name}"
        metrics = read_metrics(folder)
        results = {
            name.removeprefix("bbox/"): list(values.values())[-1]
            for name, values in metrics.items()
            if name.startswith("bbox/")
        }
        detections = os.path.join(folder, "inference", "coco_instances_results.json")
        # The levels of the plain row, so that all rows are compared on the same objects.
        plain = self._load_config()
        results.update(ap_by_level(plain, self._annotations(run.seed, "val"), detections))
        model = build_model(self._load_config(row))
        line = {
            **run._asdict(),
            "iterations": plain.SOLVER.MAX_ITER,
            "results": results,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds_per_iteration": statistics.median(metrics["time"].values()),
            "peak_memory_mib": round(usage.ru_maxrss / 1024),
            "threads": self.threads,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "options": [*row, *self.args.opts],
        }
        with open(self.args.results, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Only an interrupted run needs them, and those of a study would fill a disk.
        for path in Path(folder).glob("model_[0-9]*.pth"):
            path.unlink()
        return ""


def read_lines(path: str) -> List[Dict]:
    """The lines of a results file, none if there is no file."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path} is not a results file, or line {number} is cut off: {error}; without that "
                "line, its run is repeated"
            ) from error
    return results


def _parse_args(study: Study, description: str, output: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=next(iter(study.data)), choices=list(study.data))
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"], metavar="N")
    parser.add_argument("--rows", nargs="+", default=list(study.rows), metavar="ROW")
    parser.add_argument(
        "--results", required=True, metavar="FILE.jsonl", help="lines are appended to it"
    )
    parser.add_argument("--output", default=output, metavar="DIR", help="for checkpoints and logs")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at the same time, sharing the cores"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options for all rows"
    )
    args = parser.parse_args()
    # --rows and --seeds take all words that follow.
    args.rows, after_rows = split_at_key(args.rows, key=DOTTED_KEY)
    seeds, after_seeds = split_at_key(args.seeds, key=DOTTED_KEY)
    args.opts = after_rows + after_seeds + args.opts
    try:
        args.seeds = [int(seed) for seed in seeds]
    except ValueError:
        parser.error(f"--seeds takes whole numbers, not {' '.join(seeds)}")
    return args
