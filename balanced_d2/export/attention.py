"""Attention in ONNX without the positions x positions matrix.

Opset 23 has it as one operator, but ONNX Runtime has no RoiAlign of that opset. Up to then, it is
computed for some positions after the other, which asks for ``Scan``, an operator of all opsets.
"""

from typing import Set

# The positions at a time. The matrix of an image of 800 x 1333 has 4,200 x 4,200 values, 67 MiB;
# for so many positions it has 4 MiB.
CHUNK = 256


def chunk_attention(model) -> int:
    """Let every ``softmax(q @ k) @ v`` of a model be computed in chunks of positions.

    Args:
        model: an ``onnx.ModelProto``, changed in place.

    Returns:
        The number of such products. Those of tensors that are not known to have 4 dimensions stay
        as they are.
    """
    import onnx

    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in inferred.value_info}
    makers = {name: node for node in graph.node for name in node.output}
    uses = [name for node in graph.node for name in node.input]
    nodes: list = []
    replaced: Set[str] = set()
    number = 0
    for node in graph.node:
        softmax = makers.get(node.input[0]) if node.op_type == "MatMul" else None
        logits = makers.get(softmax.input[0]) if softmax and softmax.op_type == "Softmax" else None
        if (
            softmax is None
            or logits is None
            or logits.op_type != "MatMul"
            or any(uses.count(name) > 1 for name in (softmax.output[0], logits.output[0]))
            or any(a.name == "axis" and a.i not in (-1, 3) for a in softmax.attribute)
            or ranks.get(logits.input[0]) != 4
        ):
            nodes.append(node)
            continue
        query, key = logits.input
        nodes += _scan(f"{node.output[0]}_chunks", query, key, node.input[1], node.output[0])
        replaced.update((softmax.output[0], logits.output[0]))
        number += 1
    del graph.node[:]
    graph.node.extend(node for node in nodes if not replaced.intersection(node.output))
    # What shape inference has stored of values that are gone.
    kept = [value for value in graph.value_info if value.name not in replaced]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return number


def _scan(prefix: str, query: str, key: str, value: str, result: str) -> list:
    """Nodes for ``softmax(query @ key) @ value``.

    Args:
        query, key, value: names of tensors (N, heads, positions, C), (N, heads, C, others) and
            (N, heads, others, D).
        result: the name of the output, (N, heads, positions, D).
    """
    import onnx
    from onnx.helper import make_node, make_tensor_value_info

    nodes = []

    def add(kind: str, inputs: list, name: str, **attributes) -> str:
        name = f"{prefix}_{name}"
        nodes.append(make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(name: str, *values: int) -> str:
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values)
        return add("Constant", [], name, value=tensor)

    def four_dimensions(name: str):
        kind = onnx.TensorProto.FLOAT
        return make_tensor_value_info(f"{prefix}_{name}", kind, [None] * 4)

    positions = add("Shape", [query], "positions", start=2, end=3)
    negative = add("Neg", [positions], "negative")
    missing = add("Mod", [negative, constant("size", CHUNK)], "missing")
    begin = constant("begin", 0, 0, 0, 0, 0, 0)
    pads = add("Concat", [begin, missing, constant("end", 0)], "pads", axis=0)
    padded = add("Pad", [query, pads], "padded")
    channels = add("Shape", [query], "channels", start=3, end=4)
    split = add("Concat", [constant("split", 0, 0, -1, CHUNK), channels], "by_chunk", axis=0)
    chunks = add("Reshape", [padded, split], "queries")

    # Key and value are handed on from chunk to chunk: OpenVINO takes nothing else from outside.
    body = onnx.helper.make_graph(
        [
            make_node("MatMul", [f"{prefix}_taken", f"{prefix}_key"], [f"{prefix}_logits"]),
            make_node("Softmax", [f"{prefix}_logits"], [f"{prefix}_weights"], axis=-1),
            make_node("MatMul", [f"{prefix}_weights", f"{prefix}_value"], [f"{prefix}_given"]),
            make_node("Identity", [f"{prefix}_key"], [f"{prefix}_next_key"]),
            make_node("Identity", [f"{prefix}_value"], [f"{prefix}_next_value"]),
        ],
        f"{prefix}_body",
        [four_dimensions(name) for name in ("key", "value", "taken")],
        [four_dimensions(name) for name in ("next_key", "next_value", "given")],
    )
    attended = f"{prefix}_attended"
    scan = make_node(
        "Scan",
        [key, value, chunks],
        [f"{prefix}_last_key", f"{prefix}_last_value", attended],
        name=attended,
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[2],
        scan_output_axes=[2],
    )
    nodes.append(scan)
    width = add("Shape", [value], "width", start=3, end=4)
    joined = add("Concat", [constant("join", 0, 0, -1), width], "joined", axis=0)
    rows = add("Reshape", [attended, joined], "rows")
    limits = [constant("from", 0), positions, constant("axis", 2)]
    nodes.append(make_node("Slice", [rows, *limits], [result], name=f"{prefix}_result"))
    return nodes
