"""A trial of a training: a few iterations, an evaluation of a few images, and a forecast."""

import itertools
import logging
import resource
import shutil
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any, Collection, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from balanced_d2.config.lazy import LazyCfgNode, evaluators_in
from balanced_d2.engine.after_evaluation import EarlyStopping
from balanced_d2.engine.hooks import StopOnSignal
from balanced_d2.engine.launch import in_main_process
from balanced_d2.engine.trainer import BalancedTrainer, size_of_checkpoint

logger = logging.getLogger(__name__)

# Iterations that are not counted, since memory, caches and workers are new in them, and those that
# are.
WARM_UP, COUNTED = 2, 5
# Of each test set.
NUM_IMAGES = 4
# What a trial leaves out of the iterations that it makes.
LEFT_OUT = (
    hooks.BestCheckpointer,
    hooks.EvalHook,
    hooks.PeriodicCheckpointer,
    hooks.PeriodicWriter,
    hooks.PreciseBN,
    EarlyStopping,
    StopOnSignal,
)


class Forecast(NamedTuple):
    """What a whole training will take."""

    iteration: float
    """Median time of an iteration, in seconds."""
    num_iterations: int
    evaluation: float
    """Time of an evaluation of all test sets, in seconds; without their metrics."""
    num_evaluations: int
    memory: int
    """The most that this process has used so far, in bytes: on the GPU, or on the CPU."""
    checkpoint: int
    """Size of a checkpoint in bytes, at most."""
    num_checkpoints: int

    @property
    def seconds(self) -> float:
        return self.iteration * self.num_iterations + self.evaluation * self.num_evaluations

    def __str__(self) -> str:
        return (
            f"{_time(self.seconds)} for the whole training: {self.num_iterations:,} iterations of "
            f"{self.iteration:.3g} s, {self.num_evaluations} evaluation(s) of "
            f"{_time(self.evaluation)}\n"
            f"{self.memory / 2**30:.1f} GiB of memory in this process, without the workers that "
            "load data\n"
            f"{self.checkpoint * self.num_checkpoints / 2**30:.1f} GiB on disk for "
            f"{self.num_checkpoints} checkpoint(s)"
        )


def set_apart(cfg: CfgNode) -> None:
    """Let a config write to a temporary folder only, the same in all processes, and to no
    service."""
    folder = in_main_process(tempfile.mkdtemp, prefix="balanced_d2_dry_run_")
    cfg.OUTPUT_DIR = folder
    cfg.WANDB.ENABLED = cfg.MLFLOW.ENABLED = False
    if isinstance(cfg, LazyCfgNode):
        cfg.lazy.train.output_dir = folder
        for evaluator in evaluators_in(cfg.lazy):
            if evaluator.get("output_dir"):
                evaluator.output_dir = folder


def dry_run(trainer_class: Type[BalancedTrainer], cfg: CfgNode) -> Forecast:
    """Try a training: all that it does, but little of it.

    Args:
        trainer_class: of the config.
        cfg: of :func:`set_apart`; its ``OUTPUT_DIR`` is deleted at the end.

    Returns:
        The forecast, which is also logged.
    """
    try:
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=False)
        periodic = [h for h in trainer._hooks if isinstance(h, hooks.PeriodicCheckpointer)]
        max_to_keep = periodic[0].max_to_keep if periodic else None  # a LazyConfig may limit it
        times = list(_iterations(trainer))
        evaluation, results = _evaluate(trainer)
        cfg, number = trainer.cfg, trainer.max_iter
        forecast = Forecast(
            statistics.median(times),
            number,
            evaluation,
            num_evaluations(number, cfg.TEST.EVAL_PERIOD) if cfg.DATASETS.TEST else 0,
            _memory(cfg),
            size_of_checkpoint(trainer),
            num_checkpoints(number, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep)
            + bool(cfg.TEST.BEST_CHECKPOINT.METRIC),
        )
        comm.synchronize()  # the others may still use the folder
    finally:
        if comm.is_main_process():
            shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    if comm.is_main_process():
        _check_metrics(cfg, results)
    spread = f"{min(times):.3g} to {max(times):.3g} s"
    logger.info(f"dry run, from {len(times)} iterations of {spread}:\n{forecast}")
    return forecast


