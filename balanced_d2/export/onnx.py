"""Export to ONNX, with height and width of the image, and the number of images, left open."""

import json

import torch
from torch import nn

from balanced_d2.export.attention import chunk_attention
from balanced_d2.export.batched import BatchDeployable
from balanced_d2.export.deployable import Deployable
from balanced_d2.export.forwards import computed_by, constant_padding
from balanced_d2.export.metadata import METADATA_FILE
from balanced_d2.export.nms import (
    onnx_batched_nms,
    suppress_operator,
    translate_stable_sort,
    translate_suppress,
)
from balanced_d2.export.program import export_program
from balanced_d2.export.tracing import no_export_warnings, traceable
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

# The first opset whose RoiAlign has Detectron2's alignment is 16.
OPSET = 17

# ONNX Runtime has no RoiAlign of a later opset on CPUs, and so none of those that have attention as
# one operator (23).
BATCH_OPSET = 21


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
    _import_onnx()
    deployable = Deployable(model, format="onnx")
    with replacing(path) as temporary:
        with traceable(onnx_batched_nms), computed_by(constant_padding(model)):
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
        _finish(temporary, metadata, boxes=0)


def export_onnx_batch(model: nn.Module, image: torch.Tensor, path: str, metadata: dict) -> None:
    """Write a detector that takes batches as an ONNX file, by way of ``torch.export``.

    Its input is ``images``, float32 of shape (batch, 3, height, width); its outputs are those of
    :meth:`BatchDeployable.forward`, under the names :attr:`BatchDeployable.outputs`.

    Args:
        model: as for :class:`BatchDeployable`. It stays as it is.
        image: an example, shape (3, H, W).
        path, metadata: as for :func:`export_onnx`.

    Raises:
        UserError: if the package ``onnx`` or ``onnxscript`` is missing, the model cannot be
            exported or the file not be written.
    """
    _import_onnx()
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--format onnx-batch needs the package onnxscript: pip install onnxscript"
        ) from error
    outputs = BatchDeployable(model).outputs
    program = export_program(model, image, suppress_operator)
    with replacing(path) as temporary:
        with no_export_warnings():
            torch.onnx.export(
                program,
                (),
                temporary,
                dynamo=True,
                opset_version=BATCH_OPSET,
                input_names=["images"],
                output_names=outputs,
                external_data=False,
                verbose=False,
                custom_translation_table={
                    torch.ops.balanced_d2.suppress.default: translate_suppress,
                    torch.ops.aten.sort.stable: translate_stable_sort,
                },
            )
        _finish(temporary, metadata)


def _import_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UserError(
            "exporting to ONNX needs the packages onnx and onnxruntime: "
            "pip install onnx onnxruntime"
        ) from error


def _finish(path: str, metadata: dict, boxes: int | None = None) -> None:
    """Store the metadata, and the number of columns of the output with the boxes, in a file; let it
    divide integers as OpenVINO does, too, and hold no matrix of all positions."""
    import onnx

    exported = onnx.load(path)
    chunk_attention(exported)
    _divide_exactly(exported.graph, onnx.shape_inference.infer_shapes(exported).graph)
    if boxes is not None:
        exported.graph.output[boxes].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.helper.set_model_props(exported, {METADATA_FILE: json.dumps(metadata)})
    onnx.checker.check_model(exported)
    onnx.save(exported, path)


def _divide_exactly(graph, inferred) -> None:
    """Let every division of integers in a graph be one of multiples of the divisor.

    ONNX cuts the result off. OpenVINO's CPU plugin does so only at the end of a chain of
    element-wise operators, which it computes as floats: ``x / 32 * 32``, how an image is padded, is
    ``x`` there, and the detections are others.

    Args:
        graph: changed in place.
        inferred: the same with the types of all values.
    """
    import onnx

    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    values = [*inferred.value_info, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes = []
    for node, inferred_node in zip(graph.node, inferred.node, strict=True):
        for attribute, inferred_attribute in zip(node.attribute, inferred_node.attribute):
            if attribute.HasField("g"):
                _divide_exactly(attribute.g, inferred_attribute.g)
        if node.op_type == "Div" and types.get(node.output[0]) in integers:
            rest, multiple = (f"{node.output[0]}_{name}" for name in ("rest", "multiple"))
            nodes += [
                onnx.helper.make_node("Mod", node.input, [rest], fmod=1),
                onnx.helper.make_node("Sub", [node.input[0], rest], [multiple]),
            ]
            node.input[0] = multiple
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
