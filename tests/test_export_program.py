"""Detectors through ``torch.export``: equal to eager for images of every number and size."""

import json
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.structures.keypoints import heatmaps_to_keypoints
from PIL import Image
from torchvision.ops import nms

from balanced_d2 import export
from balanced_d2.export import run_exported
from balanced_d2.export.batched import _best, _highest, _move_apart, size_divisibility
from balanced_d2.export.keypoints import _find_in_one, find_keypoints
from balanced_d2.export.nms import suppress
from balanced_d2.export.onnx import _divide_exactly
from balanced_d2.utils.errors import UserError

from .conftest import TINY_CONFIG
from .test_backbones import ON_TIMM
from .test_export import (
    ARCHITECTURES,
    KEYPOINTS,
    METADATA,
    TOLERANCE,
    silence,
    small_model,
    smooth_image,
)
from .test_export_fuzz import detections, eager

OPTIONS = {
    **ARCHITECTURES,
    # Networks of timm pad by the size of their input.
    "timm": [*ON_TIMM, "MODEL.TIMM.PRETRAINED", "False"],
    "convolutions": ["MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8"],
}
NOTHING = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0"]
# Numbers of images, heights and widths, none of them that of the example.
BATCHES = [(1, 97, 211), (3, 33, 1), (2, 64, 96)]
SMALLEST = (1, 1, 1)


def assert_equal(model, run, batch, kind="tracing"):
    """What a program gives for a batch is what the model gives for each image; their number."""
    number, height, width = batch
    images = torch.stack([smooth_image(height, width, seed) for seed in range(number)]).float()
    with torch.no_grad():
        found = [torch.as_tensor(output) for output in run(images)]
    box_tolerance, score_tolerance = TOLERANCE[kind]
    total = 0
    for i, image in enumerate(images):
        with torch.no_grad():
            expected = model([{"image": image}])[0]["instances"]
        count, boxes, scores, classes, *additional = (output[i] for output in found)
        assert int(count) == len(expected)
        used = slice(len(expected))
        # Those whose scores differ by rounding may change places.
        is_same = (
            ((boxes[used, None] - expected.pred_boxes.tensor).abs() <= box_tolerance).all(dim=2)
            & ((scores[used, None] - expected.scores).abs() <= score_tolerance)
            & (classes[used, None] == expected.pred_classes)
        )
        places = torch.arange(len(expected))
        order = places if is_same.diagonal().all() else is_same.int().argmax(dim=1)
        order = torch.where(is_same.diagonal(), places, order)
        assert is_same.any(dim=1).all() and torch.equal(order.sort().values, places)
        assert (scores[used].diff() <= 0).all()
        expected = expected[order]
        assert not boxes[count:].any() and not scores[count:].any()
        assert (classes[count:] == -1).all()
        if expected.has("pred_masks"):
            with torch.no_grad():
                (raw,) = model.inference([{"image": image}], do_postprocess=False)
            soft = raw.pred_masks[raw.pred_boxes.nonempty(), 0][order]
            torch.testing.assert_close(additional.pop(0)[used], soft, rtol=0, atol=1e-4)
        if expected.has("pred_keypoints"):
            points = additional.pop(0)
            torch.testing.assert_close(points[used], expected.pred_keypoints, rtol=0, atol=1e-3)
            assert not points[count:].any()
        assert not additional
        total += len(expected)
    return total


@pytest.mark.parametrize(
    "name",
    ["plain", "cascade with masks", "keypoints", "RetinaNet", "RetinaNet, clipped", "convolutions"],
)
def test_batches_equal_single_images(name):
    model = small_model(*OPTIONS.get(name, []))
    deployable = export.BatchDeployable(model)
    assert assert_equal(model, deployable, (2, 97, 150)) > 10
    assert_equal(model, deployable, SMALLEST)


def test_batches_without_detections():
    model = small_model(*NOTHING)
    assert assert_equal(model, export.BatchDeployable(model), (2, 64, 90)) == 0