def num_evaluations(num_iterations: int, period: int) -> int:
    """Number of evaluations in a training: one at its end, and those of ``TEST.EVAL_PERIOD``."""
    return (num_iterations - 1) // period + 1 if period > 0 else 1


def num_checkpoints(num_iterations: int, period: int, max_to_keep: Optional[int] = None) -> int:
    """Number of checkpoints that a training leaves: one at its end, and those of
    ``SOLVER.CHECKPOINT_PERIOD``, of which it may keep only the latest."""
    periodic = num_iterations // period
    return min(periodic, max_to_keep or periodic) + 1


def _iterations(trainer: BalancedTrainer) -> Iterator[float]:
    """Train; yield the time of each iteration that counts, in seconds."""
    kept = [hook for hook in trainer._hooks if not isinstance(hook, LEFT_OUT)]
    trainer._hooks[:] = kept
    number = min(WARM_UP + COUNTED, trainer.max_iter)  # there is no learning rate after that
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(number):
            start = _now(trainer.cfg)
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            if trainer.iter >= min(WARM_UP, number - 1):
                yield _now(trainer.cfg) - start


def _evaluate(trainer: BalancedTrainer) -> Tuple[float, Dict[str, float]]:
    """Evaluate a few images of each test set.

    Returns:
        The time that all images will take, in seconds, and the results in the main process.
    """
    seconds, results = 0.0, {}
    for name in trainer.cfg.DATASETS.TEST:
        loader = trainer.build_test_loader(trainer.cfg, name)
        few = _First(loader, NUM_IMAGES, trainer.cfg)
        logger.info(f"dry run: evaluating {len(few)} batch(es) of {name}; its AP means nothing")
        evaluator = trainer.build_evaluator(trainer.cfg, name)
        results[name] = inference_on_dataset(trainer.model, few, evaluator)
        seconds += few.seconds * len(loader)
    # As DefaultTrainer names them.
    return seconds, flatten_results_dict(
        results if len(results) > 1 else next(iter(results.values()), {})
    )


def _check_metrics(cfg: CfgNode, results: Collection[str]) -> None:
    """Warn of metrics that the evaluation does not have: a training stops there."""
    best, stopping = cfg.TEST.BEST_CHECKPOINT, cfg.SOLVER.EARLY_STOPPING
    for key, metric, is_on in (
        ("TEST.BEST_CHECKPOINT.METRIC", best.METRIC, bool(best.METRIC)),
        ("SOLVER.EARLY_STOPPING.METRIC", stopping.METRIC, stopping.PATIENCE > 0),
    ):
        if is_on and metric not in results:
            logger.warning(
                f"{key} is {metric!r}, but the evaluation gave: {', '.join(results) or 'nothing'}"
            )


class _First:
    """The first batches of a loader.

    Attributes:
        seconds: median time of a batch, of those after the first, which starts the workers.
    """

    def __init__(self, loader: Any, number: int, cfg: CfgNode):
        self.loader = loader
        self.number = min(number, len(loader))
        self.cfg = cfg
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[List]:
        moments = [_now(self.cfg)]
        for batch in itertools.islice(iter(self.loader), self.number):
            yield batch
            moments.append(_now(self.cfg))
        times = [after - before for before, after in zip(moments, moments[1:])]
        self.seconds = statistics.median(times[1:] or times)


def _now(cfg: CfgNode) -> float:
    if cfg.MODEL.DEVICE.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _memory(cfg: CfgNode) -> int:
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.max_memory_reserved()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB on Linux


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds >= 60 else f"{seconds:.2g} s"
