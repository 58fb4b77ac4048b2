"""How programs begin: classes by their names, files that exist, resumed trainings, OUTPUT_DIR."""

import copy
import json
import logging
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import CosineParamScheduler
from PIL import Image
from torch import nn

from balanced_d2 import load_config
from balanced_d2.checkpoint import BalancedCheckpointer, Contents, read_contents
from balanced_d2.config.resume import changes
from balanced_d2.config.yaml_config import set_by_hand
from balanced_d2.data.adapted import Change, adapt
from balanced_d2.data.checks.for_model import check_datasets
from balanced_d2.data.checks.image_files import missing_images
from balanced_d2.data.classes import join_classes, model_metadata
from balanced_d2.engine import argument_parser
from balanced_d2.engine.optimizer import settings_kept
from balanced_d2.engine.output_folder import move_aside
from balanced_d2.export import describe
from balanced_d2.utils.errors import UserError

from .conftest import (
    ROOT,
    TINY_CONFIG,
    TINY_MODEL,
    assert_user_error,
    cleaned_up,
    load_tool,
    logged,
)

MODEL = TINY_MODEL[2:]  # without the number of classes
assert TINY_MODEL[0] == "MODEL.ROI_HEADS.NUM_CLASSES"


def command(train, test, output, *options, sets=("test",)):
    return [
        *("--register", "train", train, train.parent / "images"),
        *(part for name in sets for part in ("--register", name, test, test.parent / "images")),
        *MODEL,
        *("DATASETS.TRAIN", "('train',)", "DATASETS.TEST", repr(tuple(sets))),
        *("OUTPUT_DIR", output, "SEED", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
        *("TEST.NUM_IMAGES_SHOWN", "0", *options),
    ]


def changed(json_file, name, change):
    """A copy of an annotation file, beside it, with a change of its content."""
    content = json.loads(json_file.read_text())
    change(content)
    path = json_file.with_name(f"{name}.json")
    path.write_text(json.dumps(content))
    return path


def swap(content):
    """The categories in the other order."""
    for category in content["categories"]:
        category["id"] = 3 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 3 - annotation["category_id"]


def only_dark(content):
    content["categories"] = content["categories"][1:]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 2]


def detections(output, *folder):
    file = output.joinpath("inference", *folder, "coco_instances_results.json")
    found = json.loads(file.read_text())
    return sorted((d["image_id"], d["category_id"], d["score"], *d["bbox"]) for d in found)


@pytest.fixture(scope="module")
def trained(tiny_coco, tmp_path_factory):
    """A training of two iterations, with an evaluation, whose NUM_CLASSES nobody has set."""
    output = tmp_path_factory.mktemp("start") / "output"
    arguments = ["--config-file", ROOT / TINY_CONFIG, *command(tiny_coco, tiny_coco, output)]
    with cleaned_up():
        load_tool("train_net", ".").main(argument_parser().parse_args(list(map(str, arguments))))
    return output


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """Catalogs that are undone afterwards; a function that registers records of an image."""
    file = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(file)
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", copy.copy(catalog.data))

    def register(name, records, **metadata):
        DatasetCatalog.register(
            name, lambda: [{**copy.deepcopy(record), "file_name": str(file)} for record in records]
        )
        MetadataCatalog.get(name).set(**metadata)

    return register


# Classes


def test_the_number_of_classes_follows_from_the_data(trained):
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    content = torch.load(trained / "model_final.pth", weights_only=True)
    assert content["class_names"] == ["bright", "dark"]
    assert yaml.safe_load(content["config"]) == written


def test_keys_that_are_set_by_hand(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {RETINANET: {NUM_CLASSES: 3}}")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7}")
    keys = set_by_hand(str(tmp_path / "own.yaml"), ["SEED", "1", "OUTPUT_DIR", "x"])
    assert keys == {"MODEL.RETINANET.NUM_CLASSES", "SOLVER.MAX_ITER", "SEED", "OUTPUT_DIR"}
    assert set_by_hand("") == set()


