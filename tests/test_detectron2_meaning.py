"""Everything that Detectron2's own programs support is supported here, or refused at the start."""

import copy
import gc
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import hooks
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluator, SemSegEvaluator
from detectron2.utils import comm
from torch import nn

from balanced_d2 import load_config
from balanced_d2.config.checks import check_config
from balanced_d2.config.lazy import load_lazy_config, trainer_config
from balanced_d2.data import register_coco
from balanced_d2.data.loader import TrainLoader
from balanced_d2.data.train_samplers import SAMPLERS
from balanced_d2.engine import BalancedTrainer
from balanced_d2.engine.lazy import LazyTrainer
from balanced_d2.evaluation import build_evaluator
from balanced_d2.evaluation.evaluators import check_packages
from balanced_d2.utils.errors import StopTraining, UserError

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, assert_user_error, logged

LAZY = str(ROOT / "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.py")


def run(json_file, output, *options):
    return [
        *("--register", "tiny", json_file, json_file.parent / "images", *TINY_MODEL),
        *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"),
        *("OUTPUT_DIR", output, "SEED", "1", "DATALOADER.NUM_WORKERS", "0", *options),
    ]


@pytest.fixture
def registered():
    """Register datasets for the duration of a test."""
    names = []

    def register(name, records, **metadata):
        DatasetCatalog.register(name, lambda: copy.deepcopy(records))
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def records(categories):
    """An image for each entry, with one object for each of its categories."""
    return [
        {
            "file_name": f"{index}.jpg",
            "image_id": index,
            "height": 40 if index % 3 else 60,
            "width": 50,
            "annotations": [
                {"bbox": [1.0, 2, 20, 20], "bbox_mode": 0, "category_id": c} for c in group
            ],
        }
        for index, group in enumerate(categories)
    ]


def identity(record):
    return record


# Test-time augmentation


@pytest.mark.slow
def test_test_time_augmentation(tiny_coco, tmp_path, train_net_here):
    augmented = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 80)")
    result = train_net_here(*run(tiny_coco, tmp_path / "a", *augmented))
    assert result.returncode == 0, result.stderr
    trained = logged(tmp_path / "a")[-1]
    assert trained["bbox_TTA/AP"] != trained["bbox/AP"] or trained["bbox/AP"] == 0
    detections = json.loads((tmp_path / "a/inference_TTA/coco_instances_results.json").read_text())
    plain = json.loads((tmp_path / "a/inference/coco_instances_results.json").read_text())
    assert detections and detections != plain
    # --eval-only gives the same result.
    weights = ("MODEL.WEIGHTS", tmp_path / "a/model_final.pth")
    evaluate = ["--eval-only", *run(tiny_coco, tmp_path / "b", *augmented, *weights)]
    assert train_net_here(*evaluate).returncode == 0
    again = json.loads((tmp_path / "b/inference_TTA/coco_instances_results.json").read_text())
    assert again == detections


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.META_ARCHITECTURE", "BalancedRetinaNet"),
        ("MODEL.KEYPOINT_ON", "True"),
        ("MODEL.LOAD_PROPOSALS", "True"),
    ],
)
def test_test_time_augmentation_is_refused_if_unsupported(opts):
    cfg = load_config("", ["TEST.AUG.ENABLED", "True", "DATASETS.TEST", "('a',)", *opts])
    for train in (True, False):
        with pytest.raises(UserError, match=f"TEST.AUG.ENABLED.*{opts[0]}"):
            check_config(cfg, train=train)


# Precise batch normalisation


