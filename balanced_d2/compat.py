"""What differs between the versions of Detectron2 and of the libraries around it."""

import contextlib
import functools
import logging
import types
import warnings
from unittest import mock

import torch
from detectron2.utils import comm


@contextlib.contextmanager
def no_torchscript_warnings():
    """Within it, ``import detectron2`` does not warn that ``torch.jit`` is deprecated.

    Both Detectron2 0.6 and main script some of their functions when they are imported.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\..* is (deprecated|not supported)")
        yield


@contextlib.contextmanager
def no_export_warnings():
    """Within it, PyTorch's exporters do not warn: about deprecation, and line by line of what may
    not generalise, which is for tests and verification to find out."""
    fx = logging.getLogger("torch.fx")
    level = fx.level
    fx.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fx.setLevel(level)


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
def ddp_on_any_device(device: str):
    """Within it, Detectron2's trainer can be made for several processes on the CPU.

    Both versions give ``DistributedDataParallel`` the index of a device, which only GPUs have.
    """
    from detectron2.engine import defaults

    if not device.startswith("cpu"):
        yield
        return
    create = functools.partial(defaults.create_ddp_model, device_ids=None)
    with mock.patch.object(defaults, "create_ddp_model", create):
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


def mend_lvis() -> None:
    """Let ``lvis`` (0.5.3, its last release) run on current NumPy, where ``np.float`` is gone.

    Only the module ``lvis.eval`` sees the alias; NumPy itself is not changed.
    """
    try:
        import lvis.eval
    except ImportError:  # an optional package; Detectron2's evaluator says how to get it
        return
    if hasattr(lvis.eval.np, "float"):
        return
    numpy = types.ModuleType("numpy")
    numpy.__dict__.update(lvis.eval.np.__dict__, float=float)
    lvis.eval.np = numpy


@torch.jit.unused  # TorchScript cannot compile it, and in TorchScript the answer is no
def is_exporting() -> bool:
    """Whether the code that calls runs for ``torch.onnx.export`` or ``torch.export``.

    From code that is also scripted: ``not torch.jit.is_scripting() and is_exporting()``.
    """
    if torch.onnx.is_in_onnx_export():
        return True
    # torch.compiler.is_exporting is new in PyTorch 2.7
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


@torch.jit.unused
def is_plain_eager() -> bool:
    """Whether the code that calls runs as it stands, not for a compiler, a trace or an exporter."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting())