@pytest.mark.slow
def test_evaluation_of_data_in_another_order(trained, tiny_coco, tmp_path, train_net_here):
    """The same detections, by the other file's ids, and the same AP for each name."""
    weights = ("MODEL.WEIGHTS", trained / "model_final.pth")
    metrics = {}
    for name, change in (("same", lambda content: None), ("swapped", swap), ("dark", only_dark)):
        test = changed(tiny_coco, name, change)
        run = command(tiny_coco, test, tmp_path / name, "DATASETS.TRAIN", "()", *weights)
        result = train_net_here("--eval-only", *run)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.split("Per-category bbox AP:")[1:]
        pattern = r"\| (bright|dark) +\| ([\d.na]+)"
        metrics[name] = dict(re.findall(pattern, lines[0])) if lines else {}
    same = detections(tmp_path / "same")
    assert same == detections(trained) and {d[1] for d in same} == {1, 2}
    swapped = [(image, 3 - category, *rest) for image, category, *rest in same]
    assert detections(tmp_path / "swapped") == sorted(swapped)
    assert set(metrics["same"]) == {"bright", "dark"} and metrics["swapped"] == metrics["same"]
    # A test set of one of the classes: detections of the other do not count.
    assert detections(tmp_path / "dark") == [d for d in same if d[1] == 2]


def test_a_test_class_that_the_model_lacks(trained, tiny_coco, tmp_path, train_net_here):
    test = changed(tiny_coco, "other", lambda c: c["categories"][0].update(name="bird"))
    weights = ("MODEL.WEIGHTS", trained / "model_final.pth")
    result = train_net_here("--eval-only", *command(tiny_coco, test, tmp_path / "out", *weights))
    assert_user_error(result, "'test'", "does not have 1 of its classes (bird)", "bright, dark")
    result = train_net_here(*command(tiny_coco, test, tmp_path / "out"))
    assert_user_error(result, "'test'", "does not have 1 of its classes (bird)")
    assert not (tmp_path / "out").exists()  # nothing is written before all checks


