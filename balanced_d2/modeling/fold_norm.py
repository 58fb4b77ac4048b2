"""Batch norms, activations and sums computed by the convolution before them."""

import copy
from typing import Any, Iterator, Optional, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from balanced_d2.layers.exporting import is_exporting
from balanced_d2.layers.fused_conv import can_fuse, fused_conv
from balanced_d2.modeling.feature_backbone import FeatureBackbone
from balanced_d2.utils.mix_in import mix_in

RELU = nn.ReLU(inplace=True)


def fold_norm(model: nn.Module) -> None:
    """Let the convolutions of a model compute what follows them.

    A norm of fixed statistics is an affine function of each channel, so that a convolution of
    scaled weights and another bias gives the same within rounding: :math:`s (W * x) + b = (s W) * x
    + b`, :math:`s = \\gamma / \\sqrt{\\sigma^2 + \\epsilon}`, :math:`b = \\beta - \\mu s`. This
    holds for frozen norms, and for all others in evaluation mode; in training mode these stay as
    they are. Where no gradient is computed, activations and the sums of residual blocks are
    computed in the same pass over the output (:mod:`balanced_d2.layers.fused_conv`). Weights, their
    gradients and the names in the state dict do not change.

    Covers the convolutions of Detectron2 and networks whose data flow can be traced, as those of
    timm and torchvision. Norms without statistics (GroupNorm) are left alone.
    """
    for conv, norm in list(_pairs(model)):
        if not isinstance(conv, _FoldingConv):
            folded = _Folded(conv, norm)
            mix_in(_FoldingConv, conv)
            conv.__dict__["folded"] = folded
            if norm is not None:
                mix_in(_FoldedNorm, norm)
    for module in list(model.modules()):
        if type(module) in (BasicBlock, BottleneckBlock):
            mix_in(_FoldedBlock, module)
        elif type(module) is BasicStem:
            mix_in(_FoldedStem, module)


