"""Every kind of detector: trained and evaluated from its config, and its parts on their own."""

import copy
import math

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from balanced_d2 import load_config
from balanced_d2.config.lazy import load_lazy_config
from balanced_d2.modeling import (
    P6P7,
    BalancedCascadeROIHeads,
    BalancedFastRCNNOutputLayers,
    BalancedFPN,
)
from balanced_d2.utils.errors import UserError

from .conftest import TINY_MODEL, logged

R_18 = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),  # the weights are random
]
KEYPOINTS = [
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)"),
    *("MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "1"),
    *("TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]"),
]
MASKS = ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
BINS = {f"roi_head/num_neg_bin{k}" for k in range(3)}
CASCADE = {f"{loss}_stage{k}" for loss in ("loss_cls", "loss_box_reg") for k in range(3)}

# config, its options, what is logged, what is evaluated
ARCHITECTURES = {
    "Faster R-CNN": ("COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.yaml", [], BINS, {"bbox"}),
    "Mask R-CNN": (
        "COCO-InstanceSegmentation/balanced_mask_rcnn_R_50_FPN_1x.yaml",
        MASKS,
        BINS | {"loss_mask"},
        {"bbox", "segm"},
    ),
    "Keypoint R-CNN": (
        "COCO-Keypoints/balanced_keypoint_rcnn_R_50_FPN_1x.yaml",
        KEYPOINTS,
        BINS | {"loss_keypoint"},
        {"bbox", "keypoints"},
    ),
    "Cascade R-CNN": ("Misc/balanced_cascade_rcnn_R_50_FPN_1x.yaml", [], BINS | CASCADE, {"bbox"}),
    "Cascade Mask R-CNN": (
        "Misc/balanced_cascade_mask_rcnn_R_50_FPN_1x.yaml",
        MASKS,
        BINS | CASCADE | {"loss_mask"},
        {"bbox", "segm"},
    ),
    "RetinaNet": (
        "COCO-Detection/balanced_retinanet_R_50_FPN_1x.yaml",
        ["MODEL.RETINANET.NUM_CLASSES", "2"],
        {"loss_cls", "loss_box_reg"},
        {"bbox"},
    ),
}


def metrics_of(result, output):
    assert result.returncode == 0, result.stdout + result.stderr
    return {key: value for line in logged(output) for key, value in line.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_and_evaluates(name, tiny_coco, tmp_path, train_net_here):
    config, opts, logged, evaluated = ARCHITECTURES[name]
    output = tmp_path / "output"
    result = train_net_here(
        *("--register", "tiny", tiny_coco, tiny_coco.parent / "images"),
        *(*TINY_MODEL, *R_18, *opts),
        *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"),
        # After two iterations the scores are almost 0, or 0.
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "-1.0", "SOLVER.BASE_LR", "0.001"),
        *("MODEL.WEIGHTS", "", "OUTPUT_DIR", output, "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.STEPS", "()", "SEED", "1"),
        config=f"configs/{config}",
    )
    metrics = metrics_of(result, output)
    assert metrics["iteration"] == 2 and math.isfinite(metrics["total_loss"])
    names = {key.split("/", 1)[1] if key.startswith("stage") else key for key in metrics}
    assert logged <= names, logged - names
    assert {f"{task}/AP" for task in evaluated} <= set(metrics)
    saved = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() for value in saved.values())
    assert any("balancer.refine.theta" in key for key in saved)


def balanced_l1_loops(x, alpha, gamma, beta):
    b = math.exp(gamma / alpha) - 1
    if x < beta:
        return alpha / b * (b * x + beta) * math.log(b * x / beta + 1) - alpha * x
    return gamma * x + gamma * beta / b - alpha * beta


