"""Whole models: every config builds, and with all balances off the model is Detectron2's own."""

import copy
import json
from functools import partial

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from balanced_d2 import add_balanced_config, load_config
from balanced_d2.config.yaml_config import set_by_hand
from balanced_d2.modeling import (
    P6P7,
    BalancedFPN,
    BalancedL1,
    BalancedRetinaNet,
    IoUBalancedSampler,
)
from balanced_d2.utils.errors import UserError

from .conftest import ROOT

CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name != "common"  # parts of others
)
MODEL_ZOO = (ROOT / "MODEL_ZOO.md").read_text()
R_18 = "configs/BCCD/{}faster_rcnn_R_18_FPN.yaml"


def config(name, *opts):
    return load_config(name, ["MODEL.DEVICE", "cpu", *opts])


def batch():
    torch.manual_seed(7)
    inputs = []
    for height, width in ((96, 128), (83, 111)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 8, 60, 50], [40.0, 30, 72, 66]]))
        instances.gt_classes = torch.tensor([0, 2])
        image = torch.randint(256, (3, height, width)).float()
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def losses(model, seed=11):
    torch.manual_seed(seed)
    with EventStorage():
        return model.train()(batch())


# The number of classes follows from the data where a config does not say it.
CLASSES = {"Aquarium": 7, "BCCD": 3, "Demo": 5}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds(name):
    cfg = config(name, "MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", "False")
    folder = name.split("/")[1]
    if folder in CLASSES:
        assert "MODEL.ROI_HEADS.NUM_CLASSES" not in set_by_hand(name)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES[folder]
    with torch.device("meta"):  # parameters without values, to save time
        model = build_model(cfg)
    balances = [isinstance(model.backbone, BalancedFPN)]
    if isinstance(model, BalancedRetinaNet):
        balances.append(isinstance(model.regression_loss, BalancedL1))
    else:
        predictors = model.roi_heads.box_predictor
        for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
            loss = getattr(predictor, "regression_loss", None)
            balances.append(isinstance(loss, BalancedL1))
        balances.append(cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER == "iou_balanced")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    schedule = f"{cfg.SOLVER.MAX_ITER:,} × {cfg.SOLVER.IMS_PER_BATCH}"
    assert f"]({name}) | {schedule} | {num_parameters / 1e6:.1f} M |" in MODEL_ZOO
    file = name.rsplit("/", 1)[1]
    if "/FineTune/" in name:  # the box loss stays L1
        assert balances == [True, False, True]
    elif "balanced_faster_rcnn_lite0" in file:  # what docs/study.md found to be free
        assert balances == [False, False, True]
    elif file.startswith(("balanced_", "libra_")):
        assert all(balances)
    else:
        names = ("balanced_fpn", "balanced_l1", "iou_balanced_sampling")
        # RetinaNet samples no proposals.
        assert balances == [balance in file for balance in names][: len(balances)]


def test_single_component_configs_turn_on_one_balance_each():
    stem = "configs/COCO-Detection/faster_rcnn_R_50_FPN_1x"
    on = set()
    for suffix in ("", "_iou_balanced_sampling", "_balanced_fpn", "_balanced_l1"):
        model = config(f"{stem}{suffix}.yaml").MODEL
        on.add(
            (
                model.ROI_HEADS.NEGATIVE_SAMPLER == "iou_balanced",
                model.BALANCED_FPN.ENABLED,
                model.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE == "balanced_l1",
            )
        )
    assert on == {
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    }