class _Folded:
    """What a convolution computes with what follows it. No module, so that it is in no state
    dict."""

    def __init__(self, conv: Any, norm: Any):
        self.norm = norm
        # timm's norms hold the activation after them, Detectron2's convolutions their own.
        self.activation = getattr(norm, "act", getattr(conv, "activation", None))
        if isinstance(self.activation, nn.Identity):
            self.activation = None
        self.is_plain = type(conv).forward in (nn.Conv2d.forward, Conv2d.forward)
        # The convolution alone, to be called with other weights.
        self.conv = copy.copy(conv)
        self.conv.__dict__["_modules"] = dict.fromkeys(conv._modules)
        if isinstance(conv, Conv2d):
            self.conv.activation = None
        self.key: object = None
        self.weights: Tuple[torch.Tensor, Any]

    def __call__(self, conv: nn.Module, x: torch.Tensor, activation, add) -> torch.Tensor:
        activation = activation or self.activation
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self._weights(conv, x.dtype)
        if self.is_plain and can_fuse(self.conv, x, weight, bias, activation, add):
            return fused_conv(self.conv, x, weight, bias, activation, add)
        self.conv.__dict__["_parameters"] = {"weight": weight, "bias": bias}
        x = self.conv.forward(x)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            # They cannot be copied with the model. In inference, where several threads may share
            # it, they stay.
            self.conv.__dict__["_parameters"] = {}
        if add is not None:
            x += add
        return x if activation is None else activation(x)

    def _weights(self, conv: Any, dtype: torch.dtype) -> Tuple[torch.Tensor, Any]:
        """Of shapes (O, I, H, W) and (O,), computed again only where they can have changed: fused
        optimizers and norms in training do not count the versions of what they change."""
        norm = self.norm
        read = [conv.weight, conv.bias]
        if norm is not None:
            read += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        tensors = [tensor for tensor in read if tensor is not None]
        can_learn = torch.is_grad_enabled() or conv.training
        learns = can_learn and any(tensor.requires_grad for tensor in tensors)
        if learns or any(tensor.is_inference() for tensor in tensors):  # which have no versions
            self.key = None  # what is learnt may be read next without a change of the mode
            return self._fold(read, dtype)
        key = [dtype, *((tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors)]
        if key != self.key:
            # Gradients of the input need weights that were not made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self.weights, self.key = self._fold(read, dtype), key  # in this order, for threads
        return self.weights

    def _fold(self, read: list, dtype: torch.dtype) -> Tuple[torch.Tensor, Any]:
        weight, bias = read if self.norm is None else _fold(self.norm.eps, *read)
        return weight.to(dtype), None if bias is None else bias.to(dtype)


def _fold(eps, weight, conv_bias, gamma, beta, mean, var):
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = gamma * scale
    bias = (0 if conv_bias is None else conv_bias) - mean
    bias = bias * scale if beta is None else beta + bias * scale
    return weight * scale.reshape(-1, 1, 1, 1), bias


class _FoldingConv(nn.Module):
    """Mixed into the class of a convolution that computes what follows it, too."""

    folded: _Folded

    def train(self, mode: bool = True) -> "_FoldingConv":
        self.folded.key = None  # the weights may have changed since the mode did
        return super().train(mode)

    def forward(
        self,
        x: torch.Tensor,
        activation: Optional[nn.Module] = None,
        add: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """``activation(norm(conv(x)) + add)``. A sum and an activation other than the
        convolution's own are only given where :meth:`is_folded`."""
        if self.is_folded():
            return self.folded(self, x, activation, add)
        return super().forward(x)

    def is_folded(self) -> bool:
        return _is_folded(self.folded.norm)


class _FoldedNorm(nn.Module):
    """Mixed into the class of a norm whose convolution has computed it already."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if _is_folded(self) else super().forward(x)


class _FoldedBlock(nn.Module):
    """Mixed into the class of a residual block of two or three convolutions."""

    shortcut: Optional[nn.Module]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = [name for name in ("conv1", "conv2", "conv3") if hasattr(self, name)]
        convs = [getattr(self, name) for name in names]
        if not all(isinstance(conv, _FoldingConv) and conv.is_folded() for conv in convs):
            return super().forward(x)
        *first, last = convs
        shortcut = x if self.shortcut is None else self.shortcut(x)
        for conv in first:
            x = conv(x, RELU)
        return last(x, RELU, shortcut)


class _FoldedStem(nn.Module):
    """Mixed into the class of a ResNet's stem."""

    conv1: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (isinstance(self.conv1, _FoldingConv) and self.conv1.is_folded()):
            return super().forward(x)
        return F.max_pool2d(self.conv1(x, RELU), kernel_size=3, stride=2, padding=1)


def _is_folded(norm: nn.Module) -> bool:
    if is_exporting():  # a program has no folded weights to keep; those who run it fold themselves
        return False
    return not (isinstance(norm, _BatchNorm) and norm.training)


def _is_norm(module: object) -> bool:
    if isinstance(module, _BatchNorm):
        return module.track_running_stats and not isinstance(module, nn.BatchNorm1d)
    return isinstance(module, FrozenBatchNorm2d) or "FrozenBatchNorm" in type(module).__name__


def _pairs(model: nn.Module) -> Iterator[Tuple[nn.Module, Optional[nn.Module]]]:
    """Each convolution with the norm that is all that reads its output, or with none if it has an
    activation."""
    for module in model.modules():
        if isinstance(module, Conv2d) and _is_norm(module.norm):
            yield module, module.norm
        elif isinstance(module, Conv2d) and module.norm is None and module.activation is not None:
            yield module, None
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
        if node.op != "call_module":
            continue
        norm = network.get_submodule(node.target)
        if not _is_norm(norm) or not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
            continue
        before = node.args[0]
        if before.op == "call_module" and len(before.users) == 1:
            conv = network.get_submodule(before.target)
            if isinstance(conv, nn.Conv2d):
                yield conv, norm