def retinanet(*opts):
    return build_model(
        load_config(
            "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.yaml",
            [*R_18, "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "16", *opts],
        )
    )


def test_retinanet_box_loss_equals_plain_loops():
    parameters = (0.4, 1.2, 0.3)
    keys = [f"MODEL.RETINANET.BALANCED_L1_{name}" for name in ("ALPHA", "GAMMA", "BETA")]
    model = retinanet(*(str(part) for pair in zip(keys, parameters) for part in pair))
    # Two images, two levels of 3 and 2 anchors.
    start = torch.rand(5, 2) * 50
    anchors = torch.cat([start, start + 10 + torch.rand(5, 2) * 40], dim=1)
    gt_boxes = [anchors + torch.randn(5, 4), anchors + torch.randn(5, 4)]
    gt_labels = [torch.tensor([80, 3, -1, 0, 80]), torch.tensor([80, 80, 79, -1, 7])]
    deltas, logits = torch.randn(2, 5, 4), torch.randn(2, 5, 80)
    with EventStorage():
        losses = model.losses(
            [Boxes(anchors[:3]), Boxes(anchors[3:])],
            [logits[:, :3], logits[:, 3:]],
            gt_labels,
            [deltas[:, :3], deltas[:, 3:]],
            gt_boxes,
        )
    total, num_foreground = 0.0, 0
    for image in (0, 1):
        for row, label in enumerate(gt_labels[image].tolist()):
            if label in (-1, 80):
                continue
            num_foreground += 1
            (ax0, ay0, ax1, ay1) = anchors[row].tolist()
            (gx0, gy0, gx1, gy1) = gt_boxes[image][row].tolist()
            target = [
                ((gx0 + gx1) / 2 - (ax0 + ax1) / 2) / (ax1 - ax0),
                ((gy0 + gy1) / 2 - (ay0 + ay1) / 2) / (ay1 - ay0),
                math.log((gx1 - gx0) / (ax1 - ax0)),
                math.log((gy1 - gy0) / (ay1 - ay0)),
            ]
            for predicted, wanted in zip(deltas[image, row].tolist(), target):
                total += balanced_l1_loops(abs(predicted - wanted), *parameters)
    # Detectron2's running mean of the number of foreground anchors starts at 100.
    normalizer = 0.9 * 100 + 0.1 * num_foreground
    assert losses["loss_box_reg"].item() == pytest.approx(total / normalizer, rel=1e-4)


def test_retinanet_without_foreground():
    model = retinanet()
    anchors, deltas = torch.rand(5, 4).cumsum(dim=1), torch.randn(1, 5, 4, requires_grad=True)
    with EventStorage():
        losses = model.losses(
            [Boxes(anchors)],
            [torch.randn(1, 5, 80)],
            [torch.full((5,), 80)],
            [deltas],
            [torch.zeros(5, 4)],
        )
    losses["loss_box_reg"].backward()
    assert losses["loss_box_reg"] == 0 and not deltas.grad.any()


def test_retinanet_clips_before_nms():
    """Of boxes that overlap little, but are equal within the image, one is kept."""
    anchors = [Boxes(torch.tensor([[-60.0, 0, 20, 20], [0.0, 0, 20, 20], [-30.0, 5, -10, 9]]))]
    scores = [torch.zeros(3, 80)]
    scores[0][:, 4] = torch.tensor([0.9, 0.8, 0.7])
    for clip, boxes in (("False", 3), ("True", 1)):
        model = retinanet("MODEL.RETINANET.CLIP_BEFORE_NMS", clip)
        result = model.inference_single_image(anchors, scores, [torch.zeros(3, 4)], (50, 50))
        assert len(result) == boxes
    assert result.pred_boxes.tensor.tolist() == [[0, 0, 20, 20]]


@pytest.mark.parametrize("relu", [True, False])
def test_p7_with_and_without_relu(relu):
    block = P6P7(4, 4, relu=relu)
    x = torch.randn(1, 4, 9, 11)
    p6, p7 = block(x)
    assert torch.equal(p6, block.p6(x)) and (p6 < 0).any()
    assert torch.equal(p7, block.p7(p6.clamp(min=0) if relu else p6))


def test_p7_relu_by_config():
    assert not retinanet("MODEL.BALANCED_FPN.P7_RELU", "False").backbone.top_block.relu
    assert retinanet().backbone.top_block.relu


def test_cascade_samples_once_and_has_the_loss_in_all_stages():
    config = load_config(
        "configs/Misc/balanced_cascade_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_BOX_HEAD.BALANCED_L1_GAMMA", "1.0"],
    )
    shapes = {f"p{k}": ShapeSpec(channels=256, stride=2**k) for k in range(2, 6)}
    heads = BalancedCascadeROIHeads(config, shapes)
    weights = []
    for predictor in heads.box_predictor:
        assert type(predictor) is BalancedFastRCNNOutputLayers
        loss = predictor.regression_loss
        assert (loss.alpha, loss.gamma, loss.beta) == (0.5, 1.0, 1.0)
        weights.append(predictor.box2box_transform.weights)
    assert weights == list(config.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS)
    assert heads.iou_range == (0.0, 0.5)