def test_images_are_padded_as_the_backbone_asks(monkeypatch):
    model = small_model()
    detect, images = export.BatchDeployable(model), torch.ones(1, 3, 97, 150)

    def padded(**constraints):
        kind = type(model.backbone)
        monkeypatch.setattr(kind, "padding_constraints", constraints, raising=False)
        return tuple(detect._pad(images).shape[2:])

    assert padded() == (128, 160)
    assert padded(size_divisibility=64) == (128, 192) and size_divisibility(model) == 64
    assert padded(size_divisibility=1) == (97, 150) and size_divisibility(model) == 1
    assert padded(square_size=160) == (160, 160)
    with pytest.raises(UserError, match="pads all images to one size"):
        size_divisibility(model)


def test_proposals_without_a_finite_score_are_left_out():
    model = small_model()
    with torch.no_grad():
        model.proposal_generator.rpn_head.objectness_logits.bias[0] = torch.nan
    assert assert_equal(model, export.BatchDeployable(model), (1, 64, 96)) > 10


@pytest.mark.parametrize("name", ["plain", "convolutions", "cascade with masks", "RetinaNet"])
def test_images_in_which_nothing_is_proposed(name):
    """They are NaN, so that no score is finite; beside them, others are as they are alone."""
    model = small_model(*OPTIONS.get(name, []))
    detect = export.BatchDeployable(model)
    images = torch.stack([smooth_image(64, 90, seed) for seed in range(3)]).float()
    images[1] = torch.nan
    with torch.no_grad():
        together = detect(images)
        nothing = detect(images[1:2])
        alone = detect(images[2:])
    assert together[0][1] == 0 and together[0][[0, 2]].min() > 5
    for output, none, one in zip(together, nothing, alone):
        assert torch.equal(output[1], none[0]) and none.unique().numel() == 1
        torch.testing.assert_close(output[2], one[0], rtol=0, atol=1e-3)


def test_suppression_by_row_is_torchvisions():
    torch.manual_seed(1)
    corners = 10 * torch.randint(20, (6, 300, 2)) + torch.rand(6, 300, 1)
    boxes, scores = torch.cat([corners, corners + 30], dim=2), torch.rand(6, 300)
    scores[:, ::5] = -torch.inf  # no boxes
    scores[0] = -torch.inf
    scores[1, 1:] = -torch.inf
    kept = suppress(boxes, scores, 0.5)
    assert kept.shape == scores.shape
    for row in range(6):
        index = scores[row].isfinite().nonzero()[:, 0]
        expected = index[nms(boxes[row][index], scores[row][index], 0.5)]
        assert kept[row].nonzero()[:, 0].tolist() == sorted(expected.tolist())
    assert suppress(boxes[:0], scores[:0], 0.5).shape == (0, 300)

    class Suppression(torch.nn.Module):
        def forward(self, boxes, scores):
            return suppress(boxes, scores, 0.5)

    program = torch.export.export(Suppression(), (boxes, scores)).module()
    assert torch.equal(program(boxes, scores), kept)
    nothing = torch.full_like(scores, -torch.inf)
    assert not program(boxes, nothing).any()


def test_boxes_are_moved_apart_as_torchvision_does():
    """Up to 1,000 of them in an image, by its largest coordinate."""
    boxes = 100 * torch.rand(2, 1100, 4)
    scores = torch.rand(2, 1100)
    scores[0, 1000:] = -torch.inf
    groups = torch.randint(3, (2, 1100))
    moved, is_moved = _move_apart(boxes, scores, groups)
    assert is_moved.tolist() == [True, False]
    offsets = groups[0].to(boxes) * (boxes[0, :1000].max() + 1)
    assert torch.equal(moved[0, :1000], (boxes[0] + offsets[:, None])[:1000])
    assert torch.equal(moved[1], boxes[1])


def test_best_scores_have_a_fixed_number():
    scores = torch.tensor([[0.1, 0.9, -torch.inf], [0.3, 0.2, 0.5]])
    best, index = _best(scores, 5)
    assert best.shape == index.shape == (2, 5)
    assert index.tolist() == [[1, 0, 0, 0, 0], [2, 0, 1, 0, 0]]
    assert best.isfinite().sum(dim=1).tolist() == [2, 3]
    assert _best(scores, 2)[1].tolist() == [[1, 0], [2, 0]]


def test_equal_scores_keep_their_order():
    scores = torch.tensor([0.5, 0.7, 0.5]).repeat(40)[None]
    best, index = _highest(scores, 120)
    assert best.tolist()[0] == sorted(scores.tolist()[0], reverse=True)
    first, others = index[0, :40], index[0, 40:]
    assert first.tolist() == list(range(1, 120, 3)) and (others.diff() > 0).all()


