"""What makes a model faster and changes its results by rounding only."""

import ctypes
import logging
import re
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn

from balanced_d2.modeling.fold_norm import fold_norm
from balanced_d2.modeling.roi_align import use_sparse_roi_align
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.mix_in import mix_in

logger = logging.getLogger(__name__)

# Convolutions with fewer multiply-adds for each value that they read or write are trained in
# float32: these are pointwise convolutions of few channels and all depthwise ones, whose gradients
# PyTorch computes slowly in bfloat16.
GAIN_OF_BFLOAT16 = 30

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def speed_up(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Prepare a model as the config says: ``MODEL.CHANNELS_LAST``, ``MODEL.SPARSE_ROI_ALIGN``,
    ``MODEL.FOLD_NORM`` and, for inference, ``TEST.AMP.ENABLED``. On CPUs the process keeps its
    memory from then on."""
    if cfg.MODEL.DEVICE == "cpu":
        keep_heap()
    if cfg.MODEL.SPARSE_ROI_ALIGN:
        use_sparse_roi_align(model)
    if cfg.MODEL.FOLD_NORM:
        fold_norm(model)
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if cfg.TEST.AMP.ENABLED:
        autocast(model, cfg.MODEL.DEVICE, training=False)
    return model


def keep_heap() -> None:
    """Let this process keep the memory of tensors that are freed, for the next ones.

    glibc gives large blocks back to the system at once, and the first touch of every page of a new
    block is slow. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; on Windows there is no such library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(model: nn.Module, device: str, training: bool) -> None:
    """Let a model compute in :func:`mixed_precision`.

    Args:
        device: of the model.
        training: whether in training mode, or else in evaluation mode.
    """
    forward = model.forward
    if torch.device(device).type == "cpu":
        _keep_float32(model, training)

    def forward_in_mixed_precision(*args, **kwargs):
        if model.training != training:
            return forward(*args, **kwargs)
        with mixed_precision(device):
            return forward(*args, **kwargs)

    model.forward = forward_in_mixed_precision  # as torch.autocast does with a function


def mixed_precision(device: str, enabled: bool = True) -> torch.autocast:
    """Within it, bfloat16 on CPUs and float16 on GPUs, where they do."""
    device_type = torch.device(device).type
    dtype = torch.bfloat16 if device_type == "cpu" else torch.float16
    return torch.autocast(device_type, dtype, enabled=enabled)


def _keep_float32(model: nn.Module, training: bool) -> None:
    """Let the layers compute in float32 whose results are the scores and boxes of RoI heads, which
    bfloat16 would round to 8 bits; and in training those that gain nothing from bfloat16."""
    for module in list(model.modules()):
        if isinstance(module, FastRCNNOutputLayers):
            for layer in module.modules():
                if isinstance(layer, nn.Linear) and not isinstance(layer, _InFloat32):
                    mix_in(_InFloat32, layer)
        elif (
            training
            and isinstance(module, nn.Conv2d)
            and not isinstance(module, _InFloat32)
            and _multiply_adds_per_value(module) < GAIN_OF_BFLOAT16
        ):
            mix_in(_TrainedInFloat32, module)


def _multiply_adds_per_value(conv: nn.Conv2d) -> float:
    """How much a convolution computes with each value that it reads or writes."""
    height, width = conv.kernel_size
    products = conv.in_channels // conv.groups * conv.out_channels * height * width
    return products / (conv.in_channels + conv.out_channels)


class _InFloat32(nn.Module):
    """Mixed into the class of a layer that computes in float32 whatever surrounds it."""

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float(), *args)


class _TrainedInFloat32(_InFloat32):
    """The same, in training mode only."""

    def forward(self, x: torch.Tensor, *args) -> torch.Tensor:
        if self.training:
            return super().forward(x, *args)
        return super(_InFloat32, self).forward(x, *args)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; without it, mixed precision is slower."""
    if hasattr(torch.cpu, "get_capabilities"):  # new in PyTorch 2.10
        known = torch.cpu.get_capabilities()
        return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and bool(
        re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text())
    )


def check_device(name: str) -> None:
    """Raise :class:`UserError` if PyTorch cannot compute on a device."""
    if name in ("cpu", "cuda"):
        return
    try:
        torch.ones(1, device=name).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MODEL.DEVICE (train.device in a .py config) is {name!r}, which cannot be used here: "
            f"{reason}"
        ) from error


def use_available_device(cfg: CfgNode) -> None:
    """Without CUDA on the machine, set ``cfg`` to the CPU, and say so; on CPUs that gain nothing
    from mixed precision, also to full precision.

    Raises:
        UserError: if there is no such device, or PyTorch cannot use it here.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no CUDA on this machine: running on the CPU")
        cfg.MODEL.DEVICE = "cpu"
    check_device(cfg.MODEL.DEVICE)
    nodes = [node for node in (cfg.SOLVER.AMP, cfg.TEST.AMP) if node.ENABLED]
    if cfg.MODEL.DEVICE == "cpu" and nodes and not has_fast_bfloat16():
        logger.info("this CPU is not faster in bfloat16: running in full precision")
        for node in nodes:
            node.ENABLED = False