# Backbones


@pytest.fixture
def registered_bottom_up():
    """A backbone that is not a ResNet, registered under a name for configs."""

    def build_tiny_regnet_backbone(cfg, input_shape):
        return RegNet(
            stem_class=SimpleStem,
            stem_width=8,
            block_class=ResBottleneckBlock,
            depth=4,  # one block in each stage
            w_a=16,
            w_0=8,
            w_m=1.5,
            group_width=8,
            norm="BN",
            out_features=["s1", "s2", "s3", "s4"],
        )

    BACKBONE_REGISTRY.register(build_tiny_regnet_backbone)
    yield build_tiny_regnet_backbone.__name__
    del BACKBONE_REGISTRY._obj_map[build_tiny_regnet_backbone.__name__]


@pytest.mark.parametrize(
    "builder, levels, in_features",
    [
        ("build_balanced_fpn_backbone", range(2, 7), ["s1", "s2", "s3", "s4"]),
        ("build_balanced_retinanet_fpn_backbone", range(3, 8), ["s2", "s3", "s4"]),
    ],
)
def test_another_backbone(registered_bottom_up, builder, levels, in_features):
    cfg = load_config(
        "configs/Base-RCNN-FPN.yaml",
        [
            *("MODEL.BACKBONE.NAME", builder, "MODEL.BALANCED_FPN.ENABLED", "True"),
            *("MODEL.BALANCED_FPN.BOTTOM_UP", registered_bottom_up),
            *("MODEL.FPN.IN_FEATURES", str(in_features), "MODEL.FPN.OUT_CHANNELS", "8"),
        ],
    )
    backbone = BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=3))
    assert isinstance(backbone, BalancedFPN) and isinstance(backbone.bottom_up, RegNet)
    features = backbone(torch.randn(1, 3, 64, 96))
    assert list(features) == [f"p{level}" for level in levels]
    sum(x.sum() for x in features.values()).backward()


@pytest.mark.parametrize("pyramid", ["", "retinanet_"])
def test_features_that_another_backbone_does_not_have(registered_bottom_up, pyramid):
    builder = f"build_balanced_{pyramid}fpn_backbone"
    options = ["MODEL.BACKBONE.NAME", builder, "MODEL.FPN.IN_FEATURES", "['s1', 'res3', 'res4']"]
    options += ["MODEL.BALANCED_FPN.BOTTOM_UP", registered_bottom_up]
    cfg = load_config("configs/Base-RCNN-FPN.yaml", options)
    message = "IN_FEATURES: .* RegNet, has no res3, res4; it has s1, s2, s3, s4"
    with pytest.raises(UserError, match=message):
        BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=3))