def test_adding_the_config_changes_no_default():
    def flat(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, type(node)):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    cfg = get_cfg()
    before = dict(copy.deepcopy(list(flat(cfg))))
    add_balanced_config(cfg)
    after = dict(flat(cfg))
    assert before.items() <= after.items()
    # Detectron2 reads the first two without a default, and has the third only on main.
    detectron2s = {
        "DATALOADER.RANDOM_SUBSET_RATIO": 1.0,
        "DATASETS.TRAIN_REPEAT_FACTOR": [],
        "DATALOADER.REPEAT_SQRT": True,
    }
    assert detectron2s.items() <= after.items()
    assert after.keys() - before.keys() - detectron2s.keys() == {
        "INPUT.GRAY_RANGE",
        "DATALOADER.SKIP_BAD_IMAGES",
        "DATALOADER.MAX_BAD_IMAGES",
        "MODEL.CHANNELS_LAST",
        "TEST.AMP.ENABLED",
        "MODEL.SPARSE_ROI_ALIGN",
        "MODEL.FOLD_NORM",
        "SOLVER.OPTIMIZER",
        "SOLVER.BACKBONE_MULTIPLIER",
        *(
            f"MODEL.{node}.{key}"
            for node in ("TIMM", "TORCHVISION")
            for key in ("NAME", "PRETRAINED", "WEIGHTS", "NORM")
        ),
        "MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE",
        "MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL",
        "MODEL.BALANCED_FPN.BOTTOM_UP",
        "MODEL.BALANCED_FPN.ENABLED",
        "MODEL.BALANCED_FPN.P6_FROM_P5",
        "MODEL.BALANCED_FPN.P7_RELU",
        "MODEL.BALANCED_FPN.REFINE_LEVEL",
        "MODEL.BALANCED_FPN.REFINE_TYPE",
        "MODEL.BALANCED_FPN.ZERO_INIT",
        "MODEL.ROI_HEADS.NEGATIVE_SAMPLER",
        "MODEL.ROI_HEADS.POSITIVE_SAMPLER",
        "MODEL.ROI_HEADS.NUM_BINS",
        "MODEL.ROI_HEADS.OHEM_NMS_THRESH",
        "MODEL.CLASS_COUNTS",
        "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE",
        "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS",
        "MODEL.ROI_BOX_HEAD.CLASS_WEIGHT_BETA",
        "MODEL.ROI_BOX_HEAD.FOCAL_GAMMA",
        *(f"MODEL.ROI_BOX_HEAD.SEESAW_{key}" for key in ("P", "Q", "EPS", "OBJECTNESS")),
        "MODEL.ROI_BOX_HEAD.BALANCED_L1_ALPHA",
        "MODEL.ROI_BOX_HEAD.BALANCED_L1_GAMMA",
        "MODEL.ROI_BOX_HEAD.BALANCED_L1_BETA",
        "MODEL.RETINANET.BALANCED_L1_ALPHA",
        "MODEL.RETINANET.BALANCED_L1_GAMMA",
        "MODEL.RETINANET.BALANCED_L1_BETA",
        "MODEL.RETINANET.CLIP_BEFORE_NMS",
        "TEST.NUM_IMAGES_SHOWN",
        "SOLVER.ACCUMULATE",
        *("SOLVER.EMA.ENABLED", "SOLVER.EMA.DECAY"),
        *(f"SOLVER.EARLY_STOPPING.{key}" for key in ("PATIENCE", "METRIC", "MODE", "MIN_CHANGE")),
        *("TEST.BEST_CHECKPOINT.METRIC", "TEST.BEST_CHECKPOINT.MODE"),
        *(f"MLFLOW.{key}" for key in ("ENABLED", "EXPERIMENT", "NAME", "URI")),
        "WANDB.ENABLED",
        "WANDB.NAME",
        "WANDB.PROJECT",
    }


def test_all_off_is_detectron2s_own_model():
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", "3")
    ours = config(R_18.format(""), *classes)
    theirs = config(
        R_18.format(""),
        *classes,
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    )
    models = []
    for cfg in (theirs, ours):
        torch.manual_seed(5)
        models.append(build_model(cfg))
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    their_losses, our_losses = (losses(model) for model in models)
    assert their_losses == our_losses
    their_results, our_results = (model.eval()(batch()) for model in models)
    for a, b in zip(their_results, our_results):
        a, b = a["instances"], b["instances"]
        assert len(a) > 0
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_balanced_model_adds_only_the_refinement():
    plain, balanced = (build_model(config(R_18.format(x))).state_dict() for x in ("", "balanced_"))
    assert set(balanced) - set(plain) == {
        f"backbone.balancer.refine.{conv}.{kind}"
        for conv in ("theta", "phi", "g", "conv_out")
        for kind in ("weight", "bias")
    }
    assert set(plain) <= set(balanced)


