"""Export to TorchScript, by tracing."""

import json

import torch
from torch import nn

from balanced_d2.export.deployable import Deployable
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.nms import scripted_batched_nms
from balanced_d2.export.tracing import no_export_warnings, traceable
from balanced_d2.utils.files import replacing


def export_torchscript(model: nn.Module, image: torch.Tensor, path: str, metadata: dict) -> None:
    """Write a detector as a TorchScript file that needs only torch and torchvision.

    Args:
        model: as for :class:`Deployable`. It stays as it is.
        image: as for :func:`trace`.
        path: the file. One that is there is replaced when the new one is complete.
        metadata: stored in the file as JSON, see :func:`balanced_d2.export.describe`.

    Raises:
        UserError: if the model cannot be exported or the file not be written.
    """
    module = trace(model, image)
    with replacing(path) as temporary, no_export_warnings():
        torch.jit.save(module, temporary, _extra_files={METADATA_FILE: json.dumps(metadata)})


def trace(model: nn.Module, image: torch.Tensor) -> torch.jit.ScriptModule:
    """:class:`Deployable` of a model, traced. It takes images of every size and dtype.

    Args:
        model: as for :class:`Deployable`.
        image: an example, shape (C, H, W).
    """
    deployable = Deployable(model)
    with traceable(scripted_batched_nms()):
        traced = torch.jit.trace(deployable, (image.float(),), check_trace=False)
    for module in traced.modules():
        if module._c._has_method("forward"):
            _take_devices_from_inputs(module.graph)
    return traced


def _take_devices_from_inputs(graph: torch.Graph) -> None:
    """Let a traced graph create its tensors where its inputs are.

    The tracer records the device of the example as a constant, and a model with such constants
    fails on any other device.
    """
    inputs = [value for value in graph.inputs() if _is_tensor(value)]
    # torch has the method, but does not declare it.
    for node in graph.findAllNodes("prim::Constant"):  # type: ignore[attr-defined]
        constant = node.output()
        if constant.type().kind() != "DeviceObjType":
            continue
        for use in list(constant.uses()):
            source = next(filter(_is_tensor, [*use.user.inputs(), *inputs]))
            device = graph.create("prim::device", [source], 1)
            device.output().setType(torch._C.DeviceObjType.get())
            device.insertBefore(use.user)
            use.user.replaceInputWith(constant, device.output())
        node.destroy()


def _is_tensor(value: torch.Value) -> bool:
    return value.type().isSubtypeOf(torch._C.TensorType.get())