def test_keypoints_of_one_box_are_detectron2s():
    torch.manual_seed(5)
    maps = 3 * torch.randn(6, 4, 14, 14)
    corners = 50 * torch.rand(6, 2)
    sizes = torch.tensor([[30.2, 17.9], [8, 40], [0.3, 0.2], [14, 14], [100, 3.5], [1, 1]])
    boxes = torch.cat([corners, corners + sizes], dim=1)
    expected = heatmaps_to_keypoints(maps, boxes)[:, :, [0, 1, 3]]
    torch.testing.assert_close(find_keypoints(maps, boxes), expected, rtol=0, atol=0)
    found = torch.stack([_find_in_one(*one) for one in zip(maps, boxes)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def exported(model, kind, folder):
    """The exported model as a function of a batch, from its file."""
    path = str(folder / f"{kind}.pt2")
    example = smooth_image(120, 140, seed=1)
    if kind == "pt2":
        export.export_pt2(model, example, path, METADATA)
        return torch.export.load(path).module()
    described = {**METADATA, "outputs": export.output_names(is_batch=True)}
    export.export_onnx_batch(model, example, path, described)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", "cascade with masks", "RetinaNet", "timm", "keypoints", "convolutions"]
)
def test_program_equals_the_model(name, tmp_path):
    model = small_model(*OPTIONS.get(name, []))
    run = exported(model, "pt2", tmp_path)
    for batch in BATCHES:
        assert assert_equal(model, run, batch) > 0
    assert_equal(model, run, SMALLEST)
    assert assert_equal(silence(model), silence(run), BATCHES[0]) == 0
    assert json.loads(stored(tmp_path / "pt2.pt2")) == METADATA


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "RetinaNet"])
def test_program_in_strict_mode(name):
    model = small_model(*OPTIONS.get(name, []))
    run = export.export_program(model, smooth_image(120, 140, seed=1), strict=True).module()
    for batch in (*BATCHES[:1], SMALLEST):
        assert_equal(model, run, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "convolutions"])
def test_onnx_of_batches_equals_the_model(name, tmp_path):
    """On all engines, and with nothing in an image."""
    pytest.importorskip("onnxscript", reason="PyTorch's current ONNX exporter needs onnxscript")
    model = small_model(*OPTIONS.get(name, []))
    run = exported(model, "onnx", tmp_path)
    assert run(torch.full((2, 3, 64, 90), torch.nan))[0].tolist() == [0, 0]
    for engine in export.installed_engines("onnx-batch"):
        detector = run_exported.ExportedDetector(str(tmp_path / "onnx.pt2"), engine=engine)
        for number, height, width in (*BATCHES[:2], SMALLEST):
            images = [smooth_image(height, width, seed).float() for seed in range(number)]
            for image, outputs in zip(images, detector.detect([x.numpy() for x in images])):
                before = eager(model, image)
                after = detections(outputs, before.image_size)
                assert export.Comparison(before, after, TOLERANCE["onnx"]).agrees
                assert len(before.boxes) > 5
    session = onnxruntime.InferenceSession(tmp_path / "onnx.pt2")
    assert [output.name for output in session.get_outputs()] == [
        *("num_detections", "boxes", "scores", "classes")
    ]
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["balanced_d2.json"])["class_names"] == METADATA["class_names"]