def test_weights_of_another_number_of_classes(trained, tiny_coco, tmp_path, train_net_here):
    options = ("MODEL.WEIGHTS", trained / "model_final.pth", "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    run = command(tiny_coco, tiny_coco, tmp_path / "out", *options)
    assert_user_error(train_net_here("--eval-only", *run), "NUM_CLASSES is 3", "(bright, dark)")


def test_weights_that_leave_parts_random(trained, tiny_coco, tmp_path, train_net_here):
    content = torch.load(trained / "model_final.pth", weights_only=True)
    del content["model"]["roi_heads.box_head.fc1.weight"]
    torch.save(content, tmp_path / "part.pth")
    run = command(tiny_coco, tiny_coco, tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "part.pth")
    assert_user_error(train_net_here("--eval-only", *run), "part.pth", "fc1.weight is missing")


def test_two_classes_of_one_name(tiny_coco, tmp_path, train_net_here):
    twice = changed(tiny_coco, "twice", lambda c: c["categories"][0].update(name="dark"))
    result = train_net_here(*command(twice, tiny_coco, tmp_path))
    assert_user_error(result, "data set 'train'", "'dark' (categories 1, 2); refused")


def test_joined_classes():
    data = {"a": ["cat", "dog"], "b": ["bird", "Dog"], "c": ["cat"]}
    assert join_classes(data) == ["cat", "dog", "bird"]
    assert join_classes({}) == []
    with pytest.raises(UserError, match="'b': 'dog' and 'Dog' are both the model's class 'dog'"):
        join_classes({"a": ["dog"], "b": ["dog", "Dog"]})


def records(*categories):
    annotations = [{"bbox": [0, 0, 9, 9], "bbox_mode": 0, "category_id": c} for c in categories]
    return [{"width": 9, "height": 9, "annotations": annotations}]


def test_training_sets_of_different_classes(registered):
    registered("first", records(0, 1), thing_classes=["cat", "dog"])
    registered("second", records(0, 1, 1), thing_classes=["bird", "cat"])
    cfg = load_config("", ["DATASETS.TRAIN", "('first', 'second')"])
    data = check_datasets(cfg, number_follows=True)
    assert data.classes == ["cat", "dog", "bird"] and data.class_counts == [3, 1, 1]
    for name, change in data.changes.items():
        adapt(name, change, data.classes)
    categories = {}
    for name in ("first", "second"):
        for _ in range(2):  # each load starts from the file's own numbers
            (record,) = DatasetCatalog.get(name)
            categories[name] = [a["category_id"] for a in record["annotations"]]
        assert MetadataCatalog.get(name).thing_classes == data.classes
    assert categories == {"first": [0, 1], "second": [2, 0, 0]}
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with pytest.raises(UserError, match="'first', 'second' together have 3 classes.* is 2"):
        check_datasets(cfg)


def test_resumed_data_keep_the_order_of_the_checkpoint(registered):
    registered("mine", records(0, 1), thing_classes=["cat", "dog"])
    cfg = load_config("", ["DATASETS.TRAIN", "('mine',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"])
    data = check_datasets(cfg, known=["dog", "cat"])
    assert data == (["dog", "cat"], {"mine": Change([1, 0], frozenset())}, [], [1, 1])
    for known, message in (
        (["dog", "fish"], r"\(new: cat; gone: fish\)"),
        (["dog", "cat", "fish"], r"\(new: none; gone: fish\)"),
    ):
        with pytest.raises(UserError, match=f"other classes than the weights {message}.*WEIGHTS"):
            check_datasets(cfg, known=known)


def test_category_ids_of_adapted_data(registered):
    """Detectron2's evaluator needs one for every class of the model."""
    ids = {7: 0, 3: 1}
    registered("mine", records(0, 1), thing_classes=["c", "a"])
    MetadataCatalog.get("mine").thing_dataset_id_to_contiguous_id = ids
    adapt("mine", Change([2, 0]), ["a", "b", "c", "d"])
    DatasetCatalog.get("mine")
    adapted = MetadataCatalog.get("mine").thing_dataset_id_to_contiguous_id
    assert adapted == {7: 2, 3: 0, 8: 1, 9: 3} and ids == {7: 0, 3: 1}


def test_evaluations_that_number_the_classes_themselves(registered):
    registered("mine", records(0, 1), thing_classes=["b", "a"], evaluator_type="lvis")
    cfg = load_config("", ["DATASETS.TEST", "('mine',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"])
    check_datasets(cfg, train=False, known=["b", "a"])
    with pytest.raises(UserError, match="'mine' has the classes b, a, but the model a, b.*lvis"):
        check_datasets(cfg, train=False, known=["a", "b"])


def test_names_of_the_weights_are_those_that_are_drawn_and_exported(registered):
    cfg = load_config(TINY_CONFIG, [*TINY_MODEL, "DATASETS.TEST", "('mine',)"])
    cfg.DATASETS.TRAIN = ()
    assert model_metadata(cfg, ["a", "b"]).thing_classes == ["a", "b"]
    colors = [(0, 0, 0), (9, 9, 9)]
    registered("mine", records(0), thing_classes=["b", "a"], thing_colors=colors, other=1)
    metadata = model_metadata(cfg, ["a", "b"])
    assert metadata.thing_classes == ["a", "b"] and metadata.other == 1
    assert metadata.get("thing_colors") is None
    assert model_metadata(cfg, ["b", "a"]).thing_colors == colors
    assert describe(cfg, ["a", "b"])["class_names"] == ["a", "b"]
    assert describe(cfg)["class_names"] == ["b", "a"]
    with pytest.raises(UserError, match=r"does not have 1 of its classes \(b\)"):
        model_metadata(cfg, ["a", "c"])


def test_what_weights_say_of_their_classes(tmp_path):
    rows = {"roi_heads.box_predictor.cls_score.weight": np.zeros((81, 2), np.float32)}
    for author, number, known in (("Detectron2 Model Zoo", 80, True), ("me", 80, False)):
        file = tmp_path / "x.pkl"
        file.write_bytes(pickle.dumps({"model": rows, "__author__": author}))
        contents = read_contents(str(file))
        assert contents.num_classes == number
        assert (contents.class_names or [None])[0] == ("person" if known else None)
    tensors = {name: torch.from_numpy(rows) for name, rows in rows.items()}
    torch.save({"model": tensors, "class_names": ["a"]}, tmp_path / "x.pth")
    assert read_contents(str(tmp_path / "x.pth")) == Contents(None, 80)  # names of something else
    for config in ({"lr": 1}, "some.yaml", "lr: 1\n"):  # of other projects
        torch.save({"model": tensors, "config": config, "iteration": "7"}, tmp_path / "x.pth")
        assert read_contents(str(tmp_path / "x.pth")) == Contents(None, 80)
    config = load_config(TINY_CONFIG).dump()
    torch.save({"model": tensors, "config": config, "iteration": 7}, tmp_path / "x.pth")
    assert read_contents(str(tmp_path / "x.pth")) == Contents(None, 80, config, iteration=7)
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot load the checkpoint .*x.pth"):
        read_contents(str(tmp_path / "x.pth"))


# Files


def test_missing_images(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "c.jpg").mkdir()
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "no/d.jpg")]
    found = missing_images([{"file_name": p} for p in (*paths, "s3://bucket/e.jpg")] + [{}])
    assert list(found.values()) == paths[1:]
    masks = missing_images([{"file_name": paths[0], "sem_seg_file_name": paths[1]}])
    assert masks == {paths[0]: paths[1]}


