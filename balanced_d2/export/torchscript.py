"""Export to TorchScript, by tracing or by scripting."""

import copy
import json

import torch
from detectron2.export import scripting_with_instances
from detectron2.structures import Boxes
from torch import nn

from balanced_d2.export.deployable import Deployable
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.nms import scripted_batched_nms
from balanced_d2.export.tracing import no_export_warnings, traceable
from balanced_d2.utils.errors import UserError, check_choice
from balanced_d2.utils.files import replacing

METHODS = ("tracing", "scripting")

# The fields of Instances at inference, which TorchScript has to know beforehand.
_FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
}


def export_torchscript(
    model: nn.Module, image: torch.Tensor, path: str, metadata: dict, method: str = "tracing"
) -> None:
    """Write a detector as a TorchScript file that needs only torch and torchvision.

    Args:
        model: as for :class:`Deployable`. It stays as it is.
        image: as for :func:`trace`; not used by scripting.
        path: the file. One that is there is replaced when the new one is complete.
        metadata: stored in the file as JSON, see :func:`balanced_d2.export.describe`.
        method: ``"tracing"`` or ``"scripting"``.

    Raises:
        UserError: if the model cannot be exported in this way or the file not be written.
    """
    check_choice("method (--method)", method, METHODS)
    module = trace(model, image) if method == "tracing" else script(model)
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


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """:class:`Deployable` of a model, scripted.

    Args:
        model: as for :class:`Deployable`. It stays as it is.

    Raises:
        UserError: if TorchScript cannot compile the model.
    """
    # Scripting takes its module apart, so it is given a copy.
    deployable = copy.deepcopy(Deployable(model, "scripting"))
    try:
        with no_export_warnings():
            return scripting_with_instances(deployable, _FIELDS)
    except (RuntimeError, torch.jit.frontend.FrontendError) as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise UserError(
            f"TorchScript cannot compile this model ({reason.strip()}); export it by tracing "
            "(--method tracing)"
        ) from error


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
