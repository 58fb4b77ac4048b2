"""Batch norm computed by the convolution before it."""

import copy
from typing import Any, Iterator, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from balanced_d2.modeling.feature_backbone import FeatureBackbone
from balanced_d2.utils.mix_in import mix_in


def fold_norm(model: nn.Module) -> None:
    """Let the convolutions of a model compute the batch norms that follow them.

    A norm of fixed statistics is an affine function of each channel, so that a convolution of
    scaled weights and another bias gives the same within rounding: :math:`s (W * x) + b = (s W) * x
    + b`, :math:`s = \\gamma / \\sqrt{\\sigma^2 + \\epsilon}`, :math:`b = \\beta - \\mu s`. This
    holds for frozen norms, and for all others in evaluation mode; in training mode these stay as
    they are. Weights, their gradients and the names in the state dict do not change.

    Covers the convolutions of Detectron2 and networks whose data flow can be traced, as those of
    timm and torchvision. Norms without statistics (GroupNorm) are left alone.
    """
    for conv, norm in list(_pairs(model)):
        if not isinstance(conv, _FoldingConv):
            folded = _Folded(conv, norm)
            mix_in(_FoldingConv, conv)
            conv.__dict__["folded"] = folded
            mix_in(_FoldedNorm, norm)


class _Folded:
    """What a convolution computes with its norm. No module, so that it is in no state dict."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        self.norm: Any = norm
        # The convolution as it was, to be called with other weights.
        self.conv = copy.copy(conv)
        self.key: object = None
        self.weights: Tuple[torch.Tensor, torch.Tensor]

    def __call__(self, conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weights(conv)
        self.conv.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        return self.conv.forward(x)

    def _weights(self, conv: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Of shapes (O, I, H, W) and (O,), computed anew only where they can have changed."""
        norm = self.norm
        read = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        tensors = [tensor for tensor in read if tensor is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _fold(*read, norm.eps)
        key = [(tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors]
        if key != self.key:
            with torch.no_grad():
                self.key, self.weights = key, _fold(*read, norm.eps)
        return self.weights


def _fold(weight, conv_bias, gamma, beta, mean, var, eps):
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = gamma * scale
    bias = (0 if conv_bias is None else conv_bias) - mean
    bias = bias * scale if beta is None else beta + bias * scale
    return weight * scale.reshape(-1, 1, 1, 1), bias


class _FoldingConv(nn.Module):
    """Mixed into the class of a convolution that computes the norm after it, too."""

    folded: _Folded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _is_folded(self.folded.norm):
            return self.folded(self, x)
        return super().forward(x)


class _FoldedNorm(nn.Module):
    """Mixed into the class of a norm whose convolution has computed it already."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_folded(self):
            return super().forward(x)
        # timm's norms hold what follows them.
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _is_folded(norm: nn.Module) -> bool:
    return not (isinstance(norm, _BatchNorm) and norm.training)


def _is_norm(module: object) -> bool:
    if isinstance(module, _BatchNorm):
        return module.track_running_stats and not isinstance(module, nn.BatchNorm1d)
    return isinstance(module, FrozenBatchNorm2d) or "FrozenBatchNorm" in type(module).__name__


def _pairs(model: nn.Module) -> Iterator[Tuple[nn.Module, nn.Module]]:
    """Each convolution with the norm that is all that reads its output."""
    for module in model.modules():
        if isinstance(module, Conv2d) and _is_norm(module.norm):
            yield module, module.norm
        elif isinstance(module, FeatureBackbone):
            yield from _traced_pairs(module.network)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return (
            isinstance(module, nn.Conv2d)
            or _is_norm(module)
            or super().is_leaf_module(module, name)
        )


def _traced_pairs(network: nn.Module) -> Iterator[Tuple[nn.Module, nn.Module]]:
    try:
        graph = _Tracer().trace(network)
    except Exception:  # what Python code does with a traced value is not foreseeable
        return
    for node in graph.nodes:
        if node.op != "call_module" or not _is_norm(network.get_submodule(node.target)):
            continue
        before = node.args[0]
        if before.op == "call_module" and len(before.users) == 1:
            conv = network.get_submodule(before.target)
            if isinstance(conv, nn.Conv2d):
                yield conv, network.get_submodule(node.target)
