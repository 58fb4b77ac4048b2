"""Hooks around each iteration, in addition to Detectron2's own."""

import signal

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from balanced_d2.utils.errors import StopTraining
from balanced_d2.utils.randomness import seed_all

# Identifies the random numbers of iterations; each use of a seed has its own number.
ITERATION_SEEDS = 2


class SeedIterations(HookBase):
    """Seeds all generators before each iteration, by the iteration and the rank of the process.

    Resumed training therefore has no generator state to restore.

    Args:
        loader: its ``seed`` is used, as it is when the first iteration begins.
    """

    def __init__(self, loader):
        self.loader = loader

    def before_step(self):
        seed_all(ITERATION_SEEDS, self.loader.seed, comm.get_rank(), self.trainer.iter)


class ResumablePreciseBN(hooks.PreciseBN):
    """Detectron2's hook, with its position in the data saved in the checkpoint.

    Args: as for Detectron2's ``PreciseBN``; the loader is a :class:`TrainLoader`.
    """

    def state_dict(self):
        return self._data_loader.state_dict()

    def load_state_dict(self, state_dict):
        self._data_loader.load_state_dict(state_dict)


class StopOnSignal(HookBase):
    """On SIGTERM or Ctrl-C, finishes the iteration, saves a checkpoint and stops training.

    A second signal ends the program as it would without this hook.

    Args:
        checkpointer: saves the checkpoint.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, checkpointer):
        self.checkpointer = checkpointer
        self.received = 0
        self.previous_handlers = {}

    def before_train(self):
        self.previous_handlers = {
            number: signal.signal(number, self._receive) for number in self.SIGNALS
        }

    def _receive(self, number, frame):
        self.received = number
        self._restore()

    def after_step(self):
        # The signal may not have reached all processes yet, so they have to agree.
        received = max(comm.all_gather(self.received))
        if not received:
            return
        iteration = self.trainer.iter
        name = f"model_{iteration:07d}"
        self.checkpointer.save(name, iteration=iteration)
        raise StopTraining(
            f"stopped by {signal.Signals(received).name} after iteration {iteration}: saved as "
            f"{name}.pth in {self.checkpointer.save_dir}; --resume continues from there",
            exit_code=128 + received,
        )

    def after_train(self):
        self._restore()

    def _restore(self):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
