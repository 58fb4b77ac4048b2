"""What is done to the graph of an exported ONNX file: attention in chunks, int8; and that tools
which rewrite graphs leave its result as it is."""

import json
import re
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.helper import make_node, make_tensor_value_info
from torch.nn import functional as F

from balanced_d2 import export, load_config
from balanced_d2.commands import export_model
from balanced_d2.export import Comparison, run_exported, sample
from balanced_d2.export.attention import CHUNK, chunk_attention
from balanced_d2.export.quantize import quantized_nodes
from balanced_d2.layers.rescale import adaptive_max_pool, nearest
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, assert_user_error
from .test_backbones import ON_TIMM
from .test_export import METADATA, detections, small_model, smooth_image

FLOAT = onnx.TensorProto.FLOAT


def model_of(nodes, inputs, outputs, weights=()):
    """Inputs and outputs: names and shapes; weights: names and arrays."""
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model)
    return model


def run(model, **inputs):
    session = onnxruntime.InferenceSession(
        model if isinstance(model, str) else model.SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, inputs)


def attention():
    nodes = [
        make_node("Relu", ["q"], ["query"]),
        make_node("MatMul", ["query", "k"], ["logits"]),
        make_node("Softmax", ["logits"], ["weights"], axis=-1),
        make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    shapes = {"q": ["n", "h", "p", 5], "k": ["n", "h", 5, "o"], "v": ["n", "h", "o", 6]}
    return model_of(nodes, shapes, {"y": ["n", "h", "p", 6]})


@pytest.mark.parametrize("positions", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_attention_in_chunks_is_attention(positions):
    model = attention()
    assert chunk_attention(model) == 1
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert "Scan" in kinds and "Softmax" not in kinds and "MatMul" not in kinds
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, positions, 5)).astype(np.float32)
    k, v = (rng.normal(size=(2, 3, *s)).astype(np.float32) for s in ((5, 41), (41, 6)))
    (y,) = run(model, q=q, k=k, v=v)
    logits = np.maximum(q, 0).astype(np.float64) @ k
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ v
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_other_softmax_stays():
    nodes = [
        make_node("MatMul", ["q", "k"], ["logits"]),
        make_node("Softmax", ["logits"], ["weights"], axis=-1),
        make_node("MatMul", ["weights", "v"], ["y"]),
        make_node("Add", ["weights", "one"], ["seen"]),  # the matrix itself is asked for
    ]
    shapes = {"q": [1, 1, 4, 5], "k": [1, 1, 5, 4], "v": [1, 1, 4, 6]}
    outputs = {"y": [1, 1, 4, 6], "seen": [1, 1, 4, 4]}
    model = model_of(nodes, shapes, outputs, {"one": np.ones((), np.float32)})
    before = model.SerializeToString()
    assert chunk_attention(model) == 0 and model.SerializeToString() == before


def test_what_is_quantised():
    """Layers in front of layers, and what lies between; no predictors, and nothing behind boxes."""
    weight = np.ones((4, 4, 1, 1), np.float32)
    nodes = [
        make_node("Conv", ["x", "w"], ["stem"], name="stem"),
        make_node("Relu", ["stem"], ["a"], name="stem relu"),
        make_node("Conv", ["a", "w"], ["b"], name="body"),
        make_node("Add", ["a", "b"], ["c"], name="shortcut"),
        make_node("Add", ["c", "x"], ["d"], name="with the image"),
        make_node("Conv", ["d", "w"], ["deltas"], name="deltas"),
        make_node("Flatten", ["deltas"], ["boxes"], name="flatten"),
        make_node("RoiAlign", ["c", "boxes", "i"], ["rois"], name="align"),
        make_node("Flatten", ["rois"], ["flat"], name="flatten rois"),
        make_node("Gemm", ["flat", "w2"], ["hidden"], name="head"),
        make_node("Relu", ["hidden"], ["e"], name="head relu"),
        make_node("Gemm", ["e", "w2"], ["scores"], name="scores"),
        make_node("Relu", ["scores"], ["y"], name="last relu"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [make_tensor_value_info("x", FLOAT, [1, 4, 8, 8])],
        [make_tensor_value_info("y", FLOAT, None)],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(weight[..., 0, 0], "w2"),
            numpy_helper.from_array(np.zeros(64, np.int64), "i"),
        ],
    )
    assert quantized_nodes(graph) == {
        *("stem", "stem relu", "body", "shortcut"),
        *("head", "head relu"),
    }