@pytest.mark.slow
def test_resume_with_precise_bn_is_exact(tiny_coco, tmp_path, train_net_here):
    """Its statistics come from images of their own, whose order continues."""
    options = [
        *("MODEL.FPN.NORM", "BN", "TEST.PRECISE_BN.ENABLED", "True", "TEST.EVAL_PERIOD", "2"),
        *("TEST.PRECISE_BN.NUM_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "-1"),
        *("DATASETS.TEST", "()", "SOLVER.MAX_ITER", "6"),
    ]
    result = train_net_here(*run(tiny_coco, tmp_path, *options))
    assert result.returncode == 0, result.stderr
    expected = torch.load(tmp_path / "model_final.pth", weights_only=True)
    position = expected["trainer"]["hooks"]["ResumablePreciseBN"]["position"]
    assert position == 9
    for name in ("model_final.pth", "model_0000005.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    result = train_net_here("--resume", *run(tiny_coco, tmp_path, *options))
    assert "Starting training from iteration 4" in result.stdout
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert resumed["trainer"]["hooks"] == expected["trainer"]["hooks"]
    for name, value in expected["model"].items():
        assert torch.equal(resumed["model"][name], value), name


# Samplers of images


def shares(cfg, images, num_draws=40_000):
    """The share of draws of each image, by the config's sampler."""
    sampler = iter(SAMPLERS[cfg.DATALOADER.SAMPLER_TRAIN](cfg, images)(3))
    counts = torch.bincount(
        torch.tensor([next(sampler) for _ in range(num_draws)]), minlength=len(images)
    )
    return counts / num_draws


# Category 0 in all images, 1 in every fourth, 2 in every eighth.
CATEGORIES = [[0], [0], [0, 1], [0], [0], [0], [0, 1, 2], [0]]


@pytest.mark.parametrize("sqrt", [True, False])
def test_repeat_factors(sqrt):
    cfg = load_config(
        "",
        [
            *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
            *("DATALOADER.REPEAT_THRESHOLD", "0.5", "DATALOADER.REPEAT_SQRT", str(sqrt)),
        ],
    )
    # max(1, sqrt(t / f)) of the rarest category: f = 1, 1/4, 1/8 (LVIS, appendix B.2).
    power = 0.5 if sqrt else 1
    factors = torch.tensor([1, 1, 2**power, 1, 1, 1, 4**power, 1])
    drawn = shares(cfg, records(CATEGORIES))
    assert torch.allclose(drawn, factors / factors.sum(), atol=0.012)


@pytest.mark.parametrize("by_category", [True, False])
def test_weights_of_datasets(by_category, registered):
    registered("first", records(CATEGORIES), thing_classes=["a", "b", "c"])
    registered("second", records([[0], [0]]), thing_classes=["a", "b", "c"])
    name = "WeightedCategoryTrainingSampler" if by_category else "WeightedTrainingSampler"
    cfg = load_config(
        "",
        [
            *("DATASETS.TRAIN", "('first', 'second')", "DATALOADER.SAMPLER_TRAIN", name),
            *("DATASETS.TRAIN_REPEAT_FACTOR", "[('second', 3.0)]"),
            *("DATALOADER.REPEAT_THRESHOLD", "0.5"),
        ],
    )
    of_category = [1, 1, 2**0.5, 1, 1, 1, 2, 1] if by_category else [1] * 8
    factors = torch.tensor([*of_category, 3, 3])
    drawn = shares(cfg, records(CATEGORIES + [[0], [0]]))
    assert torch.allclose(drawn, factors / factors.sum(), atol=0.012)


def test_random_subset():
    options = ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler")
    cfg = load_config("", [*options, "DATALOADER.RANDOM_SUBSET_RATIO", "0.5"])
    assert (shares(cfg, records(CATEGORIES), 4000) > 0).sum() == 4
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.12
    with pytest.raises(UserError, match="RATIO is 0.12, which is less than one of the 8 training"):
        shares(cfg, records(CATEGORIES))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATALOADER.RANDOM_SUBSET_RATIO", "0.0"], "RANDOM_SUBSET_RATIO is 0"),
        (["DATASETS.TRAIN_REPEAT_FACTOR", "[('b', 2.0)]"], "'b'.*is not in DATASETS.TRAIN"),
        (["DATASETS.TRAIN_REPEAT_FACTOR", "[('a', -2.0)]"], "TRAIN_REPEAT_FACTOR.*above 0"),
        (["DATASETS.TRAIN_REPEAT_FACTOR", "['a']"], "TRAIN_REPEAT_FACTOR.*not a pair"),
    ],
)
def test_wrong_options_of_samplers(opts, message):
    with pytest.raises(UserError, match=message):
        check_config(load_config("", ["DATASETS.TRAIN", "('a',)", *opts]), train=True)


