"""Class balance in whole models and trainings: keys, counts, resume, export, figures by group."""

import json

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from balanced_d2 import load_config
from balanced_d2.checkpoint import start_from
from balanced_d2.checkpoint.finetune import num_classes
from balanced_d2.config.checks import check_config
from balanced_d2.data import register_coco
from balanced_d2.data.class_balance import (
    complete_class_balance,
    count_classes,
    order_weights,
    repeat_threshold,
)
from balanced_d2.data.datasets.shapes import SPLITS, TAIL, TAIL_CLASSES, class_shares, ensure_shapes
from balanced_d2.data.loader import TrainLoader
from balanced_d2.data.train_samplers import UniformClassTrainingSampler, images_of_classes
from balanced_d2.evaluation.evaluators import build_evaluator
from balanced_d2.modeling import (
    CLS_LOSSES,
    BalancedFastRCNNOutputLayers,
    SeesawLoss,
    WeightedCrossEntropy,
    check_balanced,
)
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization.training_plot import draw_training

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, assert_user_error, logged, write_coco
from .test_export import KINDS, assert_equal, exported, small_model, smooth_image

KEY = "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE"
COUNTS = ["MODEL.CLASS_COUNTS", "[40, 9, 3]"]
CASCADE = "configs/Misc/balanced_cascade_rcnn_R_50_FPN_1x.yaml"
MASK = "configs/COCO-InstanceSegmentation/balanced_mask_rcnn_R_50_FPN_1x.yaml"
SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
]


def predictor(cls=BalancedFastRCNNOutputLayers, num_classes=3, **arguments):
    return cls(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=num_classes,
        **arguments,
    )


def proposals(classes):
    image = Instances(
        (100, 100), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9]] * len(classes)))
    )
    image.gt_boxes = Boxes(torch.tensor([[1.0, 0, 9, 8]] * len(classes)))
    image.gt_classes = torch.tensor(classes, dtype=torch.long)
    return image


def losses_of(layers, predictions, images):
    with EventStorage() as storage:
        losses = layers.losses(predictions, images)
        return losses, {name: value for name, (value, _) in storage.latest().items()}


# The predictor


def test_off_is_detectron2s_predictor_to_the_bit():
    torch.manual_seed(1)
    theirs = predictor(FastRCNNOutputLayers)
    ours = predictor(class_counts=[40, 9, 3])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = [proposals([0, 3, 3, 2]), proposals([3, 1])]
    predictions = [layers(torch.linspace(-3, 3, 48).view(6, 8)) for layers in (theirs, ours)]
    (expected, their_log), (got, our_log) = (
        losses_of(layers, prediction, images)
        for layers, prediction in zip((theirs, ours), predictions)
    )
    assert got == expected and their_log.items() <= our_log.items()
    for a, b in zip(*(x.predict_probs(p, images) for x, p in zip((theirs, ours), predictions))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CLS_LOSSES.names())