def test_layers_of_attention_in_chunks_are_quantised():
    weight = np.ones((5, 5, 1, 1), np.float32)
    model = attention()
    assert chunk_attention(model) == 1
    nodes = [
        *(make_node("Conv", ["x", "w"], [n], name=n) for n in ("q4", "k4", "v4")),
        *(make_node("Identity", [f"{n}4"], [n], name=f"as {n}") for n in "qkv"),
        *model.graph.node,
        make_node("Conv", ["y", "w"], ["out"], name="out"),
    ]
    for i, node in enumerate(nodes):
        node.name = node.name or f"node {i}"
    graph = onnx.helper.make_graph(nodes, "test", [], [], [numpy_helper.from_array(weight, "w")])
    assert quantized_nodes(graph) == {"q4", "k4", "v4"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model's file in float and in int8."""
    folder = tmp_path_factory.mktemp("exported")
    paths = [str(folder / name) for name in ("model.onnx", "model.int8.onnx")]
    export.export_onnx(small_model(), smooth_image(120, 140, seed=1), paths[0], METADATA)
    images = (smooth_image(96, 128, seed).numpy() for seed in range(6))
    export.quantize_onnx(*paths, images)
    return paths


@pytest.mark.slow
def test_int8_is_nearly_the_model(exported):
    whole, int8 = (onnx.load(path) for path in exported)
    assert int8.metadata_props == whole.metadata_props
    assert json.loads(int8.metadata_props[0].value) == METADATA
    assert len(int8.SerializeToString()) < 0.5 * len(whole.SerializeToString())

    # Weights within half a step of what they were; those of predictors exactly.
    makers = {node.output[0]: node for node in int8.graph.node}
    arrays = {i.name: numpy_helper.to_array(i) for i in int8.graph.initializer}
    floats = {i.name: numpy_helper.to_array(i) for i in whole.graph.initializer}
    (head,) = (n for n in int8.graph.node if n.op_type == "Gemm" and "fc1" in n.name)
    dequantize = makers[head.input[1]]
    assert dequantize.op_type == "DequantizeLinear"
    quantized, scale, zero = (arrays[name] for name in dequantize.input)
    assert quantized.dtype == np.int8 and scale.ndim == 1 and not zero.any()
    (name,) = (n for n in floats if n.endswith("fc1.weight"))
    shape = (-1, 1) if quantized.shape[0] == len(scale) else (1, -1)
    error = np.abs(quantized * scale.reshape(shape) - floats[name])
    assert (error <= 0.5001 * scale.reshape(shape)).all() and error.max() > 0
    layers = [node for node in int8.graph.node if node.op_type in ("Conv", "Gemm")]
    for part in ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas"):
        (name,) = (n for n in floats if n.endswith(f"{part}.weight"))
        predictors = [node for node in layers if part in node.name]
        assert predictors
        for node in predictors:
            assert np.isin(arrays[node.input[1]], floats[name]).all()

    # Detections are those of the model, of scores that are nearly equal in another order.
    image = smooth_image(97, 131, seed=20).float().numpy()
    boxes, classes, scores, _ = run(exported[0], image=image)
    near, near_classes, near_scores, _ = run(exported[1], image=image)
    distance = np.abs(boxes[:, None] - near[None]).max(axis=2)
    same = (distance < 6) & (classes[:, None] == near_classes[None])
    assert same.any(axis=1).mean() > 0.7
    assert abs(scores.mean() - near_scores.mean()) < 0.05


@pytest.mark.slow
def test_int8_of_one_image_in_openvino(tmp_path):
    """Of a model with factors of channels and padding of its own, as the recommended ones have."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = small_model(
        *(*ON_TIMM, "MODEL.TIMM.PRETRAINED", "False", "MODEL.BALANCED_FPN.ZERO_INIT", "True")
    )
    with torch.no_grad():
        model.backbone.balancer.scale.uniform_(0.5, 1.5)
    paths = [str(tmp_path / name) for name in ("model.onnx", "model.int8.onnx")]
    described = {**METADATA, "outputs": export.output_names()}
    export.export_onnx(model, smooth_image(120, 140, seed=1), paths[0], described)
    export.quantize_onnx(*paths, (smooth_image(96, 128, seed).numpy() for seed in range(3)))
    graph = onnx.load(paths[1]).graph
    constants = {initializer.name for initializer in graph.initializer}
    pads = [node.input[1] in constants for node in graph.node if node.op_type == "Pad"]
    assert len(pads) > 2 and pads.count(False) == 2  # of the image itself, and of attention
    image = smooth_image(97, 131, seed=20).float().numpy()
    first, second = (
        run_exported.ExportedDetector(paths[1], engine=engine)(image)
        for engine in ("onnxruntime", "openvino")
    )
    assert min(len(first["scores"]), len(second["scores"])) > 10
    distance = np.abs(first["boxes"][:, None] - second["boxes"][None]).max(axis=2)
    same = (distance < 6) & (first["classes"][:, None] == second["classes"][None])
    assert same.any(axis=1).mean() > 0.5


@pytest.mark.slow
def test_operators_are_in_the_table_of_the_docs(exported):
    rows = (ROOT / "docs" / "export.md").read_text().split("## Operators", 1)[1].splitlines()
    first_columns = (row.split("|")[1] for row in rows if row.startswith("| `"))
    documented = {name for column in first_columns for name in re.findall(r"`(\w+)`", column)}
    assert {"RoiAlign", "TopK", "Where"} <= documented
    for path in exported:
        assert operators(onnx.load(path).graph) <= documented


def operators(graph):
    found = {node.op_type for node in graph.node}
    bodies = (a.g for node in graph.node for a in node.attribute if a.HasField("g"))
    return found.union(*map(operators, bodies))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])
def test_tools_that_simplify_leave_the_result(exported, tool):
    package = pytest.importorskip(tool, reason=f"{tool} is not installed")
    model = onnx.load(exported[0])
    simplified = package.simplify(model)[0] if tool == "onnxsim" else package.slim(model)
    assert len(simplified.graph.node) < len(onnx.load(exported[0]).graph.node)
    for size in ((97, 131), (64, 96)):
        image = smooth_image(*size).float().numpy()
        for found, expected in zip(run(simplified, image=image), run(exported[0], image=image)):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    properties = {entry.key: entry.value for entry in simplified.metadata_props}
    assert json.loads(properties["balanced_d2.json"]) == METADATA


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, name", [("onnx", "model.int8.onnx"), ("onnx-batch", "model.batch.int8.onnx")]
)
def test_tool_quantises_by_a_folder(format, name, run_here, tiny_coco, tmp_path, monkeypatch):
    """And evaluates the file on all engines: OpenVINO finds what ONNX Runtime does."""
    # They have tests of their own, and start many processes.
    monkeypatch.setattr(export_model, "verify", lambda *arguments: None)
    monkeypatch.setattr(export, "latencies", lambda *arguments: "")
    if format == "onnx-batch":
        pytest.importorskip("onnxscript", reason="PyTorch's current ONNX exporter needs onnxscript")
    opts = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    opts += ["INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"]
    opts += ["DATASETS.TEST", "('tiny',)", "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    state = small_model("MODEL.ROI_HEADS.NUM_CLASSES", "2").state_dict()
    torch.save({"model": state}, tmp_path / "model.pth")
    images = tiny_coco.parent / "images"
    result = run_here(
        *("tools/export_model.py", "--config-file", TINY_CONFIG, "--format", format),
        *("--register", "tiny", tiny_coco, images, "--quantize", images),
        *("--output", tmp_path, *opts),
    )
    assert result.returncode == 0, result.stderr
    assert "AP on tiny, onnxruntime: " in result.stdout
    int8 = onnx.load(tmp_path / name)
    described = json.loads(int8.metadata_props[0].value)
    assert described["class_names"] == ["bright", "dark"] and described["format"] == format

    found = []
    for engine in export.installed_engines(format):
        result = run_here(
            *("tools/run_exported.py", tmp_path / name, images),
            *("--batch-size", "4", "--engine", engine, "--threshold", "0.1"),
        )
        assert result.returncode == 0
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(lines) == 6
        found.append(np.array([len(line["detections"]) for line in lines]))
    assert found[0].sum() > 0 and np.abs(found[0] - found[-1]).max() <= 0.2 * found[0].max()


@pytest.mark.parametrize(
    "format, folder, tested, parts",
    [
        ("pt2", "empty", "()", ["--quantize is for --format onnx and onnx-batch, not pt2"]),
        ("onnx", "empty", "()", ["there are no images in the folder"]),
        ("onnx-batch", "bad", "()", ["cannot read the calibration image", "b.png"]),
        ("onnx-batch", "bad", "('nowhere',)", ["nowhere"]),  # after an export of minutes
    ],
)
def test_what_cannot_be_quantised(format, folder, tested, parts, run_here, tmp_path):
    torch.save({"model": small_model().state_dict()}, tmp_path / "model.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "a.png").mkdir(parents=True)  # no image, and not taken for one
    cv2.imwrite(str(tmp_path / "bad" / "a.png" / "a.png"), np.zeros((50, 60, 3), np.uint8))
    (tmp_path / "bad" / "b.png").write_text("not an image")
    result = run_here(
        *("tools/export_model.py", "--config-file", TINY_CONFIG, "--output", tmp_path / "out"),
        *("--quantize", tmp_path / folder, "--format", format),
        *("MODEL.WEIGHTS", tmp_path / "model.pth", "DATASETS.TEST", tested),
        *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    )
    assert_user_error(result, *parts)
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.fixture
def two_engines(monkeypatch):
    monkeypatch.setattr(export, "installed_engines", lambda format: ["first", "second"])


@pytest.mark.parametrize("lost, is_refused", [(0.5, False), (0.51, True), (-3, False)])
@pytest.mark.parametrize("place", [("a", "second"), ("b", "first")])
def test_int8_that_loses_ap_is_refused(
    lost, is_refused, place, two_engines, monkeypatch, capsys, tmp_path
):
    """On whichever data set and engine it does."""

    def average_precision(path, loader, evaluator, engine):
        assert loader == evaluator
        return 40 - (lost if path == "int8.onnx" and (loader, engine) == place else 0.0)

    trainer = SimpleNamespace(
        build_test_loader=lambda cfg, name: name, build_evaluator=lambda cfg, name, folder: name
    )
    monkeypatch.setattr(export, "average_precision", average_precision)
    monkeypatch.setattr(export_model, "trainer_for", lambda cfg: trainer)
    cfg = load_config(TINY_CONFIG, ["DATASETS.TEST", "('a', 'b')"])
    if is_refused:
        with pytest.raises(SystemExit, match=f"int8 loses {lost} AP, more than 0.5; .* float.onnx"):
            export_model.compare_accuracy(cfg, "float.onnx", "int8.onnx", "onnx")
    else:
        export_model.compare_accuracy(cfg, "float.onnx", "int8.onnx", "onnx")
    said = capsys.readouterr().out
    assert said.count("AP on ") == 4
    assert f"AP on {place[0]}, {place[1]}: 40.00 before, {40 - lost:.2f} in int8" in said


@pytest.mark.parametrize("tested", ["()", "('a',)"])
def test_ap_that_is_not_known_is_said(tested, two_engines, monkeypatch, capsys):
    monkeypatch.setattr(export, "average_precision", lambda *arguments: float("nan"))
    trainer = SimpleNamespace(build_test_loader=lambda *a: 0, build_evaluator=lambda *a: 0)
    monkeypatch.setattr(export_model, "trainer_for", lambda cfg: trainer)
    cfg = load_config(TINY_CONFIG, ["DATASETS.TEST", tested])
    export_model.compare_accuracy(cfg, "float.onnx", "int8.onnx", "onnx")
    assert "it is not known how much AP int8 costs" in capsys.readouterr().out


@pytest.mark.parametrize("different", [None, "first", "second"])
def test_every_engine_is_verified(different, two_engines, monkeypatch, capsys):
    def verify(model, path, images, format, runner, engine):
        found = detections([0.9], [1], shift=float(engine == different))
        tolerance = export.TOLERANCES[format]
        return [Comparison(detections([0.9], [1]), found, tolerance)]

    monkeypatch.setattr(export, "verify", verify)
    if different:
        with pytest.raises(SystemExit, match="m.onnx is not equal to the model; the file is kept"):
            export_model.verify(None, "m.onnx", [], "onnx")
    else:
        export_model.verify(None, "m.onnx", [], "onnx")
    said = capsys.readouterr().out
    assert said.count("DIFFERENT") == bool(different)
    assert said.count("equal: boxes within 0.01 px") == ["first", "second", None].index(different)


def test_images_to_quantise_by_are_the_networks(tmp_path, monkeypatch):
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((50, 100, 3), (10 * i, 1, 2), np.uint8))
    cfg = load_config(TINY_CONFIG, ["INPUT.MIN_SIZE_TEST", "64", "INPUT.FORMAT", "RGB"])
    images = list(export.calibration_images(cfg, str(tmp_path)))
    assert [image.shape for image in images] == [(3, 64, 128)] * 3
    assert [image[:, 0, 0].tolist() for image in images] == [[2, 1, 10 * i] for i in range(3)]
    monkeypatch.setattr(sample, "MAX_CALIBRATION_IMAGES", 2)
    images = list(export.calibration_images(cfg, str(tmp_path)))
    assert [image[2, 0, 0] for image in images] == [0, 10]
    with pytest.raises(UserError, match="no images in the folder"):
        export.calibration_images(cfg, str(tmp_path / "none"))


class Rescaling(torch.nn.Module):
    def forward(self, x, like):
        return adaptive_max_pool(x, like), nearest(like, x)


@pytest.fixture
def rescaling(tmp_path):
    """A file that pools the first input to the size of the second, and repeats the second."""
    path = str(tmp_path / "rescaling.onnx")
    torch.onnx.export(
        Rescaling(),
        (torch.rand(1, 2, 9, 7), torch.rand(1, 2, 4, 3)),
        path,
        dynamo=False,
        input_names=["x", "like"],
        dynamic_axes={"x": {2: "a", 3: "b"}, "like": {2: "c", 3: "d"}},
    )
    return path


# Of levels that are twice, four times and almost four times as large. 82 is that of P4 in images of
# 1312 pixels, whose reciprocal, in float32, gives less than a half of 41.
LEVELS = [(41, 82), (41, 164), (42, 166), (21, 82), (47, 94), (7, 26), (1, 2), (1, 1)]


def assert_rescaled(run, coarse, fine):
    x = torch.rand(1, 2, fine, 3)
    like = torch.arange(2.0 * coarse).reshape(1, 2, coarse, 1)
    pooled, repeated = run(x.numpy(), like.numpy())
    np.testing.assert_array_equal(pooled, F.adaptive_max_pool2d(x, (coarse, 1)))
    np.testing.assert_array_equal(repeated, F.interpolate(like, (fine, 3), mode="nearest"))


def run_session(session, x, like):
    return session.run(None, {"x": x, "like": like})


def test_levels_are_rescaled_alike_however_a_runtime_divides(rescaling):
    """As OpenVINO does, by multiplying with a reciprocal, also one that is rounded otherwise: where
    a quotient is a whole number, as it often is, a floor of it must not depend on that."""
    model = onnx.shape_inference.infer_shapes(onnx.load(rescaling))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Div" or types[node.output[0]] != onnx.TensorProto.FLOAT:
            nodes.append(node)
            continue
        reciprocal = f"{node.output[0]}_reciprocal"
        nodes += [
            onnx.helper.make_node("Reciprocal", [node.input[1]], [reciprocal]),
            onnx.helper.make_node("Mul", [node.input[0], reciprocal], node.output),
        ]
    assert len(nodes) > len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    changed = onnxruntime.InferenceSession(model.SerializeToString())
    session = onnxruntime.InferenceSession(rescaling)
    for engine in (session, changed):
        for coarse, fine in LEVELS:
            assert_rescaled(partial(run_session, engine), coarse, fine)


def test_levels_are_rescaled_alike_in_openvino(rescaling):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(rescaling, "CPU", options)
    pairs = [(coarse, fine) for fine in range(1, 25) for coarse in range(1, fine + 1)]
    for coarse, fine in [*LEVELS, *pairs]:
        assert_rescaled(lambda x, y: compiled([x, y]).values(), coarse, fine)
