"""What has to be different in Detectron2 while a model is traced, for TorchScript or for ONNX."""

import logging
import warnings
from contextlib import contextmanager
from typing import Callable
from unittest import mock

import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling.meta_arch import dense_detector
from torchvision.ops import boxes as box_ops

from balanced_d2.utils.compat import no_gradient_scaling


@contextmanager
def no_export_warnings():
    """Within it, PyTorch's exporters do not warn: about deprecation, and line by line of what may
    not generalise, which is for tests and verification to find out; AOTInductor, of no CUDA."""
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def traceable(batched_nms: Callable):
    """Within it, models can be traced.

    Args:
        batched_nms: takes the place of torchvision's, see :mod:`balanced_d2.export.nms`.
    """
    with (
        no_export_warnings(),
        no_gradient_scaling(),
        patch_builtin_len(),
        mock.patch.object(box_ops, "batched_nms", batched_nms),
        mock.patch.object(dense_detector, "min", _at_most, create=True),
        torch.no_grad(),
    ):
        yield


def _at_most(limit: int, length: torch.Tensor) -> torch.Tensor:
    """``min`` of a constant and a traced length.

    Detectron2 0.6 limits the candidates of RetinaNet with Python's ``min``, which would leave in
    the trace whichever of the two was smaller for the example.
    """
    return length.clamp(max=limit)
