"""What follows an evaluation during training: the best checkpoint is kept, and a training that no
longer improves is stopped."""

import logging
import math
import os
from typing import Any, Dict, NamedTuple

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from balanced_d2.checkpoint import BalancedCheckpointer, trainer_state
from balanced_d2.utils.errors import StopTraining, UserError

logger = logging.getLogger(__name__)


class StopEarly(StopTraining):
    """Ends training before its last iteration, and successfully."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=0)


def last_iteration(trainer) -> int:
    """The last iteration that a trainer has completed or is in."""
    return min(trainer.iter, trainer.max_iter - 1)  # the first is one more after the training


def is_due(trainer, period: int, iteration: int) -> bool:
    """Whether Detectron2's ``EvalHook`` evaluates after an iteration, which is not the last."""
    number = iteration + 1
    return period > 0 and number > 0 and number % period == 0 and number != trainer.max_iter


def value_of(metric: str, key: str, trainer, checkpointer: BalancedCheckpointer) -> float:
    """What the evaluation that has just ended gave for a metric; the same in all processes.

    Args:
        metric: as in ``metrics.json``, for example "bbox/AP".
        key: of the config, for the message.
        checkpointer: of the training.

    Raises:
        StopTraining: if the evaluation does not have this metric; the training is saved before.
    """
    storage, hints = trainer.storage, trainer.storage.smoothing_hints()
    new = {k: value for k, (value, number) in storage.latest().items() if number == storage.iter}
    results = [name for name in new if not hints[name] and "/" in name]
    new, results = comm.all_gather((new, results))[0]  # only the first process has results
    if metric in new:
        return float(new[metric])
    iteration = last_iteration(trainer)
    name = f"model_{iteration:07d}"
    checkpointer.save(name, iteration=iteration)
    raise StopTraining(
        f"{key} is {metric!r}, but the evaluation gave: {', '.join(results) or 'nothing'}. The "
        f"training is saved as {name}.pth: --resume continues it with one of these"
    )


class ResumableBestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which a resumed training continues: a better checkpoint of before is not
    overwritten.

    Its arguments are those of Detectron2's ``BestCheckpointer``. It has to be in all processes,
    behind the evaluation.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: BalancedCheckpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ):
        super().__init__(eval_period, checkpointer, val_metric, mode, file_prefix)
        self._mode = mode
        self.last_iter = -1  # of the last evaluation

    def is_missing(self, iteration: int) -> bool:
        """Whether the results of the evaluation after an iteration are not known yet."""
        return self.last_iter < iteration and is_due(self.trainer, self._period, iteration)

    def before_train(self):
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter == 0 or not os.path.isfile(path):
            return
        try:
            saved = trainer_state(path).get("hooks", {}).get(type(self).__qualname__)
        except UserError as error:
            logger.warning(f"{error}; the next evaluation replaces it")
            return
        # It may be of an evaluation after the checkpoint that the training resumes from.
        if saved and self._is_of_this(saved) and self._is_better(saved["best_metric"]):
            self._update_best(saved["best_metric"], saved["best_iter"])

    def _best_checking(self):
        iteration = last_iteration(self.trainer)
        if iteration <= self.last_iter:
            return
        value = value_of(
            self._val_metric, "TEST.BEST_CHECKPOINT.METRIC", self.trainer, self._checkpointer
        )
        self.last_iter = iteration
        best = "none before"
        if self.best_metric is not None:
            best = f"best before: {self.best_metric:.4f} after iteration {self.best_iter}"
        if not self._is_better(value):
            logger.info(f"{self._val_metric} is {value:.4f} ({best})")
            return
        self._update_best(value, iteration)  # before saving, so that the checkpoint has it
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        logger.info(f"{self._val_metric} is {value:.4f} ({best}): saved as {self._file_prefix}.pth")

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        return self.best_metric is None or self._compare(value, self.best_metric)

    def _is_of_this(self, state: Dict[str, Any]) -> bool:
        return (state["metric"], state["mode"]) == (self._val_metric, self._mode)

    def state_dict(self):
        return {
            "metric": self._val_metric,
            "mode": self._mode,
            "best_metric": self.best_metric,
            "best_iter": self.best_iter,
            "last_iter": self.last_iter,
        }

    def load_state_dict(self, state_dict):
        if not self._is_of_this(state_dict):
            logger.warning(
                f"{self._file_prefix}.pth was chosen by {state_dict['metric']} "
                f"({state_dict['mode']}); the next evaluation replaces it"
            )
            return
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]
        self.last_iter = state_dict["last_iter"]


class Progress(NamedTuple):
    """How far a metric has come."""

    best: float
    """NaN before there is a value."""
    best_iter: int
    """The iteration after which it was the best."""
    waited: int
    """Number of evaluations since then."""


class EarlyStopping(HookBase):
    """Ends training once a metric has not improved in a number of evaluations.

    Training then ends as after its last iteration: ``model_final.pth`` is saved, and the last
    evaluation is the final one. Nothing but the values of the metric is kept, so that other
    settings judge a resumed training as if they had been there from the beginning.

    Args:
        eval_period: of Detectron2's ``EvalHook``. The hook has to be in all processes, behind that.
        checkpointer: saves ``model_final.pth``.
        metric: as in ``metrics.json``, for example "bbox/AP".
        patience: the number of evaluations, at least 1.
        mode: "max" or "min": whether larger or smaller values are better.
        min_change: what has to be exceeded to count as an improvement, at least 0.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: BalancedCheckpointer,
        metric: str,
        patience: int,
        mode: str = "max",
        min_change: float = 0.0,
    ):
        self.eval_period = eval_period
        self.checkpointer = checkpointer
        self.metric = metric
        self.patience = patience
        self.sign = {"max": 1, "min": -1}[mode]
        self.min_change = min_change
        self.values: Dict[int, float] = {}  # by iteration

    def is_missing(self, iteration: int) -> bool:
        """Whether the results of the evaluation after an iteration are not known yet."""
        return iteration not in self.values and is_due(self.trainer, self.eval_period, iteration)

    def progress(self) -> Progress:
        found = Progress(math.nan, -1, 0)
        for iteration, value in sorted(self.values.items()):
            change = self.sign * (value - found.best)
            is_first = math.isnan(found.best) and math.isfinite(value)
            if is_first or change > self.min_change:
                found = Progress(value, iteration, 0)
            else:
                found = found._replace(waited=found.waited + 1)
        return found

    def reason(self) -> str:
        """Why training is over; "" if it is not."""
        best, best_iter, waited = self.progress()
        if waited < self.patience:
            return ""
        change = f" by more than {self.min_change:g}" if self.min_change else ""
        return (
            f"{self.metric} has not improved{change} in {waited} evaluations: it was best with "
            f"{best:.4f} after iteration {best_iter} (SOLVER.EARLY_STOPPING)"
        )

    def after_step(self):
        iteration = self.trainer.iter
        if not is_due(self.trainer, self.eval_period, iteration):
            return
        self.values[iteration] = value_of(
            self.metric, "SOLVER.EARLY_STOPPING.METRIC", self.trainer, self.checkpointer
        )
        reason = self.reason()
        if reason:
            self.checkpointer.save("model_final", iteration=iteration)
            raise StopEarly(f"stopped early after iteration {iteration}: {reason}")

    def state_dict(self):
        return {"metric": self.metric, "values": dict(self.values)}

    def load_state_dict(self, state_dict):
        if state_dict["metric"] == self.metric:
            self.values = dict(state_dict["values"])
