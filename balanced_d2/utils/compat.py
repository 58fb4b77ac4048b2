"""What differs between the versions of Detectron2."""

import contextlib
from typing import Any, Mapping
from unittest import mock

import torch
from detectron2.utils import comm


@contextlib.contextmanager
def no_gradient_scaling():
    """Within it, cascade ROI heads can be traced for inference.

    Detectron2 0.6 scales their gradients with a Python function even where there are none; main
    does so in training only.
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
    """Within it, Detectron2's trainer gives ``create_ddp_model`` these arguments, too.

    Neither version takes any, and both give ``DistributedDataParallel`` the index of a device,
    which only GPUs have.
    """
    from detectron2.engine import defaults

    create = defaults.create_ddp_model

    def create_with_arguments(model, **given):
        return create(model, **{**given, **arguments})

    with mock.patch.object(defaults, "create_ddp_model", create_with_arguments):
        yield


def create_local_process_group(num_processes: int) -> None:
    """Tell Detectron2 which processes share a machine, where its own launcher did not start them.

    Args:
        num_processes: how many processes run on each machine.
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