@pytest.mark.parametrize("positive_sampler", ["random", "instance_balanced"])
@pytest.mark.parametrize("refine_type", ["none", "conv", "non_local"])
def test_balanced_model_trains_every_parameter(refine_type, positive_sampler):
    model = build_model(
        config(
            R_18.format("balanced_"),
            *("MODEL.BALANCED_FPN.REFINE_TYPE", refine_type),
            *("MODEL.ROI_HEADS.POSITIVE_SAMPLER", positive_sampler),
        )
    )
    if refine_type == "non_local":  # starts as the identity, so the others get no gradient
        torch.nn.init.normal_(model.backbone.balancer.refine.conv_out.weight)
    sum(losses(model).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    "builder, levels, refine_level",
    [
        ("build_balanced_resnet_fpn_backbone", ["p2", "p3", "p4", "p5", "p6"], 2),
        ("build_balanced_retinanet_resnet_fpn_backbone", ["p3", "p4", "p5", "p6", "p7"], 1),
    ],
)
def test_builders(builder, levels, refine_level):
    cfg = config(
        R_18.format("balanced_"),
        *("MODEL.FPN.IN_FEATURES", str(["res" + x[1] for x in levels if int(x[1]) < 6])),
        *("MODEL.BALANCED_FPN.REFINE_LEVEL", str(refine_level)),
        *("MODEL.BALANCED_FPN.REFINE_TYPE", "none"),
    )
    build = BACKBONE_REGISTRY.get(builder)
    torch.manual_seed(0)
    balanced = build(cfg, ShapeSpec(channels=3)).eval()
    cfg.MODEL.BALANCED_FPN.ENABLED = False
    torch.manual_seed(0)
    plain = build(cfg, ShapeSpec(channels=3)).eval()
    assert type(plain) is FPN and type(balanced) is BalancedFPN
    assert balanced.output_shape() == plain.output_shape()

    image = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        features, unbalanced = balanced(image), plain(image)
        expected = balanced.balancer(list(unbalanced.values()))
    assert list(features) == list(unbalanced) == levels
    for feature, want, before in zip(features.values(), expected, unbalanced.values()):
        assert torch.equal(feature, want) and not torch.equal(feature, before)


@pytest.mark.parametrize(
    "top_block, refine_level",
    [
        *((LastLevelMaxPool, level) for level in range(4)),
        *((partial(P6P7, 16, 16, "p5", relu=relu), n) for n in range(5) for relu in (True, False)),
    ],
)
def test_gradients_of_a_balanced_fpn(top_block, refine_level):
    """Also where the top block reads a level that is balanced."""
    bottom_up = build_resnet_backbone(config(R_18.format("")), ShapeSpec(channels=3))
    levels = ["res3", "res4", "res5"]
    fpn = BalancedFPN(bottom_up, levels, 16, top_block=top_block(), refine_level=refine_level)
    torch.nn.init.normal_(fpn.balancer.refine.conv_out.weight)
    image = torch.randn(1, 3, 96, 128)
    weights = [torch.randn_like(x) for x in fpn(image).values()]

    def gradients(features):
        fpn.zero_grad()
        sum((x * weight).sum() for x, weight in zip(features, weights)).backward()
        return [parameter.grad.clone() for parameter in fpn.parameters()]

    got = gradients(fpn(image).values())
    plain = FPN.forward(fpn, image)
    torch.testing.assert_close(got, gradients(fpn.balancer(list(plain.values()))))


def test_balanced_fpn_without_a_config():
    bottom_up = build_resnet_backbone(config(R_18.format("")), ShapeSpec(channels=3))
    fpn = BalancedFPN(
        bottom_up, ["res3", "res4", "res5"], 32, refine_level=1, refine_type="conv", norm="BN"
    )
    assert list(fpn.eval()(torch.randn(2, 3, 64, 64))) == ["p3", "p4", "p5"]
    with pytest.raises(UserError, match="pyramid has 4 levels"):
        BalancedFPN(
            bottom_up,
            ["res3", "res4", "res5"],
            32,
            top_block=LastLevelMaxPool(),
            refine_level=4,
        )


def test_unknown_box_loss():
    with pytest.raises(UserError, match="BBOX_REG_LOSS_TYPE.*no 'balancedl1'.*, balanced_l1"):
        build_model(config(R_18.format(""), "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balancedl1"))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.ROI_HEADS.NAME", "BalancedROIHead"], "did you mean BalancedROIHeads"),
        (["MODEL.BACKBONE.NAME", "build_balanced_fpn"], "MODEL.BACKBONE.NAME: there is no"),
        (["MODEL.META_ARCHITECTURE", "RCNN"], "MODEL.META_ARCHITECTURE: there is no 'RCNN'"),
    ],
)
def test_unknown_names(opts, message):
    with pytest.raises(UserError, match=message):
        config(R_18.format("balanced_"), *opts)


def test_a_config_written_by_0_1_0_keeps_its_meaning():
    """It has all keys, including those whose defaults have changed since."""
    old = load_config(str(ROOT / "tests" / "data" / "config_0.1.0.yaml"), ["MODEL.DEVICE", "meta"])
    new = config(
        R_18.format("balanced_"), "MODEL.DEVICE", "meta", "MODEL.ROI_HEADS.NUM_CLASSES", "3"
    )
    # For RetinaNet; in 0.1.0, one file turned on the balances of both.
    new.MODEL.RETINANET.BBOX_REG_LOSS_TYPE = "balanced_l1"
    assert json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    with torch.device("meta"):
        heads = build_model(old).roi_heads
    assert isinstance(heads._sample_negatives, IoUBalancedSampler)