# Several processes


@pytest.fixture
def as_process(monkeypatch):
    def pretend(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return pretend


def batches(number, grouping, as_process, rank=0, world_size=1, make_sampler=None):
    as_process(rank, world_size)
    loader = TrainLoader(
        records([[0]] * 11),
        mapper=identity,
        total_batch_size=6,
        aspect_ratio_grouping=grouping,
        seed=4,
        make_sampler=make_sampler,
    )
    taken, files = [], []
    iterator = iter(loader)
    for _ in range(number):
        taken.append([sample["file_name"] for sample in next(iterator)])
        files.append(loader.last_batch())
    return taken, files


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_divide_the_batches_of_a_single_process(grouping, world_size, as_process):
    alone, files = batches(8, grouping, as_process)
    assert alone == files
    shared = [batches(8, grouping, as_process, r, world_size) for r in range(world_size)]
    together = [[name for part in parts for name in part] for parts in zip(*(s[0] for s in shared))]
    assert [sorted(batch) for batch in together] == [sorted(batch) for batch in alone]
    assert all(len(part) == 6 // world_size for s in shared for part in s[0])
    # Any process can report a loss that is not finite, with the images of all.
    assert all(s[1] == alone for s in shared)
    if grouping:
        tall = {f"{index}.jpg" for index in range(0, 11, 3)}
        assert all(set(batch) <= tall or not set(batch) & tall for batch in alone)


def test_a_users_sampler_in_several_processes(as_process):
    def make_sampler(seed):
        return iter([*range(11)] * 9)

    alone, _ = batches(4, True, as_process, make_sampler=make_sampler)
    shared = [batches(4, True, as_process, r, 2, make_sampler)[0] for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shared)] == [sorted(batch) for batch in alone]


# The loader


class Marker:
    """An object in a record, for counting copies."""


@pytest.mark.parametrize(
    "sampler",
    [
        *("TrainingSampler", "RepeatFactorTrainingSampler", "WeightedCategoryTrainingSampler"),
        "UniformClassTrainingSampler",
    ],
)
def test_no_second_copy_of_the_records_is_kept(sampler, registered):
    """The loader stores them as one block of bytes."""
    marked = [{**record, "marker": Marker()} for record in records(CATEGORIES)]
    registered("marked", marked, thing_classes=["a", "b", "c"])
    options = ["DATASETS.TRAIN", "('marked',)", "DATALOADER.SAMPLER_TRAIN", sampler, "SEED", "1"]
    loader = TrainLoader(load_config("", [*options, "SOLVER.IMS_PER_BATCH", "2"]))
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, Marker)]
    assert len(alive) == len(CATEGORIES)  # those of the test itself
    assert isinstance(loader.samples.records[3]["marker"], Marker)


def one_class(record):
    instances = DatasetMapper(load_config("", []), is_train=True)(record)["instances"]
    instances.gt_classes[:] = 0
    return {"image": torch.zeros(3, 8, 8), "instances": instances}