def lose(number):
    def change(content):
        content["images"][number]["file_name"] = "gone.jpg"

    return change


def drop(number):
    def change(content):
        lost = content["images"].pop(number)["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != lost]

    return change


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_images_are_refused(part, tiny_coco, tmp_path, train_net_here):
    broken = changed(tiny_coco, f"lost_{part}", lose(2))
    files = {"train": tiny_coco, "test": tiny_coco, part: broken}
    result = train_net_here(*command(files["train"], files["test"], tmp_path / "out"))
    assert_user_error(result, f"'{part}'", "1 image file(s) do not exist", "gone.jpg", "SKIP_BAD")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_missing_images_are_left_out(trained, tiny_coco, tmp_path, train_net_here):
    """Trained and evaluated as if they were not in the files."""
    results = []
    for name, change in (("lost", lose(1)), ("dropped", drop(1))):
        data = changed(tiny_coco, name, change)
        run = command(data, data, tmp_path / name, "DATALOADER.SKIP_BAD_IMAGES", "True")
        result = train_net_here(*run)
        assert result.returncode == 0, result.stderr
        warnings = [line for line in result.stdout.splitlines() if "left out 1 image(s)" in line]
        assert len(warnings) == (2 if name == "lost" else 0)
        model = torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        metrics = {k: v for k, v in logged(tmp_path / name)[-1].items() if k.startswith("bbox")}
        results.append((model, metrics, detections(tmp_path / name)))
    (model, *rest), (other, *other_rest) = results
    assert all(torch.equal(value, other[key]) for key, value in model.items())
    assert repr(rest) == repr(other_rest)  # NaN are equal


# Output folders


def test_several_test_sets_keep_their_results_apart(trained, tiny_coco, tmp_path, train_net_here):
    weights = ("MODEL.WEIGHTS", trained / "model_final.pth")
    run = command(tiny_coco, tiny_coco, tmp_path, *weights, sets=("one", "two"))
    result = train_net_here("--eval-only", *run)
    assert result.returncode == 0, result.stderr
    assert detections(tmp_path, "one") == detections(tmp_path, "two") == detections(trained)
    assert sorted(path.name for path in (tmp_path / "inference").iterdir()) == ["one", "two"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("is_link", [False, True])
def test_a_training_that_is_moved_aside(tmp_path, is_link):
    """What a link leads to is moved, and the link leads to the new training."""
    output = tmp_path / "output"
    place = tmp_path / "large_disk" / "place" if is_link else output
    place.mkdir(parents=True)
    if is_link:
        output.symlink_to(place)
    BalancedCheckpointer(nn.Linear(1, 1), str(output)).save("model_final", iteration=1)
    before = contents(place)
    move_aside(str(output))
    (aside,) = (path for path in place.parent.glob("*_20*") if path != output)
    assert contents(aside) == before and output.is_symlink() == is_link
    assert output.is_dir() and not list(place.iterdir())


@pytest.mark.slow
def test_a_used_output_folder(tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    run = command(tiny_coco, tiny_coco, output, "DATASETS.TEST", "()")
    output.mkdir()
    (output / "log.txt").write_text("of a run that was refused\n")
    assert train_net_here(*run).returncode == 0
    before = contents(output)
    assert_user_error(train_net_here(*run), "holds a training (model_final.pth)", "--overwrite")
    inside = ("MODEL.WEIGHTS", output / "model_final.pth")
    assert_user_error(train_net_here("--overwrite", *run, *inside), "would move", "model_final.pth")
    assert_user_error(train_net_here("--overwrite", "--resume", *run), "leave one out")
    other = tmp_path / "other.pth"
    torch.save({"model": {"backbone.fpn_lateral2.weight": torch.zeros(3, 2, 1, 1)}}, other)
    unfit = ("MODEL.WEIGHTS", other)
    assert_user_error(train_net_here("--overwrite", *run, *unfit), str(other), "nothing fits")
    other.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert contents(output)["log.txt"].splitlines() == before["log.txt"].splitlines()
    assert contents(output) == before

    result = train_net_here("--overwrite", *run)
    assert result.returncode == 0, result.stderr
    (aside,) = (path for path in tmp_path.iterdir() if path != output)
    assert aside.name.startswith("output_20") and str(aside) in result.stdout
    assert contents(aside) == before
    assert "the older training is now in" in (output / "log.txt").read_text()
    assert (output / "model_final.pth").is_file()


# Resuming


def test_which_settings_may_change():
    old = load_config(TINY_CONFIG, [*TINY_MODEL, "SOLVER.STEPS", "(1,)"])
    new = load_config(
        TINY_CONFIG,
        [
            *(*TINY_MODEL, "SOLVER.STEPS", "(2,)", "SOLVER.BASE_LR", "0.5", "OUTPUT_DIR", "other"),
            *("MODEL.WEIGHTS", "x.pth", "MODEL.DEVICE", "cpu", "MODEL.RPN.NMS_THRESH", "0.6"),
            *("MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.4", "DATASETS.TRAIN", "('other',)"),
            *("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random", "SOLVER.IMS_PER_BATCH", "4"),
            *("DATALOADER.NUM_WORKERS", "3"),
        ],
    )
    found = changes(old.dump(), new)
    assert found.applied == {
        "SOLVER.STEPS": ([1], [2]),
        "SOLVER.BASE_LR": (0.03, 0.5),
        "MODEL.DEVICE": ("cuda", "cpu"),
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": (0.5, 0.4),
        "DATALOADER.NUM_WORKERS": (0, 3),
    }
    assert found.refused == {
        "MODEL.RPN.NMS_THRESH": (0.7, 0.6),
        "DATASETS.TRAIN": (["bccd_train"], ["other"]),
        "MODEL.ROI_HEADS.NEGATIVE_SAMPLER": ("iou_balanced", "random"),
        "SOLVER.IMS_PER_BATCH": (2, 4),
    }
    assert changes(old.dump(), old) == ({}, {})
    assert changes("SOLVER: {BASE_LR: 7}", old).applied == {"SOLVER.BASE_LR": (7, 0.03)}


def test_a_resumed_training_that_is_beyond_its_end(trained, tiny_coco, tmp_path, train_net_here):
    """Refused before the scheduler is asked for a rate after its end."""
    shutil.copytree(trained, tmp_path / "output")
    run = command(tiny_coco, tiny_coco, tmp_path / "output", "DATASETS.TEST", "()")
    written = (tmp_path / "output" / "config.yaml").read_text()
    result = train_net_here("--resume", *run, "SOLVER.MAX_ITER", "1")
    assert_user_error(result, "MAX_ITER (train.max_iter) is 1", "has made 2 iterations")
    assert (tmp_path / "output" / "config.yaml").read_text() == written
    wrong = ("SOLVER.IMS_PER_BATCH", "3", "SOLVER.REFERENCE_WORLD_SIZE", "2")
    result = train_net_here("--resume", *run, *wrong)
    assert_user_error(result, "has to be a multiple of SOLVER.REFERENCE_WORLD_SIZE, 2")
    # Which it has reached; or 4, which is said for four processes that share them.
    scaled = ("SOLVER.MAX_ITER", "1", "SOLVER.REFERENCE_WORLD_SIZE", "4")
    for options in (("SOLVER.MAX_ITER", "2"), (*scaled, "SOLVER.IMS_PER_BATCH", "8")):
        result = train_net_here("--resume", *run, *options)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_resume_with_other_settings(trained, tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    no_test = ("DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "6")
    run = command(tiny_coco, tiny_coco, output, *no_test)
    assert train_net_here(*run).returncode == 0
    for name in ("model_final", "model_0000005"):
        (output / f"{name}.pth").unlink()
    written = (output / "config.yaml").read_text()
    for option, value in (("SOLVER.IMS_PER_BATCH", "3"), ("MODEL.FPN.OUT_CHANNELS", "32")):
        result = train_net_here("--resume", *run, option, value)
        assert_user_error(result, "--resume", option, f"→ {value}", "MODEL.WEIGHTS", "0000003.pth")
        assert (output / "config.yaml").read_text() == written
    other = ("SOLVER.BASE_LR", "0.0001", "SOLVER.WEIGHT_DECAY", "0.3", "SEED", "9")
    other += ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(5,)")
    result = train_net_here("--resume", *run, *other)
    assert result.returncode == 0, result.stderr
    text = (output / "log.txt").read_text()
    assert "SOLVER.BASE_LR: 0.03 → 0.0001" in text and "WEIGHT_DECAY: 0.0001 → 0.3" in text
    assert "SEED stays 1" in text
    now = yaml.safe_load((output / "config.yaml").read_text())
    assert now["SOLVER"]["BASE_LR"] == 0.0001 and now["SEED"] == 1
    content = torch.load(output / "model_final.pth", weights_only=True)
    groups = content["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.0001}
    assert 0.3 in {group["weight_decay"] for group in groups}
    rates = [line["lr"] for line in logged(output) if line["iteration"] == 5]
    assert rates[-1] == pytest.approx(0.00001)


def optimizer_and_scheduler(rate, momentum=0.9, num_iterations=10):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    return optimizer, LRMultiplier(optimizer, CosineParamScheduler(1, 0), num_iterations)


@pytest.mark.parametrize("rate, num_iterations", [(0.1, 10), (0.3, 10), (0.1, 20)])
def test_settings_of_a_resumed_optimizer(rate, num_iterations):
    first, schedule = optimizer_and_scheduler(0.1)
    for _ in range(3):
        first.step()  # without gradients, as below
        schedule.step()
    optimizer, scheduler = optimizer_and_scheduler(rate, 0.5, num_iterations)
    scheduler.load_state_dict(schedule.state_dict())
    with settings_kept(optimizer, scheduler):
        optimizer.load_state_dict(first.state_dict())
    (group,) = optimizer.param_groups
    expected = rate * 0.5 * (1 + np.cos(np.pi * 3 / num_iterations))
    assert group["lr"] == pytest.approx(expected) and group["momentum"] == 0.5
    if (rate, num_iterations) == (0.1, 10):
        assert group["lr"] == first.param_groups[0]["lr"]  # to the bit
    optimizer.step()
    scheduler.step()
    expected = rate * 0.5 * (1 + np.cos(np.pi * 4 / num_iterations))
    assert group["lr"] == pytest.approx(expected)


def test_resume_stays_with_the_training_that_was_written_last(tmp_path, caplog):
    checkpointer = BalancedCheckpointer(nn.Linear(2, 2), str(tmp_path))
    for iteration, name, seed in ((9, "model_final", 1), (1, "model_0000001", 2)):
        checkpointer.save(name, iteration=iteration, trainer={"loader": {"seed": seed}})
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")  # damaged
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert "last_checkpoint names model_0000003.pth" in caplog.text


def test_a_checkpoint_of_another_model_is_not_resumed(tmp_path):
    BalancedCheckpointer(nn.Linear(2, 2), str(tmp_path)).save("model_final", iteration=1)
    with pytest.raises(UserError, match=r"weight has shape \(2, 2\), not \(3, 2\)"):
        BalancedCheckpointer(nn.Linear(2, 3), str(tmp_path)).resume_or_load("", resume=True)