@pytest.mark.slow
def test_tool_and_runner(run_here, tmp_path):
    """Exported, verified by a process of its own, and run on a picture, as users do."""
    opts = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    opts += ["INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"]
    opts += ["DATASETS.TEST", "()", "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    torch.save({"model": small_model().state_dict()}, tmp_path / "model.pth")
    pixels = smooth_image(150, 221).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    result = run_here(
        *("tools/export_model.py", "--config-file", TINY_CONFIG, "--format", "pt2"),
        *("--output", tmp_path, "--sample-image", tmp_path / "photo.png", *opts),
    )
    assert result.returncode == 0, result.stderr
    assert "written by torch.export" in result.stdout and "deprecated" not in result.stdout
    assert "equal: boxes within 0.001 px, scores within 1e-05" in result.stdout
    described = json.loads(stored(tmp_path / "model.pt2"))
    assert (described["format"], described["format_version"]) == ("pt2", 2)
    assert described["versions"]["balanced_d2"] and described["class_names"] == ["0", "1", "2"]
    result = run_here(
        *("tools/run_exported.py", tmp_path / "model.pt2", tmp_path / "photo.png"),
        *("--threshold", "0.05"),
    )
    assert result.returncode == 0 and result.stderr == ""
    assert len(json.loads(result.stdout)["detections"]) == 100


def stored(path):
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/extra/balanced_d2.json"))
        return archive.read(name)


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['p4']"],
            "Res5ROIHeads in the place of StandardROIHeads cannot be exported",
        ),
    ],
)
def test_models_that_no_program_is_made_of(opts, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export.export_pt2(small_model(*opts), smooth_image(64, 64), str(tmp_path / "m.pt2"), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ["format", "opts"], [("onnx-batch", KEYPOINTS), ("aoti", ARCHITECTURES["masks and keypoints"])]
)
def test_formats_without_keypoints(format, opts):
    with pytest.raises(UserError, match=f"with --format {format}; use --format .* or pt2"):
        export.check_exportable(small_model(*opts), format)


def test_runner_reads_fixed_slots_and_refuses_newer_files(tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, images):
            boxes = images[:, 0, :2, :4]
            scores = images[:, 1, 0, :2] / 10
            number = torch.ones(images.shape[0], dtype=torch.long)
            return number, boxes, scores, torch.ones_like(scores, dtype=torch.long)

    from balanced_d2.export import run_exported as runner

    described = {
        "format": "pt2",
        "outputs": ["num_detections", "boxes", "scores", "classes"],
        **METADATA,
    }
    batch = torch.export.Dim("batch")
    one = torch.export.export(Fixed(), (torch.zeros(2, 3, 4, 5),), dynamic_shapes=({0: batch},))

    def saved(**changes):
        files = {"balanced_d2.json": json.dumps({**described, **changes})}
        torch.export.save(one, str(tmp_path / "model.pt2"), extra_files=files)
        return str(tmp_path / "model.pt2")

    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    outputs = runner.ExportedDetector(saved())(array)
    assert outputs["boxes"].tolist() == [[0, 1, 2, 3]]
    assert outputs["scores"].tolist() == [2.0] and outputs["classes"].tolist() == [1]
    assert outputs["image_size"].tolist() == [4, 5]
    newer = saved(format_version=3, versions={"balanced_d2": "9.9"})
    with pytest.raises(runner.UserError, match="format version 3, and .* knows up to 2: .*9.9"):
        runner.ExportedDetector(newer)


def test_divisions_of_integers_are_exact():
    """And what they were, for negative numbers too."""

    def graph():
        nodes = [
            onnx.helper.make_node("Div", ["x", "divisor"], ["quotient"]),
            onnx.helper.make_node("Mul", ["quotient", "divisor"], ["y"]),
        ]
        values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, [99]) for n in "xy"]
        divisor = onnx.helper.make_tensor("divisor", onnx.TensorProto.INT64, [], [32])
        made = onnx.helper.make_graph(nodes, "padding", values[:1], values[1:], [divisor])
        opset = onnx.helper.make_opsetid("", 17)
        return onnx.helper.make_model(made, opset_imports=[opset], ir_version=8)

    def run(model):
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return session.run(None, {"x": np.arange(-49, 50)})[0].tolist()

    model = graph()
    _divide_exactly(model.graph, onnx.shape_inference.infer_shapes(model).graph)
    assert [node.op_type for node in model.graph.node] == ["Mod", "Sub", "Div", "Mul"]
    assert run(model) == run(graph())


@pytest.mark.slow
def test_openvino_finds_what_onnxruntime_finds(tmp_path):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    path = str(tmp_path / "model.onnx")
    export.export_onnx(small_model(), smooth_image(120, 140, seed=1), path, METADATA)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", precision)
    for size in ((160, 128), (161, 129), (33, 31)):
        image = smooth_image(*size).float().numpy()
        expected = session.run(None, {"image": image})
        found = compiled(image)
        boxes, classes, scores, _ = (found[i] for i in range(len(expected)))
        np.testing.assert_allclose(boxes, expected[0], rtol=0, atol=1e-2)
        assert classes.tolist() == expected[1].tolist()
        np.testing.assert_allclose(scores, expected[2], rtol=0, atol=1e-4)