@pytest.mark.parametrize("mapped", [True, False])
def test_classes_changed_by_a_mapper(mapped, tiny_coco):
    """A detector of one class, trained on data with two; without the mapper, the second class would
    count as background."""
    register_coco("two_classes", str(tiny_coco), str(tiny_coco.parent / "images"))
    options = ["DATASETS.TRAIN", "('two_classes',)", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    options += ["SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    try:
        cfg = load_config("", options)
        loader = TrainLoader(cfg, mapper=one_class) if mapped else TrainLoader(cfg)
        if mapped:
            next(iter(loader))
        else:
            with pytest.raises(StopTraining, match=r"has class 1, but the model has 1 classes"):
                next(iter(loader))
    finally:
        DatasetCatalog.remove("two_classes")
        MetadataCatalog.pop("two_classes", None)


# The end of training


@pytest.mark.slow
def test_an_error_in_the_last_iteration_is_not_followed_by_the_evaluation(
    tiny_coco, tmp_path, train_net_here
):
    content = json.loads(tiny_coco.read_text())
    images = tiny_coco.parent / "images"
    (tmp_path / "empty.jpg").write_bytes(b"")
    for image in content["images"]:
        image["file_name"] = str(tmp_path / "empty.jpg")
    (tmp_path / "empty.json").write_text(json.dumps(content))
    result = train_net_here(
        *("--register", "empty", tmp_path / "empty.json", images),
        *run(tiny_coco, tmp_path / "output", "DATASETS.TRAIN", "('empty',)"),
        *("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"),
    )
    assert_user_error(result, "empty.jpg")
    assert "Start inference" not in result.stdout


# Evaluators


class Counting(DatasetEvaluator):
    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        return {"counted": {"images": self.images}}


def test_the_evaluator_of_a_subclass(registered, tiny_coco):
    """For a dataset of a type that no other evaluator supports."""

    class Trainer(BalancedTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return Counting()

    register_coco("mine", str(tiny_coco), str(tiny_coco.parent / "images"))
    try:
        images = DatasetCatalog.get("mine")
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.pop("mine", None)
    registered("of_my_type", images, evaluator_type="my type")
    options = [*TINY_MODEL, "DATASETS.TRAIN", "('of_my_type',)", "DATASETS.TEST", "('of_my_type',)"]
    cfg = load_config(str(ROOT / TINY_CONFIG), [*options, "MODEL.DEVICE", "cpu"])
    assert Trainer.test(cfg, Trainer.build_model(cfg).eval()) == {"counted": {"images": 6}}
    with pytest.raises(UserError, match="'of_my_type' cannot be evaluated.*build_evaluator"):
        BalancedTrainer(cfg)


def write_stuff(folder, json_file):
    """Records for semantic segmentation, with the class of each pixel in a separate image."""
    images = json.loads(json_file.read_text())["images"]
    records = []
    for image in images:
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        labels[:, : image["width"] // 2] = 1
        file = folder / f"{image['id']}.png"
        cv2.imwrite(str(file), labels)
        name = str(json_file.parent / "images" / image["file_name"])
        sizes = {"height": image["height"], "width": image["width"]}
        records.append(
            {"file_name": name, "image_id": image["id"], "sem_seg_file_name": str(file), **sizes}
        )
    return records


@pytest.mark.slow
def test_semantic_segmentation(registered, tiny_coco, tmp_path, run_here):
    stuff = write_stuff(tmp_path, tiny_coco)
    metadata = {"stuff_classes": ["left", "right"], "ignore_label": 255}
    registered("stuff", stuff, evaluator_type="sem_seg", **metadata)
    result = run_here(
        *("train_net.py", "--config-file", "configs/Base-Small-RCNN-FPN.yaml"),
        *(*TINY_MODEL, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
        *("MODEL.BACKBONE.NAME", "build_balanced_resnet_fpn_backbone"),
        *("MODEL.BALANCED_FPN.ENABLED", "True", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"),
        *("DATASETS.TRAIN", "('stuff',)", "DATASETS.TEST", "('stuff',)"),
        *("OUTPUT_DIR", tmp_path / "output", "DATALOADER.NUM_WORKERS", "0"),
    )
    assert result.returncode == 0, result.stderr
    assert 0 < logged(tmp_path / "output")[-1]["sem_seg/mIoU"] <= 100


def test_panoptic_segmentation(registered, tiny_coco, tmp_path, monkeypatch):
    metadata = {"stuff_classes": ["left"], "thing_classes": ["a"], "ignore_label": 255}
    metadata.update(json_file=str(tiny_coco), panoptic_json=str(tiny_coco), panoptic_root="")
    ids = {"stuff_dataset_id_to_contiguous_id": {1: 0}, "thing_dataset_id_to_contiguous_id": {2: 0}}
    stuff = write_stuff(tmp_path, tiny_coco)
    registered("both", stuff, evaluator_type="coco_panoptic_seg", **metadata, **ids)
    evaluators = build_evaluator("both", str(tmp_path))._evaluators
    kinds = [type(evaluator) for evaluator in evaluators]
    assert kinds[0] is SemSegEvaluator and kinds[2] is COCOPanopticEvaluator
    monkeypatch.setitem(__import__("sys").modules, "panopticapi", None)
    with pytest.raises(UserError, match="'both'.*panopticapi.*pip install git"):
        check_packages(["both"])


# LazyConfigs


def lazy_of(tiny_coco, tmp_path, *options):
    sets = [f"dataloader.{part}.dataset.names=lazy_tiny" for part in ("train", "test")]
    workers = [f"dataloader.{part}.num_workers=0" for part in ("train", "test")]
    sizes = [
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ]
    return load_lazy_config(
        LAZY,
        [
            *(*sets, *workers, *sizes, "model.num_classes=2", "train.init_checkpoint=''"),
            *("train.device=cpu", f"train.output_dir={tmp_path}", "train.max_iter=6"),
            *("dataloader.train.total_batch_size=1", *options),
        ],
    )


@pytest.fixture
def lazy_data(tiny_coco):
    register_coco("lazy_tiny", str(tiny_coco), str(tiny_coco.parent / "images"))
    yield
    DatasetCatalog.remove("lazy_tiny")
    MetadataCatalog.pop("lazy_tiny", None)


def test_train_of_a_lazy_config(lazy_data, tiny_coco, tmp_path):
    lazy = lazy_of(
        tiny_coco,
        tmp_path,
        *("train.log_period=3", "train.checkpointer={period: 2, max_to_keep: 1}"),
        "train.ddp={find_unused_parameters: true, broadcast_buffers: true}",
    )
    lazy.model = {"_target_": f"{__name__}.Small", "num_classes": 2, "input_format": "BGR"}
    cfg = trainer_config(lazy)
    arguments = LazyTrainer.ddp_arguments(cfg)
    assert arguments["find_unused_parameters"] and arguments["broadcast_buffers"]
    cfg.TEST.NUM_IMAGES_SHOWN = 0
    trainer = LazyTrainer(cfg)
    trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, hooks.EvalHook)]
    trainer.train()
    assert [line["iteration"] for line in logged(tmp_path)] == [2, 5]
    # The latest periodic checkpoint, and the final one, which does not count.
    kept = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert kept == ["model_0000005.pth", "model_final.pth"]


class Small(nn.Module):
    """A model that can be trained on any image."""

    def __init__(self, num_classes, input_format):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return {"loss": (self.scale - inputs[0]["image"].float().mean() / 255) ** 2}


def test_ddp_arguments_reach_ddp(monkeypatch, tmp_path, lazy_data, tiny_coco):
    given = {}

    def create(model, **arguments):
        given.update(arguments)
        return model

    monkeypatch.setattr("detectron2.engine.defaults.create_ddp_model", create)
    lazy = lazy_of(tiny_coco, tmp_path, "train.ddp.find_unused_parameters=true")
    lazy.model = {"_target_": f"{__name__}.Small", "num_classes": 2, "input_format": "BGR"}
    LazyTrainer(trainer_config(lazy))
    expected = {"find_unused_parameters": True, "broadcast_buffers": False, "device_ids": None}
    assert given == expected


def test_what_train_of_a_lazy_config_may_have(lazy_data, tiny_coco, tmp_path):
    """Its values are those of the keys that YAML configs have, and work as they do."""
    lazy = lazy_of(
        tiny_coco,
        tmp_path,
        *("train.model_ema={enabled: true, decay: 0.5}", "train.accumulate=2"),
        *("train.early_stopping={patience: 1}", "train.best_checkpoint={metric: bbox/AP}"),
        *("train.eval_period=2", "dataloader.train.total_batch_size=2", "train.max_iter=8"),
    )
    lazy.model = {"_target_": f"{__name__}.Small", "num_classes": 2, "input_format": "BGR"}
    cfg = trainer_config(lazy)
    assert (cfg.SOLVER.EMA.DECAY, cfg.SOLVER.ACCUMULATE) == (0.5, 2)
    assert cfg.SOLVER.EARLY_STOPPING.METRIC == "bbox/AP" and not cfg.WANDB.ENABLED

    class Trainer(LazyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": 1.0}}

    Trainer(cfg).train()
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == 3  # after the second evaluation
    assert final["model_ema"]["num_updates"] == 4
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 1
    assert final["trainer"]["loader"]["position"] == 4

    with pytest.raises(UserError, match="train.model_ema has no device, only enabled, decay"):
        trainer_config(lazy_of(tiny_coco, tmp_path, "train.model_ema={device: cpu}"))


def test_the_evaluator_of_a_lazy_config(lazy_data, tiny_coco, tmp_path):
    lazy = lazy_of(tiny_coco, tmp_path)
    lazy.dataloader.evaluator = {"_target_": f"{__name__}.Counting"}
    cfg = trainer_config(lazy)
    assert LazyTrainer.test(cfg, LazyTrainer.build_model(cfg).eval())["counted"]["images"] == 6
    del lazy.dataloader["evaluator"]  # then chosen by the type of the dataset
    evaluator = LazyTrainer.build_evaluator(trainer_config(lazy), "lazy_tiny", str(tmp_path))
    assert type(evaluator).__name__ == "_COCOEvaluator"


def test_several_evaluators_of_a_lazy_config(lazy_data, tiny_coco, tmp_path):
    """In a list, as in Detectron2's coco_panoptic_separated.py."""
    coco = {"_target_": "detectron2.evaluation.COCOEvaluator", "tasks": ["bbox"]}
    coco |= {"dataset_name": "${...test.dataset.names}", "output_dir": f"{tmp_path}/mine"}
    lazy = lazy_of(tiny_coco, tmp_path)
    lazy.dataloader.evaluator = [{"_target_": f"{__name__}.Counting"}, coco]
    cfg = trainer_config(lazy)
    for names, folder in ((("lazy_tiny",), "mine"), (("lazy_tiny", "b"), "mine/lazy_tiny")):
        cfg.DATASETS.TEST = names
        several, _ = LazyTrainer.build_evaluator(cfg, "lazy_tiny")._evaluators
        several.reset()
        several.process([{"image_id": 1}], [{}])
        assert several.evaluate()["counted"] == {"images": 1}
        assert several._evaluators[1]._output_dir == f"{tmp_path}/{folder}"


def test_lazy_configs_have_what_detectron2s_program_reads():
    """``lazyconfig_train_net.py`` reads these, and passes the first two on unchanged."""
    for file in sorted((ROOT / "configs/COCO-Detection").glob("*.py")):
        lazy = load_lazy_config(str(file))
        assert set(lazy.train.ddp) <= {
            *("broadcast_buffers", "find_unused_parameters", "fp16_compression")
        }
        assert set(lazy.train.checkpointer) == {"period", "max_to_keep"}
        keys = ("output_dir", "init_checkpoint", "max_iter", "eval_period", "log_period", "device")
        assert lazy.train.keys() >= {*keys, "amp"} and "evaluator" in lazy.dataloader
