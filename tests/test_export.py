"""Exported models equal the eager one, hold nothing of the machine, and leave the model alone."""

import copy
import io
import json
import zipfile

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, ROIMasks
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torchvision.ops import batched_nms

from balanced_d2 import export, load_config
from balanced_d2.data import register_coco
from balanced_d2.export.nms import onnx_batched_nms, scripted_batched_nms
from balanced_d2.export.verify import Comparison, Detections
from balanced_d2.utils.errors import UserError

from .conftest import TINY_CONFIG, write_coco
from .test_backbones import ON_TIMM, ON_TORCHVISION

KINDS = ("tracing", "onnx")
# What an exported model may differ by: boxes in pixels, scores.
TOLERANCE = {"tracing": (1e-3, 1e-5), "onnx": (1e-2, 1e-4)}
MASK_TOLERANCE = {"tracing": 1e-4, "onnx": 1e-2}
METADATA = {
    **{"format_version": 2, "class_names": ["a", "b", "c"]},
    **{"input_format": "BGR", "min_size": 0, "max_size": 0},
}
SIZES = [(64, 96), (97, 211), (33, 190), (224, 160), (150, 149)]


def small_model(*opts, config=TINY_CONFIG):
    """A model with random weights whose scores spread out, so that their order is no accident."""
    opts = [*("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "3"), *opts]
    opts = [*("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""), *opts]
    torch.manual_seed(3)
    model = build_model(load_config(config, opts)).eval()
    for name, parameter in model.named_parameters():
        if name == "head.cls_score.weight":  # of RetinaNet
            torch.nn.init.normal_(parameter, std=0.03)
        elif name.endswith(("cls_score.weight", "objectness_logits.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
        if name.endswith(("conv_out.weight", "bbox_pred.weight")):
            torch.nn.init.normal_(parameter, std=0.02)
        if name.endswith(("mask_head.predictor.weight", "keypoint_head.score_lowres.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def smooth_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = 255 * torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator)
    return F.interpolate(blocks, (height, width), mode="bicubic")[0].clamp(0, 255).byte()


def exported(model, kind, folder):
    """The exported model, loaded from its file, as a function of one image to tensors."""
    path = str(folder / kind)
    example = smooth_image(120, 140, seed=1)
    if kind != "onnx":
        export.export_torchscript(model, example, path, METADATA)
        return torch.jit.load(path)
    export.export_onnx(model, example, path, METADATA)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [
        torch.from_numpy(value) for value in session.run(None, {"image": image.float().numpy()})
    ]


def assert_equal(model, run, image, kind):
    with torch.no_grad():
        expected = model([{"image": image}])[0]["instances"]
        boxes, classes, scores, *additional, image_size = run(image)
    assert tuple(image_size.tolist()) == tuple(image.shape[-2:]) and image_size.dtype == torch.int64
    assert boxes.shape == (len(expected), 4)
    assert classes.dtype == torch.int64 and torch.equal(classes, expected.pred_classes)
    box_tolerance, score_tolerance = TOLERANCE[kind]
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=box_tolerance)
    torch.testing.assert_close(scores, expected.scores, rtol=0, atol=score_tolerance)
    if expected.has("pred_masks"):
        masks = additional.pop(0)
        with torch.no_grad():
            (raw,) = model.inference([{"image": image}], do_postprocess=False)
        soft = raw.pred_masks[raw.pred_boxes.nonempty(), 0]
        torch.testing.assert_close(masks, soft, rtol=0, atol=MASK_TOLERANCE[kind])
        # They are of these boxes: pasted, they give the model's own masks.
        pasted = ROIMasks(masks).to_bitmasks(Boxes(boxes), *image.shape[-2:]).tensor
        assert (pasted == expected.pred_masks).float().mean() > 0.999 or len(boxes) == 0
    if expected.has("pred_keypoints"):
        keypoints = additional.pop(0)
        for part, tolerance in ((slice(2), 0.01), (slice(2, 3), 1e-4)):
            torch.testing.assert_close(
                keypoints[..., part], expected.pred_keypoints[..., part], rtol=0, atol=tolerance
            )
    assert not additional
    return len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refine_type", ["none", "conv", "non_local", "non_local_pooled"])
def test_equal_at_sizes_never_seen(refine_type, kind, tmp_path):
    model = small_model("MODEL.BALANCED_FPN.REFINE_TYPE", refine_type)
    run = exported(model, kind, tmp_path)
    for size in SIZES:
        image = smooth_image(*size)
        assert assert_equal(model, run, image, kind) > 50  # 100 would be all that are kept
        # Tracing was done with floats; integers are taken as well, and give the same.
        assert_equal(model, run, image.float(), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "opts",
    [
        # At most 1,000 proposals, which non-maximum suppression treats differently.
        ["MODEL.RPN.PRE_NMS_TOPK_TEST", "100"],
        ["MODEL.BALANCED_FPN.REFINE_LEVEL", "4"],
        ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"],
        ["MODEL.BALANCED_FPN.ENABLED", "False"],
        ["MODEL.ANCHOR_GENERATOR.NAME", "TorchvisionAnchorGenerator"],
        [*ON_TIMM, "MODEL.TIMM.PRETRAINED", "False"],
        [
            *(*ON_TORCHVISION, "MODEL.TORCHVISION.PRETRAINED", "False"),
            *("MODEL.TORCHVISION.NAME", "mobilenet_v3_small"),
        ],
    ],
    ids=[
        "few proposals",
        "refined at P6",
        "class-agnostic",
        "plain FPN",
        "torchvision's anchors",
        "timm",
        "torchvision",
    ],
)
def test_equal_for_other_configs(opts, kind, tmp_path):
    model = small_model(*opts)
    run = exported(model, kind, tmp_path)
    for size in SIZES[:3]:
        assert assert_equal(model, run, smooth_image(*size), kind) > 0


MASKS = [
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "14", "TEST.DETECTIONS_PER_IMAGE", "15"),
]
KEYPOINTS = [
    *("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4", "TEST.DETECTIONS_PER_IMAGE", "15"),
]
CASCADE = [
    *("MODEL.ROI_HEADS.NAME", "BalancedCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
]
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "BalancedRetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_balanced_retinanet_resnet_fpn_backbone"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("MODEL.RETINANET.PRIOR_PROB", "0.2"),
    *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", "20"),  # fewer than there are, and more than none
    *("MODEL.BALANCED_FPN.REFINE_LEVEL", "1"),
]
PLAIN_RETINANET = [
    *(*RETINANET, "MODEL.META_ARCHITECTURE", "RetinaNet"),
    *("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1"),
]
ARCHITECTURES = {
    "masks": MASKS,
    "class-agnostic masks": [*MASKS, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"],
    "keypoints": KEYPOINTS,
    "cascade": CASCADE,
    "cascade with masks": [*CASCADE, *MASKS],
    "Detectron2's RetinaNet": PLAIN_RETINANET,
    "RetinaNet": RETINANET,
    "RetinaNet, clipped": [*RETINANET, "MODEL.RETINANET.CLIP_BEFORE_NMS", "True"],
    "masks and keypoints": [*MASKS, *KEYPOINTS],
}


def silence(module, model=None):
    """Let a model detect nothing, or again what the given one does."""
    parameters = dict(model.named_parameters()) if model else {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            name = name.removeprefix("model.")
            if name.endswith("cls_score.bias") and model:
                parameter.copy_(parameters[name])
            elif name.endswith("cls_score.bias"):
                parameter.fill_(-1000)
                if "roi_heads" in name:
                    parameter[-1] = 0  # of the background
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_traced_architectures(name, tmp_path):
    model = small_model(*ARCHITECTURES[name])
    run = exported(model, "tracing", tmp_path)
    for size in SIZES[1:3]:
        assert assert_equal(model, run, smooth_image(*size), "tracing") > 5
    assert assert_equal(silence(model), silence(run), smooth_image(150, 149), "tracing") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masks and keypoints", "RetinaNet"])
def test_traced_where_nothing_is_detected(name, tmp_path):
    model = small_model(*ARCHITECTURES[name])
    run = exported(silence(copy.deepcopy(model)), "tracing", tmp_path)
    silence(run, model)
    for size in SIZES[:2]:
        assert assert_equal(model, run, smooth_image(*size), "tracing") > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cascade with masks", "RetinaNet"])
def test_onnx_of_architectures(name, tmp_path):
    model = small_model(*ARCHITECTURES[name])
    run = exported(model, "onnx", tmp_path)
    for size in SIZES[:2]:
        assert assert_equal(model, run, smooth_image(*size), "onnx") > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tracing", "onnx"])
def test_equal_for_cascade(kind, tmp_path):
    model = small_model(
        *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
        config="configs/BCCD/faster_rcnn_R_18_FPN.yaml",
    )
    run = exported(model, kind, tmp_path)
    for size in SIZES[:2]:
        assert assert_equal(model, run, smooth_image(*size), kind) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equal_without_detections(kind, tmp_path):
    model = small_model("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    run = exported(model, kind, tmp_path)
    for size in SIZES[:3]:
        assert assert_equal(model, run, smooth_image(*size), kind) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_export_leaves_the_model_as_it_is(kind, tmp_path):
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for repetition in ("first", "second"):
        (tmp_path / repetition).mkdir()
        run = exported(model, kind, tmp_path / repetition)
        assert assert_equal(model, run, smooth_image(97, 211), kind) > 0
    assert not model.training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())

    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 8, 60, 50]]))
    instances.gt_classes = torch.tensor([1])
    with EventStorage():
        losses = model.train()([{"image": smooth_image(96, 128), "instances": instances}])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["plain", "masks and keypoints", "RetinaNet"])
def test_no_device_in_the_file(name, tmp_path):
    exported(small_model(*ARCHITECTURES.get(name, [])), "tracing", tmp_path)
    with zipfile.ZipFile(tmp_path / "tracing") as archive:
        code = {
            name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")
        }
    assert len(code) > 20
    for name, text in code.items():
        assert "torch.device(" not in text and "cuda" not in text, name
    # The scan sees what it looks for: a trace as PyTorch makes it has such constants.
    naive = torch.jit.trace(lambda x: x + torch.zeros(3, device="cpu"), torch.zeros(3))
    assert "torch.device(" in naive.code


@pytest.mark.slow
def test_metadata_is_in_the_file(tmp_path):
    exported(small_model(), "tracing", tmp_path)
    files = {"balanced_d2.json": ""}
    torch.jit.load(str(tmp_path / "tracing"), _extra_files=files)
    assert json.loads(files["balanced_d2.json"]) == METADATA
    exported(small_model(), "onnx", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "onnx", providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["balanced_d2.json"]) == METADATA
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape[0]) == ("image", "tensor(float)", 3)
    assert all(isinstance(dimension, str) for dimension in image.shape[1:])
    assert {output.name: output.shape[1:] for output in session.get_outputs()} == {
        "boxes": [4],
        "classes": [],
        "scores": [],
        "image_size": [],
    }


def test_class_names_and_preprocessing():
    cfg = load_config("configs/Demo/balanced_faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    described = export.describe(cfg)
    assert len(described["class_names"]) == 5 and "disk" in described["class_names"]
    assert (described["input_format"], described["min_size"], described["max_size"]) == (
        "BGR",
        128,
        1333,
    )
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(UserError, match="has 5 classes .*, but MODEL.ROI_HEADS.NUM_CLASSES is 4"):
        export.describe(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("nowhere",)
    assert export.describe(cfg)["class_names"] == ["0", "1", "2", "3"]
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(UserError, match="INPUT.FORMAT"):
        export.describe(cfg)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_described_outputs_are_the_models(name):
    opts = ARCHITECTURES[name]
    model = small_model(*opts)
    cfg = load_config(TINY_CONFIG, opts)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ()
    assert export.describe(cfg)["outputs"] == export.Deployable(model).outputs


def test_description_of_retinanet():
    opts = [*RETINANET, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.3", "MODEL.MASK_ON", "True"]
    cfg = load_config("configs/Demo/balanced_faster_rcnn_R_18_FPN.yaml", opts)
    with pytest.raises(UserError, match="has 5 classes .*, but MODEL.RETINANET.NUM_CLASSES is 3"):
        export.describe(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    described = export.describe(cfg)
    assert len(described["class_names"]) == 5 and described["score_threshold"] == 0.3
    assert described["outputs"] == ["boxes", "classes", "scores", "image_size"]


def traced_nms():
    nms = scripted_batched_nms()
    example = (torch.rand(5, 4), torch.rand(5), torch.arange(5))
    return torch.jit.trace(lambda *values: nms(*values, 0.5), example)


def onnx_nms():
    class NMS(torch.nn.Module):
        def forward(self, boxes, scores, groups):
            return onnx_batched_nms(boxes, scores, groups, 0.5)

    names, file = ["boxes", "scores", "groups"], io.BytesIO()
    torch.onnx.export(
        NMS(),
        (torch.rand(5, 4), torch.rand(5), torch.arange(5)),
        file,
        dynamo=False,
        opset_version=17,
        input_names=names,
        dynamic_axes={name: {0: "n"} for name in names},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*values):
        inputs = {name: value.numpy() for name, value in zip(names, values)}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


@pytest.mark.parametrize("build", [traced_nms, onnx_nms])
def test_nms_equals_torchvisions(build):
    """In both of torchvision's forms, of which one rounds the boxes, and with equal scores."""
    nms = build()
    for num_boxes in (0, 1, 40, 1000, 1001, 4000):
        for seed in range(5):
            torch.manual_seed(seed)
            # Sides of 30 on a grid of 10: an IoU of 0.5 is frequent, and rounding decides.
            corners = 10 * torch.randint(30, (num_boxes, 2)) + torch.rand(1)
            boxes = torch.cat([corners, corners + 30], dim=1)
            scores = (50 * torch.rand(num_boxes)).round() / 50
            groups = torch.randint(7, (num_boxes,))
            expected = batched_nms(boxes, scores, groups, 0.5)
            kept = nms(boxes, scores, groups)
            # torchvision promises no order among equal scores.
            assert sorted(kept.tolist()) == sorted(expected.tolist())
            assert torch.equal(scores[kept], scores[expected])


@pytest.mark.parametrize(
    "opts, kinds, message",
    [
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], KINDS, "meta-architecture PanopticFPN cannot"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], KINDS, "given its proposals"),
        (KEYPOINTS, ["onnx"], "predicts keypoints cannot be exported to ONNX: .* to TorchScript"),
    ],
)
def test_models_that_cannot_be_exported(opts, kinds, message, tmp_path):
    model = small_model(*opts)
    for kind in kinds:
        with pytest.raises(UserError, match=message):
            exported(model, kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_mode_is_refused(tmp_path):
    model = small_model()
    image = smooth_image(64, 64)
    model.backbone.train()  # one part is enough
    for write in (export.export_torchscript, export.export_onnx):
        with pytest.raises(UserError, match="is in training mode; call model.eval()"):
            write(model, image, str(tmp_path / "model"), {})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_export_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "model.ts"
    path.write_text("the last one")
    with pytest.raises(TypeError):
        export.export_torchscript(small_model(), smooth_image(64, 64), str(path), {"no": {"json"}})
    assert path.read_text() == "the last one" and list(tmp_path.iterdir()) == [path]


def test_sample_images(tmp_path, caplog, monkeypatch):
    cfg = load_config("configs/Demo/balanced_faster_rcnn_R_18_FPN.yaml")
    cfg.DATASETS.TEST = ()
    images = export.sample_images(cfg)
    assert not caplog.records
    # That it is noise is said where there should have been an image.
    monkeypatch.setattr(DatasetCatalog, "data", copy.copy(DatasetCatalog.data))  # undone afterwards
    (tmp_path / "elsewhere").mkdir()
    register_coco("gone", str(write_coco(tmp_path / "data")), str(tmp_path / "elsewhere"))
    register_coco("none", str(tmp_path / "none.json"), str(tmp_path))
    DatasetCatalog.register("empty", list)
    DatasetCatalog.register("odd", lambda: [{"image_id": 1}])
    cfg.DATASETS.TEST = ("unknown", "gone", "none", "empty", "odd")
    for image, same in zip(images, export.sample_images(cfg), strict=True):
        assert torch.equal(image, same)
    (record,) = (r for r in caplog.records if r.name == "balanced_d2.export.sample")
    said = record.getMessage()
    assert said.startswith("note: noise is taken for an image to trace and verify with")
    for part in (
        "unknown is not registered",
        f"{tmp_path}/elsewhere/1.jpg: No such",
        "none.json",
        "empty has no images",
        "records of odd have no 'file_name'",
    ):
        assert part in said
    assert "\n" not in said
    sizes = [tuple(image.shape[1:]) for image in images]
    assert len(set(sizes)) == 4 and all(image.shape[0] == 3 for image in images)
    assert sizes[1] == (128, 171)
    assert all(side % 2 for side in sizes[2]) and all(side % 32 == 0 for side in sizes[3])
    (tmp_path / "image.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match="cannot read the sample image .*image.jpg"):
        export.sample_images(cfg, str(tmp_path / "image.jpg"))


def detections(scores, classes, shift=0.0, image_size=(20, 30), **additional):
    boxes = np.array([[10.0 * i + shift, 0, 10 * i + 8, 9] for i in range(len(scores))])
    return Detections(
        boxes.reshape(-1, 4).astype(np.float32),
        np.array(classes),
        np.array(scores, dtype=np.float32),
        image_size,
        0.1,
        additional,
    )


def swapped(found, i, j):
    order = np.arange(len(found.boxes))
    order[[i, j]] = order[[j, i]]
    return Detections(
        found.boxes[order],
        found.classes[order],
        found.scores[order],
        found.image_size,
        0.1,
        {name: value[order] for name, value in found.additional.items()},
    )


@pytest.mark.parametrize(
    "change, agrees",
    {
        "nothing": (lambda d: d, True),
        "boxes a little": (lambda d: detections(d.scores, d.classes, shift=1e-4), True),
        "boxes too much": (lambda d: detections(d.scores, d.classes, shift=2e-3), False),
        "scores a little": (lambda d: detections(d.scores + 5e-6, d.classes), True),
        "scores too much": (lambda d: detections(d.scores + 5e-5, d.classes), False),
        "a class": (lambda d: detections(d.scores, [0, 1, 1, 0]), False),
        "one detection less": (lambda d: detections(d.scores[:3], d.classes[:3]), False),
        "the image size": (lambda d: detections(d.scores, d.classes, image_size=(20, 31)), False),
        "the order of different scores": (lambda d: swapped(d, 0, 1), False),
        "the order of equal scores": (lambda d: swapped(d, 2, 3), True),
    }.values(),
)
def test_comparison(change, agrees):
    eager = detections([0.9, 0.8, 0.500001, 0.5], [0, 1, 1, 1])
    comparison = Comparison(eager, change(eager), tolerance=(1e-3, 1e-5))
    assert comparison.agrees == agrees


def test_comparison_of_nothing():
    assert Comparison(detections([], []), detections([], []), (1e-3, 1e-5)).agrees


def test_comparison_of_masks_and_keypoints():
    rng = np.random.default_rng(0)
    values = {"masks": rng.random((4, 6, 6)), "keypoints": 20 * rng.random((4, 5, 3))}
    tolerances = export.ADDITIONAL_TOLERANCES["torchscript"]

    def comparison(**changes):
        scores, classes = [0.9, 0.8, 0.500001, 0.5], [0, 1, 1, 1]
        eager = detections(scores, classes, **values)
        exported = detections(scores, classes, **{**values, **changes})
        return Comparison(eager, swapped(exported, 2, 3), (1e-3, 1e-5), tolerances)

    assert comparison().agrees  # in the order of the boxes
    assert comparison(masks=values["masks"] + 9e-5).agrees
    assert not comparison(masks=values["masks"] + 2e-4).agrees
    assert comparison(keypoints=values["keypoints"] + [0.009, 0.009, 9e-5]).agrees
    for shift in ([0.011, 0, 0], [0, 0.011, 0], [0, 0, 2e-4]):
        changed = comparison(keypoints=values["keypoints"] + shift)
        assert not changed.agrees
        assert changed.additional_difference["keypoints"] == pytest.approx(shift)
    assert not comparison(keypoints=values["keypoints"][:, :4]).agrees
    changed = comparison()
    del changed.exported.additional["masks"]
    assert not changed.agrees
    header = export.table([comparison()])
    assert "of masks" in header and "of keypoints" in header
    nothing = detections([], [], masks=np.zeros((0, 6, 6)))
    assert Comparison(nothing, nothing, (1e-3, 1e-5), tolerances).agrees
    assert "of masks" not in export.table([Comparison(*2 * [detections([], [])], (1e-3, 1e-5))])
