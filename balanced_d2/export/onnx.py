"""Export to ONNX, with height and width of the image left open."""

import json

import torch
from torch import nn

from balanced_d2.export.deployable import Deployable
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.nms import onnx_batched_nms
from balanced_d2.export.tracing import traceable
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

# The first opset whose RoiAlign has Detectron2's alignment is 16.
OPSET = 17


def export_onnx(model: nn.Module, image: torch.Tensor, path: str, metadata: dict) -> None:
    """Write a detector as an ONNX file.

    Its input is ``image``, float32 of shape (C, height, width); its outputs are those of
    :meth:`Deployable.forward`, under the names :attr:`Deployable.outputs`.

    Args:
        model: as for :class:`Deployable`. It stays as it is.
        image: an example, shape (C, H, W).
        path: the file. One that is there is replaced when the new one is complete.
        metadata: stored in the file as JSON, see :func:`balanced_d2.export.describe`.

    Raises:
        UserError: if the package ``onnx`` is missing, the model cannot be exported or the file not
            be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "exporting to ONNX needs the packages onnx and onnxruntime: "
            "pip install onnx onnxruntime"
        ) from error
    deployable = Deployable(model, format="onnx")
    with replacing(path) as temporary:
        with traceable(onnx_batched_nms):
            torch.onnx.export(
                deployable,
                (image.float(),),
                temporary,
                dynamo=False,  # the exporter built on torch.export fails on the proposals
                opset_version=OPSET,
                input_names=["image"],
                output_names=deployable.outputs,
                dynamic_axes={
                    "image": {1: "height", 2: "width"},
                    **{name: {0: "detections"} for name in deployable.outputs[:-1]},
                },
            )
        exported = onnx.load(temporary)
        exported.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
        onnx.helper.set_model_props(exported, {METADATA_FILE: json.dumps(metadata)})
        onnx.checker.check_model(exported)
        onnx.save(exported, temporary)
