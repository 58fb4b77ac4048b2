"""Differences between the versions of Detectron2."""

import contextlib
from typing import Any, Mapping
from unittest import mock

import torch
from detectron2.solver import build
from detectron2.utils import comm


@contextlib.contextmanager
def no_gradient_scaling():
    """Context manager in which cascade ROI heads can be traced for inference.

    Detectron2 0.6 scales their gradients with a Python function even when there are none; main
    does so only in training.
    """
    from detectron2.modeling.roi_heads import cascade_rcnn

    class Identity:
        @staticmethod
        def apply(x, scale):
            return x

    with mock.patch.object(cascade_rcnn, "_ScaleGradient", Identity):
        yield


@contextlib.contextmanager
def ddp_arguments(arguments: Mapping[str, Any]):
    """Context manager in which Detectron2's trainer also passes these to ``create_ddp_model``.

    Neither version lets a caller choose them, and both pass ``DistributedDataParallel`` a device
    index, which CPUs do not have.
    """
    from detectron2.engine import defaults

    create = defaults.create_ddp_model

    def create_with_arguments(model, **given):
        return create(model, **{**given, **arguments})

    with mock.patch.object(defaults, "create_ddp_model", create_with_arguments):
        yield


LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR") + (
    ("WarmupStepWithFixedGammaLR",) if hasattr(build, "StepWithFixedGammaParamScheduler") else ()
)
"""The names of ``SOLVER.LR_SCHEDULER_NAME``; the last one is main's."""


def create_local_process_group(num_processes: int) -> None:
    """Tell Detectron2 which processes share a machine, if its own launcher did not start them.

    Args:
        num_processes: number of processes on each machine.
    """
    if hasattr(comm, "create_local_process_group"):  # main
        comm.create_local_process_group(num_processes)
        return
    machine = comm.get_rank() // num_processes
    for i in range(comm.get_world_size() // num_processes):
        ranks = range(i * num_processes, (i + 1) * num_processes)
        group = torch.distributed.new_group(list(ranks))
        if i == machine:
            comm._LOCAL_PROCESS_GROUP = group


def has_sigmoid_scores(predictor_or_node: Any) -> bool:
    """Whether classes are scored by sigmoids, which main has for federated loss.

    Args:
        predictor_or_node: a ``FastRCNNOutputLayers``, or ``MODEL.ROI_BOX_HEAD`` of a config.
    """
    names = ("use_sigmoid_ce", "USE_SIGMOID_CE")
    return any(getattr(predictor_or_node, name, False) for name in names)


def after_backward(trainer) -> None:
    """Call the hooks between the gradients and the step, which main has."""
    if hasattr(trainer, "after_backward"):
        trainer.after_backward()


def amp_precision(trainer) -> torch.dtype:
    """The type that an ``AMPTrainer`` computes in: float16 in 0.6; main lets one choose."""
    return getattr(trainer, "precision", torch.float16)