def test_the_loss_is_the_mean_over_proposals(name):
    cfg = load_config("", [KEY, name, *COUNTS, "MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    torch.manual_seed(2)
    layers = BalancedFastRCNNOutputLayers(cfg, ShapeSpec(channels=8))
    scores, deltas = layers(torch.randn(5, 8))
    images = [proposals([0, 3]), proposals([2, 3, 1])]
    losses, log = losses_of(layers, (10 * scores, deltas), images)
    loss, classes = layers.classification_loss, torch.tensor([0, 3, 2, 3, 1])
    torch.testing.assert_close(losses["loss_cls"], loss.loss(10 * scores, classes).mean())
    plain = predictor(FastRCNNOutputLayers)
    expected = losses_of(plain, (scores[:, :4], deltas), images)[0]["loss_box_reg"]
    torch.testing.assert_close(losses["loss_box_reg"], expected)
    # Detectron2's statistics, and scores for its inference, which are those of K + 1 classes.
    right = loss.probabilities(10 * scores).argmax(dim=1) == classes
    assert log["fast_rcnn/cls_accuracy"] == pytest.approx(right.float().mean().item())
    assert [p.shape for p in layers.predict_probs((scores, deltas), images)] == [(2, 4), (3, 4)]


@pytest.mark.parametrize("name", CLS_LOSSES.names())
@pytest.mark.parametrize("classes", [[], [3, 3, 3]])
def test_no_foreground(name, classes):
    cfg = load_config("", [KEY, name, *COUNTS, "MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    layers = BalancedFastRCNNOutputLayers(cfg, ShapeSpec(channels=8))
    losses, log = losses_of(layers, layers(torch.randn(len(classes), 8)), [proposals(classes)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in layers.parameters() if p.grad is not None)
    assert not any("score_" in key for key in log) and log["fast_rcnn/num_rare"] == 0


def test_figures_of_class_groups():
    """By hand: class 0 is frequent, 1 common, 2 rare."""
    layers = predictor(class_counts=[40, 9, 3])
    images = [proposals([0, 0, 2, 3]), proposals([1, 3, 0])]
    scores = torch.randn(7, 4)
    _, log = losses_of(layers, (scores, torch.zeros(7, 12)), images)
    p = scores.softmax(dim=1)
    expected = {
        "fast_rcnn/num_rare": 1 / 2,
        "fast_rcnn/num_common": 1 / 2,
        "fast_rcnn/num_frequent": 3 / 2,
        "fast_rcnn/score_rare": p[2, 2].item(),
        "fast_rcnn/score_common": p[4, 1].item(),
        "fast_rcnn/score_frequent": ((p[0, 0] + p[1, 0] + p[6, 0]) / 3).item(),
    }
    assert {k: v for k, v in log.items() if k in expected} == pytest.approx(expected)
    _, log = losses_of(predictor(class_counts=[40, 9, 0]), (scores, torch.zeros(7, 12)), images)
    assert not any("rare" in key for key in log)  # two classes are no three groups


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"cls_loss": "seesaw"}, "'seesaw' is no classification loss"),
        ({"cls_loss": SeesawLoss}, "is no classification loss.*such as FocalLoss"),
        ({"cls_loss": SeesawLoss(5)}, "loss is for 5 classes, and the predictor for 3"),
        ({"class_counts": [1, 2]}, "CLASS_COUNTS has 2 numbers"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        predictor(**arguments)


def test_any_object_with_its_parts_is_a_loss():
    """It need be no ClassLoss, which also says its number of classes."""

    class Squares:
        num_logits = 5

        def loss(self, logits, classes):
            return logits.square().sum(dim=1)

        def probabilities(self, logits):
            return logits[:, :4].softmax(dim=1)

    layers = predictor(cls_loss=Squares())
    scores, deltas = layers(torch.randn(4, 8))
    losses, _ = losses_of(layers, (scores, deltas), [proposals([0, 3, 1, 2])])
    torch.testing.assert_close(losses["loss_cls"], scores.square().sum() / 4)
    assert scores.shape == (4, 5)


class _Sigmoid(BalancedFastRCNNOutputLayers):
    # As an instance of Detectron2's main has it, which sets it when it is made.
    use_sigmoid_ce = property(lambda self: True, lambda self, value: None)


def test_sigmoid_scores_of_main():
    with pytest.raises(UserError, match="USE_SIGMOID_CE.*CLS_LOSS_TYPE to cross_entropy"):
        predictor(_Sigmoid, cls_loss=SeesawLoss(3))
    with pytest.raises(UserError, match="ohem does not work with.*USE_SIGMOID_CE"):
        predictor(_Sigmoid).proposal_losses(
            (torch.zeros(1, 4), torch.zeros(1, 12)), [proposals([1])]
        )
    for options, message in (
        ([KEY, "focal"], "CLS_LOSS_TYPE is 'focal', which does not work with.*USE_SIGMOID_CE"),
        (["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem"], "NEGATIVE_SAMPLER is 'ohem'.*USE_SIGMOID"),
    ):
        cfg = load_config(TINY_CONFIG, options)
        cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
        with pytest.raises(UserError, match=message):
            check_config(cfg, train=True)
    cfg = load_config(TINY_CONFIG)
    cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = True
    check_config(cfg, train=True)


# Whole models


@pytest.mark.parametrize("name", [*CLS_LOSSES.names(), "cross_entropy"])
@pytest.mark.parametrize("config", [CASCADE, MASK])
def test_architectures(name, config):
    cfg = load_config(config, [*SMALL, KEY, name, *COUNTS])
    model = build_model(cfg)
    check_balanced(cfg, model)
    stages = model.roi_heads.box_predictor
    stages = list(stages) if config == CASCADE else [stages]
    assert len(stages) == (3 if config == CASCADE else 1)
    losses = [stage.classification_loss for stage in stages]
    assert len(set(map(id, losses))) == len(stages) or losses == [None] * len(stages)
    image = {"image": smooth_image(64, 64), "instances": Instances((64, 64))}
    image["instances"].gt_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40]]))
    image["instances"].gt_classes = torch.tensor([2])
    if config == CASCADE:
        with EventStorage() as storage:
            found = model.train()([image])
            names = set(storage.latest())
        assert all(torch.isfinite(value) for value in found.values())
        assert {f"stage{k}/fast_rcnn/num_rare" for k in range(3)} <= names
        sum(found.values()).backward()
        assert all(stage.cls_score.weight.grad.any() for stage in stages)
    with torch.no_grad():
        (result,) = model.eval()([image])
    assert result["instances"].scores.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLS_LOSSES.names())
