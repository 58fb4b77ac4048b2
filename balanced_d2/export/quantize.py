"""int8: post-training static quantisation of an exported ONNX file."""

import logging
import os
import tempfile
from typing import Dict, Iterable, Iterator, List, Set

import numpy as np

from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

# Operators without weights that are computed in int8 where all that they take is. Activations have
# to be among them, for they are merged into the layer before them.
PASSING = ("Add", "Clip", "MaxPool", "Pad", "Relu", "Resize")
# Where their result depends on one input only; the others are limits or sizes.
ONE_INPUT = ("Clip", "MaxPool", "Pad", "Relu", "Resize")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# What follows these, and the inputs behind the first of those, is no longer features, but a choice
# of boxes.
CHOOSING = ("NonMaxSuppression", "NonZero", "Shape", "TopK")
CHOOSING_BEHIND_THE_FIRST = (
    *("Gather", "GatherElements", "GatherND", "RoiAlign"),
    *("ScatterElements", "ScatterND", "Slice"),
)


def quantize_onnx(path: str, output: str, images: Iterable[np.ndarray]) -> None:
    """Write an exported ONNX file in int8.

    Weights are int8, one scale a channel; activations uint8, with the range that they have on some
    images. Quantised are the layers of backbone, pyramid, balancing and heads; not those that
    predict (classes, box deltas, masks), whose small values are what detections differ by, and
    nothing behind them. Standard operators (``QuantizeLinear`` and ``DequantizeLinear``) say so,
    which ONNX Runtime and OpenVINO merge with the layers between them.

    Args:
        path: a file of :func:`export_onnx_batch` or :func:`export_onnx`, which stays as it is.
        output: the new file. One that is there is replaced when the new one is complete.
        images: to measure the ranges on, each (3, H, W), preprocessed as the model's.

    Raises:
        UserError: if onnxruntime is missing, there are no images or the file cannot be written.
    """
    check_quantization()
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    original = onnx.load(path)
    (graph_input,) = original.graph.input
    is_batch = len(graph_input.type.tensor_type.shape.dim) == 4
    feeds = (
        {graph_input.name: image[None] if is_batch else image}
        for image in (np.ascontiguousarray(image, dtype=np.float32) for image in images)
    )
    first = next(feeds, None)
    if first is None:
        raise UserError("there are no images to measure the ranges of activations on")
    with tempfile.TemporaryDirectory() as folder, replacing(output) as temporary, _quiet():
        # Norms are merged into convolutions, which are quantised with their final weights.
        folded_path = os.path.join(folder, "folded.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = folded_path
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        folded = onnx.load(folded_path)
        quantization.quantize_static(
            folded,
            temporary,
            _Feeds(first, feeds),
            op_types_to_quantize=[*LAYERS, *PASSING],
            nodes_to_quantize=sorted(quantized_nodes(folded.graph)),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        quantized = onnx.load(temporary)
        properties = {entry.key: entry.value for entry in original.metadata_props}
        onnx.helper.set_model_props(quantized, properties)
        onnx.checker.check_model(quantized)
        onnx.save(quantized, temporary)


def check_quantization() -> None:
    """Raise :class:`UserError` if the packages for :func:`quantize_onnx` are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--quantize needs the packages onnx and onnxruntime: pip install onnx onnxruntime"
        ) from error


def quantized_nodes(graph) -> Set[str]:
    """The names of the nodes of an ONNX graph that are computed in int8.

    They are the layers with constant weights whose result another layer takes, be it by way of
    other operators, but not as boxes; and the operators of ``PASSING`` between quantised ones.

    Args:
        graph: an ``onnx.GraphProto`` whose nodes have names of their own.
    """
    constants = {initializer.name for initializer in graph.initializer}
    users: Dict[str, List[tuple]] = {}
    for node in graph.node:
        for place, name in enumerate([*node.input, *_captured(node)]):
            users.setdefault(name, []).append((place, node))
    chosen = {
        node.name
        for node in graph.node
        if _is_layer(node, constants) and _has_layer_behind(node, users, constants)
    }
    made_in_int8 = {name for node in graph.node if node.name in chosen for name in node.output}
    for node in graph.node:  # in order: what a node takes has been made before it
        if node.op_type not in PASSING:
            continue
        inputs = node.input[:1] if node.op_type in ONE_INPUT else node.input
        if all(name in made_in_int8 for name in inputs):
            chosen.add(node.name)
            made_in_int8.update(node.output)
    return chosen


def _is_layer(node, constants: Set[str]) -> bool:
    return node.op_type in LAYERS and node.input[1] in constants


def _has_layer_behind(start, users: Dict[str, List[tuple]], constants: Set[str]) -> bool:
    names, seen = list(start.output), set(start.output)
    while names:
        for place, node in users.get(names.pop(), []):
            if node.op_type in CHOOSING or (
                place > 0 and node.op_type in CHOOSING_BEHIND_THE_FIRST
            ):
                continue
            if _is_layer(node, constants):
                return True
            names += [name for name in node.output if name not in seen]
            seen.update(node.output)
    return False


def _captured(node) -> List[str]:
    """What the bodies of a node, such as ``Scan``, take from the graph around it."""
    names: List[str] = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            body = attribute.g
            own = {value.name for value in body.input} | {i.name for i in body.initializer}
            own |= {name for inner in body.node for name in inner.output}
            taken = [name for inner in body.node for name in [*inner.input, *_captured(inner)]]
            names += [name for name in taken if name and name not in own]
    return names


class _Feeds:
    """A ``CalibrationDataReader`` of onnxruntime, which asks for ``get_next`` only."""

    def __init__(self, first: dict, others: Iterator[dict]):
        self._feeds = iter([first])
        self._others = others

    def get_next(self):
        return next(self._feeds, None) or next(self._others, None)


class _quiet:
    """Within it, onnxruntime's quantisation does not advise what has been done already, nor warn of
    values without bounds, of which none is quantised."""

    def __enter__(self):
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self._errors = np.errstate(invalid="ignore", over="ignore")
        self._errors.__enter__()

    def __exit__(self, *reason):
        self._errors.__exit__(*reason)
        logging.disable(self._level)