def test_unknown_bottom_up():
    key, name = "MODEL.BALANCED_FPN.BOTTOM_UP", "build_regnet"
    message = f"{key}: there is no .*{name}"
    with pytest.raises(UserError, match=message):
        load_config("configs/Base-RCNN-FPN.yaml", [key, name])
    cfg = load_config("configs/Base-RCNN-FPN.yaml")
    cfg.MODEL.BALANCED_FPN.BOTTOM_UP = name
    with pytest.raises(UserError, match=message):
        BACKBONE_REGISTRY.get("build_balanced_fpn_backbone")(cfg, ShapeSpec(channels=3))


# LazyConfigs


LAZY = "configs/COCO-Detection/balanced_{}_R_50_FPN_1x"


def labelled_image():
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 8, 60, 50], [40.0, 30, 72, 66]]))
    instances.gt_classes = torch.tensor([0, 2])
    return {"image": torch.randint(256, (3, 96, 128)).float(), "instances": instances}


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_lazy_twin_is_the_same_model(name):
    lazy = load_lazy_config(LAZY.format(name) + ".py")
    cfg = load_config(LAZY.format(name) + ".yaml", ["MODEL.DEVICE", "cpu"])
    models = [instantiate(lazy.model), build_model(cfg)]
    models[0].load_state_dict(models[1].state_dict())
    image = labelled_image()
    results = []
    for model in models:
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        torch.manual_seed(3)
        with EventStorage():
            losses = model.train()([copy.deepcopy(image)])
        sum(losses.values()).backward()
        detections = model.eval()([image])[0]["instances"]
        results.append(
            (
                frozen,
                {key: value.item() for key, value in losses.items()},
                detections.pred_boxes.tensor.tolist(),
                detections.scores.tolist(),
            )
        )
    assert results[0] == results[1]

    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    assert lazy.optimizer.momentum == cfg.SOLVER.MOMENTUM
    assert lazy.optimizer.weight_decay == cfg.SOLVER.WEIGHT_DECAY
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    schedule = instantiate(lazy.lr_multiplier)
    for iteration, factor in (
        *((0, cfg.SOLVER.WARMUP_FACTOR), (500, 0.5005), (1000, 1), (59_999, 1), (60_000, 0.1)),
        *((79_999, 0.1), (80_000, 0.01), (89_999, 0.01)),
    ):
        assert schedule(iteration / cfg.SOLVER.MAX_ITER) == pytest.approx(factor)


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_lazy_config_trains_and_evaluates(name, tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    num_classes = "model.roi_heads.num_classes" if name == "faster_rcnn" else "model.num_classes"
    result = train_net_here(
        *("--register", "tiny", tiny_coco, tiny_coco.parent / "images"),
        *(f"{num_classes}=2", "train.init_checkpoint=''", f"train.output_dir={output}"),
        *("train.max_iter=2", "dataloader.train.total_batch_size=1"),
        *(f"dataloader.{part}.dataset.names=tiny" for part in ("train", "test")),
        *(f"dataloader.{part}.num_workers=0" for part in ("train", "test")),
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        config=LAZY.format(name) + ".py",
    )
    metrics = metrics_of(result, output)
    assert metrics["iteration"] == 2 and math.isfinite(metrics["total_loss"])
    assert "bbox/AP" in metrics
    assert "BalancedFPN" in (output / "config.yaml").read_text()


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.DEVICE", "cpu"], "come as key=value"),
        (["model.num_classes.a=1"], "command line: model.num_classes.a=1: "),
    ],
)
def test_wrong_options_of_a_lazy_config(opts, message):
    with pytest.raises(UserError, match=message):
        load_lazy_config(LAZY.format("retinanet") + ".py", opts)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no file|cannot read"),
        ("model = {", "SyntaxError"),
        ("\nmodel = undefined", r"NameError: name 'undefined'.* \(.*config.py, line 2\)"),
        ("model = {}", "defines no dataloader and no optimizer"),
    ],
)
def test_wrong_lazy_config(content, message, tmp_path):
    file = tmp_path / "config.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_lazy_config(str(file))