def test_export(name, kind, tmp_path):
    """No counts are needed, as for weights of others."""
    model = small_model(KEY, name)
    run = exported(model, kind, tmp_path)
    for size in ((97, 211), (64, 96)):
        assert assert_equal(model, run, smooth_image(*size), kind) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_export_of_a_cascade(kind, tmp_path):
    options = ["MODEL.ROI_HEADS.NAME", "BalancedCascadeROIHeads", KEY, "seesaw"]
    model = small_model(*options, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
    run = exported(model, kind, tmp_path)
    assert assert_equal(model, run, smooth_image(97, 211), kind) > 0


def test_lazy_config():
    loss = LazyCall(SeesawLoss)(num_classes=3, objectness=False)
    box_predictor = LazyCall(BalancedFastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=8),
        box2box_transform=LazyCall(Box2BoxTransform)(weights=[10, 10, 5, 5]),
        num_classes=3,
        cls_loss=loss,
        class_counts=[40, 9, 3],
    )
    built = instantiate(box_predictor)
    assert isinstance(built.classification_loss, SeesawLoss)
    assert built.class_groups.tolist() == [2, 1, 0, 3] and built.cls_score.out_features == 4


# What a training begins with


@pytest.mark.parametrize("theirs", ["cross_entropy", "seesaw"])
@pytest.mark.parametrize("ours", ["cross_entropy", "seesaw"])
@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "a", "new"]])
def test_weights_of_another_loss(theirs, ours, names, tmp_path):
    """Rows of classes go by name; those of background and objectness, if both have the same; the
    counts of another training not at all."""
    torch.manual_seed(3)
    before, after = (
        build_model(load_config(TINY_CONFIG, [*TINY_MODEL, *SMALL[-6:], KEY, loss]))
        for loss in (theirs, ours)
    )
    prefix = "roi_heads.box_predictor."
    state = {
        k: torch.randn_like(v) if v.is_floating_point() else v + 5
        for k, v in before.state_dict().items()
    }
    assert num_classes(state) == 3
    new = {k: v.clone() for k, v in after.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save({"model": state, "class_names": ["a", "b", "c"]}, path)
    start_from(after, str(path), names)
    got = after.state_dict()
    for kind in ("cls_score.weight", "cls_score.bias"):
        rows = [["a", "b", "c"].index(name) if name in "abc" else None for name in names]
        others = range(3, len(new[prefix + kind]))
        rows += others if theirs == ours else [None] * len(others)
        for row, source in enumerate(rows):
            expected = new[prefix + kind][row] if source is None else state[prefix + kind][source]
            assert torch.equal(got[prefix + kind][row], expected), (kind, row)
    if ours == "seesaw":
        assert not got[prefix + "classification_loss.counts"].any()


# Keys


@pytest.mark.parametrize(
    "options, message",
    [
        (
            [KEY, "seesaw", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
            "CLS_LOSS_TYPE is 'seesaw', which MODEL.ROI_HEADS.NAME StandardROIHeads does not",
        ),
        (
            ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[1, 2]"],
            r"\[1, 2\], which CLS_LOSS_TYPE cross_ent",
        ),
        ([KEY, "seesaw_loss"], "there is no 'seesaw_loss'; choose one of: cross_entropy, focal"),
    ],
)
def test_refused_configs(options, message):
    plain = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random"]
    plain += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]
    with pytest.raises(UserError, match=message):
        check_config(load_config(TINY_CONFIG, [*plain, *options]), train=True)


def test_repeat_factors_that_repeat_nothing(caplog):
    options = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    check_config(load_config(TINY_CONFIG, options), train=True)
    assert "repeats no image, because DATALOADER.REPEAT_THRESHOLD is 0" in caplog.text


def test_threshold_of_repeat_factors():
    assert repeat_threshold([448, 100, 52], 448) == pytest.approx(200 / 448, abs=5e-4)
    # Of very many classes; 0.0014 and 0.00042 are not 0.001 and 0.
    assert repeat_threshold([140, 140], 100_000) == 0.0014
    assert repeat_threshold([83, 1], 100_000) == 0.00042


@pytest.mark.parametrize(
    "given, expected",
    [
        ("[('dark', 3)]", [1.0, 3.0, 1.0]),
        ("[('Bright', 0.5), ('background', 2)]", [0.5, 1.0, 2.0]),
        ("[2, 3]", [2, 3]),
    ],
)
def test_weights_by_name(given, expected):
    cfg = load_config("", ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", given])
    order_weights(cfg, ["bright", "dark"])
    assert list(cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS) == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ("[('gray', 3)]", "there is no class 'gray'; the classes are bright, dark, background"),
        ("[('dark', 'much')]", "the weight of 'dark' is 'much', not a number"),
        ("[('dark', 1), 3]", "3 is not a pair of class and weight"),
    ],
)
def test_wrong_weights_by_name(given, message):
    cfg = load_config("", ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", given])
    with pytest.raises(UserError, match=message):
        order_weights(cfg, ["bright", "dark"])


def test_names_that_nothing_has_ordered():
    options = [KEY, "weighted_focal", "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[('dark', 3)]"]
    with pytest.raises(UserError, match="has names.*give the weights in that order"):
        BalancedFastRCNNOutputLayers(load_config("", options), ShapeSpec(channels=8))


def test_counts_that_are_set_by_hand(caplog):
    cfg = load_config("", [*COUNTS, "MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    complete_class_balance(cfg, [1, 2, 3], ["a", "b", "c"], train=True)
    assert cfg.MODEL.CLASS_COUNTS == [40, 9, 3]
    assert "CLASS_COUNTS is 40, 9, 3, but the training data have 1, 2, 3" in caplog.text
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(UserError, match="CLASS_COUNTS has 3 numbers.*4 are needed"):
        complete_class_balance(cfg, None, None, train=False)


def test_counts_that_nothing_says():
    cfg = load_config("", [KEY, "balanced_softmax"])
    complete_class_balance(cfg, None, None, train=False)
    with pytest.raises(UserError, match="balanced_softmax.*set MODEL.CLASS_COUNTS"):
        complete_class_balance(cfg, None, None, train=True)
    options = [KEY, "weighted_cross_entropy", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    cfg = load_config("", [*options, "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[1.0, 2.0]"])
    complete_class_balance(cfg, None, None, train=True)


# Trainings


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Data of three classes, of which one is a crowd once: the file, and the counts."""
    json_file = write_coco(tmp_path_factory.mktemp("three") / "data", num_images=6, seed=3)
    content = json.loads(json_file.read_text())
    content["categories"].append(
        {"id": 7, "name": "third", "keypoints": ["a", "b"], "skeleton": []}
    )
    content["annotations"][4]["category_id"] = content["annotations"][9]["category_id"] = 7
    content["annotations"][9]["iscrowd"] = 1
    json_file.write_text(json.dumps(content))
    order = {1: 0, 2: 1, 7: 2}
    counts = [0, 0, 0]
    for annotation in content["annotations"]:
        counts[order[annotation["category_id"]]] += not annotation["iscrowd"]
    return json_file, counts


def arguments(three, output, *options):
    json_file, _ = three
    return [
        *("--register", "three", json_file, json_file.parent / "images"),
        *(*TINY_MODEL[2:], "OUTPUT_DIR", output, "DATASETS.TRAIN", "('three',)"),
        *("DATASETS.TEST", "('three',)", "SEED", "4", "TEST.NUM_IMAGES_SHOWN", "0", *options),
    ]


def state_of(output):
    return torch.load(output / "model_final.pth", weights_only=True)


@pytest.mark.slow
def test_train_net_seesaw_and_exact_resume(three, tmp_path, train_net_here):
    """Counts of the data in config.yaml; counts of the proposals in the checkpoint; a resumed
    training ends as one that was not interrupted; an evaluation needs nothing but the files."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    seesaw = [KEY, "seesaw", "MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem", "SOLVER.BASE_LR", "0.001"]
    seesaw += ["DATALOADER.SAMPLER_TRAIN", "UniformClassTrainingSampler"]
    result = train_net_here(*arguments(three, whole, *seesaw, "SOLVER.MAX_ITER", "4"))
    assert result.returncode == 0, result.stderr
    first = arguments(
        three, parts, *seesaw, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"
    )
    result = train_net_here(*first)
    assert result.returncode == 0, result.stderr
    (parts / "model_final.pth").unlink()
    (parts / "model_0000003.pth").unlink()
    (parts / "last_checkpoint").write_text("model_0000001.pth")
    half = torch.load(parts / "model_0000001.pth", weights_only=True)["model"]
    result = train_net_here("--resume", *first)
    assert result.returncode == 0, result.stderr

    expected, got = (state_of(folder)["model"] for folder in (whole, parts))
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    counts = "roi_heads.box_predictor.classification_loss.counts"
    sampled = [line["roi_head/num_fg_samples"] for line in logged(whole) if "total_loss" in line]
    assert 0 < half[counts].sum() < got[counts].sum() and sampled[-1] > 0
    written = yaml.safe_load((whole / "config.yaml").read_text())["MODEL"]
    assert written["CLASS_COUNTS"] == three[1]
    metrics = logged(whole)[-1]
    assert {"bbox/APr", "bbox/APc", "bbox/APf"} <= metrics.keys()

    result = train_net_here(
        *("--eval-only", "--register", "three", three[0], three[0].parent / "images"),
        *("MODEL.WEIGHTS", whole / "model_final.pth", "OUTPUT_DIR", tmp_path / "evaluated"),
        config=whole / "config.yaml",
    )
    assert result.returncode == 0, result.stderr
    # Another loss is another model.
    result = train_net_here("--resume", *first, KEY, "focal")
    assert_user_error(result, "cannot go on with MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE")


@pytest.mark.slow
def test_train_net_weights_by_name(three, tmp_path, train_net_here):
    """In the order of the data in config.yaml; resumed with the names; from the YAML alone, an
    evaluation takes what the checkpoint says."""
    weights = [KEY, "weighted_cross_entropy", "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS"]
    weights.append("[('third', 5), ('background', 0.5)]")
    result = train_net_here(*arguments(three, tmp_path / "a", *weights, "SOLVER.MAX_ITER", "1"))
    assert result.returncode == 0, result.stderr
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["MODEL"]
    assert written["ROI_BOX_HEAD"]["CLASS_WEIGHTS"] == [1.0, 1.0, 5.0, 0.5]
    resumed = arguments(three, tmp_path / "a", *weights, "SOLVER.MAX_ITER", "2")
    result = train_net_here("--resume", *resumed)
    assert result.returncode == 0, result.stderr
    evaluated = arguments(three, tmp_path / "b", *weights)
    result = train_net_here(
        "--eval-only", *evaluated, "MODEL.WEIGHTS", tmp_path / "a" / "model_final.pth"
    )
    assert result.returncode == 0, result.stderr


def test_train_net_refuses_before_it_writes(three, tmp_path, train_net_here):
    for options, message in (
        ([KEY, "seesaws"], "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE: there is no 'seesaws'"),
        ([KEY, "focal", "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA", "-1.0"], "FOCAL_GAMMA"),
        (
            [KEY, "weighted_focal", "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[('thrid', 2)]"],
            "there is no class 'thrid'",
        ),
    ):
        result = train_net_here(*arguments(three, tmp_path / "output", *options))
        assert_user_error(result, message)
        assert not (tmp_path / "output").exists()


def test_count_classes(three):
    register_coco("counted", str(three[0]), str(three[0].parent / "images"))
    try:
        assert count_classes("counted") == three[1]
        assert count_classes(["counted", "counted"]) == [2 * n for n in three[1]]
        loss = LazyCall(WeightedCrossEntropy)(
            num_classes=3, weights=LazyCall(count_classes)(names="counted")
        )
        assert instantiate(loss).weights.tolist() == [*map(float, three[1]), 1.0]
    finally:
        DatasetCatalog.remove("counted")
        MetadataCatalog.pop("counted", None)


# Sampling of images


def test_classes_are_uniform():
    """Class 0 in 40 images, 1 in four and 2 in one, together with 1; one image has none."""
    records = [{"annotations": [{"category_id": 0}]} for _ in range(40)]
    records += [{"annotations": [{"category_id": 1}] * 2} for _ in range(3)]
    records += [{"annotations": [{"category_id": 2}, {"category_id": 1}]}, {"annotations": []}]
    records[0]["annotations"].append({"category_id": 2, "iscrowd": 1})
    images = images_of_classes(records)
    assert images == [list(range(40)), [40, 41, 42, 43], [43]]
    sampler = iter(UniformClassTrainingSampler(images, seed=5))
    drawn = [next(sampler) for _ in range(3 * 400)]
    # Exactly: each class once in three draws, each of its images once in a round of its own.
    counts = np.bincount(drawn, minlength=45)
    assert (counts[:40] == 10).all() and (counts[40:43] == 100).all()
    assert counts[43] == 100 + 400 and counts[44] == 0
    of_class_0 = [index for index in drawn if index < 40]
    rounds = [of_class_0[i : i + 40] for i in range(0, 400, 40)]
    assert all(sorted(r) == list(range(40)) for r in rounds) and len(set(map(tuple, rounds))) == 10
    again = iter(UniformClassTrainingSampler(images, seed=5))
    assert [next(again) for _ in range(50)] == drawn[:50]
    other = iter(UniformClassTrainingSampler(images, seed=6))
    assert [next(other) for _ in range(50)] != drawn[:50]
    with pytest.raises(UserError, match="no image has an object"):
        UniformClassTrainingSampler([[]], seed=1)


def test_uniform_classes_resume_exactly(three):
    register_coco("uniform", str(three[0]), str(three[0].parent / "images"))
    try:
        options = ["DATASETS.TRAIN", "('uniform',)", "DATALOADER.NUM_WORKERS", "0", "SEED", "3"]
        options += ["DATALOADER.SAMPLER_TRAIN", "UniformClassTrainingSampler"]
        options += ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64, 80)"]
        cfg = load_config("", options)
        loader = TrainLoader(cfg)
        batches = [next(it) for it in [iter(loader)] for _ in range(6)]
        resumed = TrainLoader(cfg)
        resumed.load_state_dict({**loader.state_dict(), "position": 4})
        iterator = iter(resumed)
        for expected in batches[4:]:
            for a, b in zip(expected, next(iterator), strict=True):
                assert a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])
    finally:
        DatasetCatalog.remove("uniform")
        MetadataCatalog.pop("uniform", None)


# Evaluation


def test_ap_by_group(three, tmp_path):
    """As the means of the classes' AP, whatever the order of the classes in the data."""
    register_coco("grouped", str(three[0]), str(three[0].parent / "images"))
    try:
        records = DatasetCatalog.get("grouped")
        evaluator = build_evaluator("grouped", str(tmp_path), class_counts=[5, 50, 1])
        evaluator.reset()
        for record in records:
            found = Instances((record["height"], record["width"]))
            kept = [
                a for a in record["annotations"] if not a.get("iscrowd") and a["category_id"] != 1
            ]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in kept)]
            found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
            found.scores = torch.linspace(0.9, 0.5, len(kept))
            found.pred_classes = torch.tensor([a["category_id"] for a in kept], dtype=torch.long)
            evaluator.process([record], [{"instances": found}])
        results = evaluator.evaluate()["bbox"]
        assert results["APr"] == results["AP-third"] > 90  # found to the pixel
        assert results["APc"] == results["AP-bright"] > 90
        assert results["APf"] == results["AP-dark"] == 0

        nothing = build_evaluator("grouped", str(tmp_path), class_counts=[5, 50, 1])
        nothing.reset()
        for record in records:
            empty = Instances(
                (record["height"], record["width"]), pred_boxes=Boxes(torch.zeros(0, 4))
            )
            empty.scores, empty.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
            nothing.process([record], [{"instances": empty}])
        assert nothing.evaluate()["bbox"]["APr"] == 0
    finally:
        DatasetCatalog.remove("grouped")
        MetadataCatalog.pop("grouped", None)


