"""The exponential moving average of a model's weights during training."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from balanced_d2.utils.errors import UserError, first_of

# In a checkpoint, for those who look into it.
ABOUT = (
    "model: the moving average of the weights, which is evaluated. The weights that training goes "
    "on with are the model outside of this"
)


class AveragedWeights:
    """An exponential moving average of the weights of a model (Polyak and Juditsky, 1992; in this
    form Tarvainen and Valpola, NeurIPS 2017, section 2).

    After step :math:`n` (counted from 0), :math:`\\bar{w} \\leftarrow d \\bar{w} + (1 - d) w` with
    :math:`d = \\min(\\text{decay}, (1 + n) / (10 + n))`, so that the first weights, many of which
    may be random, do not outlast the first steps (TensorFlow's ``ExponentialMovingAverage`` with
    ``num_updates``).

    All floating-point tensors of the state dict are averaged: parameters, of which those that are
    frozen do not change, and statistics of batch norm, which so remain those of the weights. Whole
    numbers, such as counts of batches, are copied. PyTorch's ``AveragedModel`` would copy the
    model, whose forward may refer to the model itself; here, the weights are exchanged for an
    evaluation.

    Args:
        model: not wrapped for several processes. Its weights when training starts are the first.
        decay: at least 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self.weights: Dict[str, torch.Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin with the model's weights."""
        self.num_updates = 0
        self.weights = {name: tensor.clone() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's weights into the average."""
        ours, theirs = [], []
        for name, tensor in self._tensors().items():
            if tensor.is_floating_point():
                ours.append(self.weights[name])
                theirs.append(tensor)
            else:
                self.weights[name].copy_(tensor)
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        get_ema_multi_avg_fn(decay)(ours, theirs, self.num_updates)
        self.num_updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, tensor in self._tensors().items():
            before = tensor.clone()
            tensor.copy_(self.weights[name])
            self.weights[name].copy_(before)

    def _tensors(self) -> Dict[str, torch.Tensor]:
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

    def state_dict(self) -> Dict[str, Any]:
        """``model``, a state dict of the model with the averaged weights; ``num_updates``; and
        ``about``, which says so."""
        state = self.model.state_dict()
        state.update(self.weights)
        return {"model": state, "num_updates": self.num_updates, "about": ABOUT}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        Raises:
            UserError: if it is of another model.
        """
        saved = state_dict["model"]
        other = [
            name
            for name, tensor in self.weights.items()
            if name not in saved or saved[name].shape != tensor.shape
        ]
        if other:
            raise UserError(f"the averaged weights are of another model: {first_of(other)}")
        for name, tensor in self.weights.items():
            tensor.copy_(saved[name])
        self.num_updates = state_dict["num_updates"]


class AverageWeights(HookBase):
    """Averages the weights after each iteration.

    Args:
        averaged: begins with the weights that training starts with, if it was not resumed.
    """

    def __init__(self, averaged: AveragedWeights):
        self.averaged = averaged

    def before_train(self):
        if self.averaged.num_updates == 0:
            self.averaged.start()

    def after_step(self):
        self.averaged.update()
