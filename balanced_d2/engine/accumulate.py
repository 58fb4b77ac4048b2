"""Training iterations whose batch is computed in parts, which takes less memory."""

import time
from collections import defaultdict
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List, Sequence

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch.nn.parallel import DistributedDataParallel

from balanced_d2.utils.compat import after_backward, amp_precision
from balanced_d2.utils.errors import StopTraining


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer``, which computes the gradients of a batch part by part.

    An iteration is still one batch of the loader, one step of the optimizer, one step of the
    learning rate, and, in several processes, one exchange of gradients. Its loss is the mean over
    the parts, weighted by their numbers of images, as in that many processes.

    Args: as for ``SimpleTrainer``, and:
        num_parts: at least 1.
    """

    def __init__(self, *args, num_parts: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_parts = num_parts

    def run_step(self):
        """
        Raises:
            StopTraining: if a batch has fewer images than there are parts.
        """
        assert self.model.training, "the model is not in training mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        parts = split(batch, self.num_parts)

        self.optimizer.zero_grad()
        means: Dict[str, Any] = defaultdict(float)
        for part in parts:
            share = len(part) / len(batch)
            with self._without_exchange() if part is not parts[-1] else nullcontext():
                with self._precision():
                    losses = self.model(part)
                    if isinstance(losses, torch.Tensor):
                        losses = {"total_loss": losses}
                    loss = share * sum(losses.values())
                self._backward(loss)
            for name, value in losses.items():
                means[name] += share * value.detach()

        after_backward(self)
        self._write_metrics(means, data_time)
        self._step()

    def _without_exchange(self) -> ContextManager:
        is_one_of_several = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_one_of_several else nullcontext()

    def _precision(self) -> ContextManager:
        return nullcontext()

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _step(self) -> None:
        self.optimizer.step()


class AccumulatingAMPTrainer(AccumulatingTrainer, AMPTrainer):
    """The same for Detectron2's ``AMPTrainer``: mixed precision on GPUs."""

    def _precision(self) -> ContextManager:
        return torch.autocast("cuda", dtype=amp_precision(self))

    def _backward(self, loss: torch.Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def _step(self) -> None:
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def accumulating(trainer: SimpleTrainer, num_parts: int) -> AccumulatingTrainer:
    """A trainer of the same model, data and optimizer that accumulates gradients.

    Args:
        trainer: Detectron2's ``SimpleTrainer`` or ``AMPTrainer``, before its first step.
        num_parts: as for :class:`AccumulatingTrainer`.
    """
    parts = (trainer.model, trainer.data_loader, trainer.optimizer)
    if isinstance(trainer, AMPTrainer):
        scaler = trainer.grad_scaler
        return AccumulatingAMPTrainer(*parts, num_parts=num_parts, grad_scaler=scaler)
    return AccumulatingTrainer(*parts, num_parts=num_parts)


def split(batch: Sequence[Any], num_parts: int) -> List[Sequence[Any]]:
    """Divide a batch into consecutive parts, whose sizes differ by at most one.

    Raises:
        StopTraining: if there are more parts than images.
    """
    if len(batch) < num_parts:
        raise StopTraining(
            f"SOLVER.ACCUMULATE is {num_parts}, but a batch has {len(batch)} image(s) in each "
            "process: choose at most that, or a larger batch"
        )
    ends = [len(batch) * (number + 1) // num_parts for number in range(num_parts)]
    return [batch[begin:end] for begin, end in zip([0, *ends], ends)]