def test_panels_of_class_groups():
    run = {"total_loss": {0: 1.0, 20: 0.5}, "bbox/AP": {20: 30.0}}
    run |= {f"bbox/AP{end}": {20: value} for end, value in zip("rcf", (10.0, 30.0, 50.0))}
    for stage in ("", "stage0/"):
        run |= {f"{stage}fast_rcnn/num_{name}": {0: 1.0, 20: 2.0} for name in ("rare", "frequent")}
        run |= {f"{stage}fast_rcnn/score_frequent": {20: 0.25}}
    panels = {
        axes.get_title(): axes for axes in draw_training({"run": run}).axes if axes.get_title()
    }
    assert list(panels) == [
        *("total_loss", "bbox AP (%)", "bbox AP by class group (%)"),
        *("positives per image", "positives per image, stage0"),
        *("score of the right class", "score of the right class, stage0"),
    ]
    legend = panels["bbox AP by class group (%)"].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["rare", "common", "frequent"]
    drawn = [line.get_xydata().tolist() for line in panels["score of the right class"].lines[:1]]
    assert drawn == [[[20, 0.25]]]


# Generated data


def test_shapes_with_a_tail(tmp_path, monkeypatch):
    for seed in range(5):
        shares = class_shares(TAIL._replace(seed=seed), "train")
        assert shares.sum() == pytest.approx(1) and shares.max() / shares.min() == pytest.approx(
            100
        )
        ratios = np.diff(np.log(np.sort(shares)))
        assert np.allclose(ratios, ratios[0])
        assert np.allclose(class_shares(TAIL._replace(seed=seed), "val"), 1 / 9)
    orders = {tuple(np.argsort(class_shares(TAIL._replace(seed=s), "train"))) for s in range(8)}
    assert len(orders) == 8

    monkeypatch.setitem(SPLITS, "train", 60)
    monkeypatch.setitem(SPLITS, "val", 60)
    ensure_shapes(str(tmp_path / "tail"), TAIL)
    for split in SPLITS:
        content = json.loads((tmp_path / "tail" / f"{split}.json").read_text())
        assert [c["name"] for c in content["categories"]] == list(TAIL_CLASSES)
        found = np.bincount([a["category_id"] - 1 for a in content["annotations"]], minlength=9)
        expected = class_shares(TAIL, split) * found.sum()
        deviation = (found - expected) / np.sqrt(expected)
        assert np.abs(deviation).max() < 4, (split, found, expected)


def test_data_without_a_tail_are_as_before(tmp_path, monkeypatch):
    """Drawn before there was one, they are not drawn again."""
    for split in SPLITS:
        monkeypatch.setitem(SPLITS, split, 1)
    ensure_shapes(str(tmp_path / "shapes"))
    info = json.loads((tmp_path / "shapes" / "info.json").read_text())
    assert set(info) == {
        *("generator", "version", "image_size", "shape_size", "shapes_per_image", "min_visible"),
        *("jpeg_quality", "seed"),
    }


def test_configs_differ_by_what_their_names_say():
    folder = ROOT / "configs" / "LVISv1-InstanceSegmentation"
    plain = load_config(str(folder / "balanced_mask_rcnn_R_50_FPN_1x.yaml"))
    seesaw = load_config(str(folder / "balanced_mask_rcnn_R_50_FPN_1x_seesaw.yaml"))
    assert seesaw.MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE == "seesaw"
    assert seesaw.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    seesaw.MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE = "cross_entropy"
    seesaw.OUTPUT_DIR = plain.OUTPUT_DIR
    assert seesaw == plain
