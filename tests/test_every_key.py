"""Every key of Detectron2's config and of ours is read during training or evaluation."""

import argparse
import sys
from collections import defaultdict

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from yacs.config import CfgNode as YacsNode

from balanced_d2 import load_config
from balanced_d2.data import register_coco
from balanced_d2.data.loader import TrainLoader
from balanced_d2.engine import BalancedTrainer, setup

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL

# Keys that are not read as attributes, and the reason.
NOT_READ = {
    "VERSION": "Detectron2 reads it from a file, to update old keys",
    "GLOBAL.HACK": "for users' experiments; Detectron2 itself never reads it",
    "CUDNN_BENCHMARK": "default_setup reads it from the dump: see the test below",
    "FLOAT32_PRECISION": "default_setup reads it from the dump, only on main: see the test below",
}

# Models and loaders that read keys that others do not.
VARIANTS = {
    "R-CNN with everything": ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"],
    "plain backbone": ["MODEL.BACKBONE.NAME", "build_balanced_fpn_backbone"],
    "RetinaNet": [
        *("MODEL.META_ARCHITECTURE", "BalancedRetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_balanced_retinanet_fpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
        *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
        *("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1"),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128], [256]]"),
    ],
    "timm": [
        *("MODEL.BACKBONE.NAME", "build_balanced_fpn_backbone", "MODEL.TIMM.NAME", "resnet18"),
        *("MODEL.BALANCED_FPN.BOTTOM_UP", "build_timm_backbone"),
        *("MODEL.TIMM.PRETRAINED", "False", "MODEL.DEVICE", "cpu"),
    ],
    "cascade": ["MODEL.ROI_HEADS.NAME", "BalancedCascadeROIHeads"],
    "OHEM": ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem"],
    **{
        name: ["MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", name, "MODEL.CLASS_COUNTS", "[3, 4]"]
        for name in ("weighted_focal", "seesaw")
    },
    "panoptic": ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", "True"],
    "rotated": [
        *("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "MODEL.ROI_HEADS.NAME", "RROIHeads"),
        *("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
        *("MODEL.RPN.BBOX_REG_WEIGHTS", "(1, 1, 1, 1, 1)"),
        *("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(10, 10, 5, 5, 1)"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"),
    ],
}
ROTATED_AND_CASCADE = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
SAMPLERS = [
    *("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"),
    *("WeightedCategoryTrainingSampler", "UniformClassTrainingSampler"),
]


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def paths_by_keys(node, prefix=""):
    """The path of each node, by its keys, which clones share."""
    yield frozenset(node), prefix
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from paths_by_keys(value, f"{prefix}{key}.")


@pytest.fixture
def read(monkeypatch):
    """The keys that are read from now on."""
    paths = defaultdict(list)
    for node_keys, path in paths_by_keys(load_config("")):
        paths[node_keys].append(path)
    # Nodes with the same keys cannot be told apart.
    alike = {tuple(group) for group in paths.values() if len(group) > 1}
    assert alike == {("MODEL.TIMM.", "MODEL.TORCHVISION."), ("SOLVER.AMP.", "TEST.AMP.")}
    keys = set()
    original = YacsNode.__getattr__

    def recording(node, name):
        keys.update(path + name for path in paths.get(frozenset(node), ()))
        return original(node, name)

    monkeypatch.setattr(YacsNode, "__getattr__", recording)
    return keys


@pytest.fixture
def data(tiny_coco):
    register_coco("every_key", str(tiny_coco), str(tiny_coco.parent / "images"))
    # The federated loss of Detectron2's main asks for it.
    counts = [{"id": number, "image_count": 3} for number in (1, 2)]
    MetadataCatalog.get("every_key").set(class_image_count=counts)
    yield
    DatasetCatalog.remove("every_key")
    MetadataCatalog.pop("every_key", None)


def options(tmp_path, *more):
    return [
        *(*TINY_MODEL, "DATASETS.TRAIN", "('every_key',)", "DATASETS.TEST", "('every_key',)"),
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "TEST.PRECISE_BN.ENABLED", "True"),
        *("MODEL.FPN.NORM", "BN", "TEST.PRECISE_BN.NUM_ITER", "1", "INPUT.CROP.ENABLED", "True"),
        *("INPUT.MASK_FORMAT", "bitmask", *more),
    ]


def train(tmp_path, *more):
    """Train like train_net.py."""
    args = argparse.Namespace(
        config_file=str(ROOT / TINY_CONFIG),
        opts=options(tmp_path, *more),
        register=[],
        resume=False,
        eval_only=False,
        skip_data_check=False,
        overwrite=False,
        dry_run=False,
    )
    cfg = setup(args)
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return cfg


@pytest.mark.slow
def test_every_key_is_read(read, data, tmp_path, monkeypatch):
    config_file = str(ROOT / TINY_CONFIG)
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # one line says that it cannot be imported
    monkeypatch.setattr("balanced_d2.config.checks.check_package", lambda *names: None)
    watched = ["TEST.BEST_CHECKPOINT.METRIC", "bbox/AP", "SOLVER.EARLY_STOPPING.PATIENCE", "9"]
    watched += ["TEST.EVAL_PERIOD", "1", "MLFLOW.ENABLED", "True", "WANDB.ENABLED", "True"]
    train(tmp_path, "MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True", *watched)
    schedulers = ["WarmupMultiStepLR", "WarmupCosineLR"]
    if "NUM_DECAYS" in load_config("").SOLVER:  # on main
        schedulers.append("WarmupStepWithFixedGammaLR")
        VARIANTS["federated loss"] = [
            *(
                "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
                "True",
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
                "True",
            ),
            *("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", "1", "MODEL.DEVICE", "cpu"),
        ]
    for scheduler in schedulers:
        cfg = load_config(config_file, options(tmp_path, "SOLVER.LR_SCHEDULER_NAME", scheduler))
        optimizer = BalancedTrainer.build_optimizer(cfg, torch.nn.Linear(1, 1))
        BalancedTrainer.build_lr_scheduler(cfg, optimizer)
    for name in SAMPLERS:
        TrainLoader(load_config(config_file, options(tmp_path, "DATALOADER.SAMPLER_TRAIN", name)))
    for more in VARIANTS.values():
        if "RROIHeads" in more or "BalancedCascadeROIHeads" in more:
            more = [*more, *ROTATED_AND_CASCADE]
        cfg = load_config(config_file, options(tmp_path, "MODEL.DEVICE", "meta", *more))
        with torch.device(cfg.MODEL.DEVICE):
            model = build_model(cfg)
        if more == VARIANTS["plain backbone"]:
            GeneralizedRCNNWithTTA(cfg, model)
    proposals = options(tmp_path, "MODEL.LOAD_PROPOSALS", "True")
    cfg = load_config(config_file, proposals)
    with pytest.raises(AssertionError):  # there are none, but the loader needs them
        TrainLoader(cfg)
    DatasetMapper(cfg, is_train=True)
    DatasetMapper(cfg, is_train=False)
    cfg = load_config(config_file, [*proposals, "DATASETS.PROPOSAL_FILES_TEST", "('none.pkl',)"])
    with pytest.raises(OSError):
        BalancedTrainer.build_test_loader(cfg, "every_key")

    unread = set(flat(load_config(""))) - read - NOT_READ.keys()
    assert not unread, sorted(unread)


@pytest.mark.slow
def test_keys_that_default_setup_reads(data, tmp_path, monkeypatch):
    before = torch.backends.cudnn.benchmark
    precisions = []  # which only GPUs have
    name = "detectron2.engine.defaults._set_float32_precision"
    monkeypatch.setattr(name, precisions.append, raising=False)
    more = ["CUDNN_BENCHMARK", "True", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    on_main = "FLOAT32_PRECISION" in load_config("")
    try:
        train(tmp_path, *more, *(["FLOAT32_PRECISION", "high"] if on_main else []))
        assert torch.backends.cudnn.benchmark
        assert precisions == ["high"] * on_main
    finally:
        torch.backends.cudnn.benchmark = before
