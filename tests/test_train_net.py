"""train_net.py and tools/contact_sheet.py as users call them: small real runs, and mistakes."""

import copy
import json
import math
import re
import shutil

import cv2
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from balanced_d2.utils.errors import UserError
from balanced_d2.visualization import draw_contact_sheet

from .conftest import TINY_MODEL, assert_user_error, logged, run_program, train_net

COMPONENTS_OFF = [
    *("MODEL.BALANCED_FPN.ENABLED", "False"),
    *("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random"),
    *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"),
]


def tiny_run(json_file, output, *more):
    return [
        *("--register", "tiny", json_file, json_file.parent / "images"),
        *more,
        *TINY_MODEL,
        *("DATASETS.TRAIN", "('tiny',)"),
        *("DATASETS.TEST", "('tiny',)"),
        *("OUTPUT_DIR", output),
        *("SEED", "1"),
    ]


@pytest.fixture(scope="module")
def trained(tiny_coco, tmp_path_factory):
    """A finished run of two iterations with evaluation: the process's result, and the folder."""
    output = tmp_path_factory.mktemp("trained") / "output"
    result = train_net(*tiny_run(tiny_coco, output))
    assert result.returncode == 0, result.stderr
    return result, output


def test_training_evaluates_logs_and_saves(trained):
    result, output = trained
    text = result.stdout + result.stderr
    assert text.count("no CUDA on this machine") == (0 if torch.cuda.is_available() else 1)
    assert "Evaluation results for tiny" in text
    assert "torch.jit" not in result.stderr
    assert "bbox/AP" in logged(output)[-1]
    (last,) = (line for line in logged(output) if "total_loss" in line)
    assert last["iteration"] == 1
    for k in range(3):
        assert 0 <= last[f"roi_head/num_neg_bin{k}"] <= last[f"roi_head/num_neg_bin{k}_available"]
    total = sum(last[f"roi_head/num_neg_bin{k}"] for k in range(3))
    assert total == last["roi_head/num_bg_samples"]
    for name in ("model_final.pth", "config.yaml", "log.txt", "last_checkpoint"):
        assert (output / name).is_file()
    assert "no CUDA" in (output / "log.txt").read_text() or torch.cuda.is_available()
    assert not re.search("evaluating|checking data", result.stderr)  # bars are for terminals
    (events,) = output.glob("events.out.tfevents.*")
    shown = EventAccumulator(str(events))
    shown.Reload()
    assert shown.Tags()["images"] == ["tiny/1", "tiny/3", "tiny/4", "tiny/6"]
    assert "roi_head/num_neg_bin2" in shown.Tags()["scalars"]


def test_eval_only_repeats_the_evaluation(trained, tiny_coco, tmp_path, train_net_here):
    _, output = trained
    weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
    result = train_net_here(*tiny_run(tiny_coco, tmp_path, "--eval-only"), *weights)
    assert result.returncode == 0, result.stderr
    detections = [
        json.loads((folder / "inference" / "coco_instances_results.json").read_text())
        for folder in (output, tmp_path)
    ]
    assert detections[0] == detections[1]
    assert not (tmp_path / "metrics.json").exists()


def test_resume_continues_optimizer_and_scheduler(trained, tiny_coco, tmp_path, train_net_here):
    shutil.copytree(trained[1], tmp_path / "output")
    output = tmp_path / "output"
    result = train_net_here(
        *tiny_run(tiny_coco, output, "--resume"), "SOLVER.MAX_ITER", "4", "DATASETS.TEST", "()"
    )
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 2" in result.stdout
    assert "no optimizer state" not in result.stdout
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3
    assert checkpoint["trainer"]["_trainer"]["optimizer"]["state"]
    # Iteration 3 of a cosine over 4, not the start of a new schedule.
    (rate,) = (line["lr"] for line in logged(output) if line["iteration"] == 3 and "lr" in line)
    assert rate == pytest.approx(0.03 * (1 + math.cos(math.pi * 3 / 4)) / 2, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("balances", [[], COMPONENTS_OFF], ids=["balanced", "plain"])
def test_same_seed_same_model(trained, tiny_coco, tmp_path, train_net_here, balances):
    """The balanced model in this process and in another, where it was evaluated too."""
    weights = []
    for output in (tmp_path / "a", tmp_path / "b" if balances else trained[1]):
        if output != trained[1]:
            run = tiny_run(tiny_coco, output)
            result = train_net_here(*run, *balances, "DATASETS.TEST", "()")
            assert result.returncode == 0, result.stderr
        checkpoint = torch.load(output / "model_final.pth", weights_only=True)
        weights.append(checkpoint["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_bccd_as_registered(bccd_root, tmp_path):
    result = train_net(
        *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "1"),
        *("DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(120,)", "OUTPUT_DIR", tmp_path),
        env={"DETECTRON2_DATASETS": str(bccd_root)},
    )
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stdout.splitlines() if "dropped" in line]
    assert "dropped 1 annotation(s)" in warning and "annotation 2288" in warning


@pytest.mark.slow
def test_contact_sheet(trained, tiny_coco, tmp_path, run_here):
    predictions = trained[1] / "inference" / "coco_instances_results.json"
    sheet = tmp_path / "sheets" / "sheet.png"
    arguments = [
        *("--dataset", "tiny", "--output", sheet, "--num-images", "4"),
        *("--register", "tiny", tiny_coco, tiny_coco.parent / "images"),
    ]
    result = run_program("tools/contact_sheet.py", predictions, *arguments, "--threshold", "0.1")
    assert result.returncode == 0, result.stderr
    image = cv2.imread(str(sheet))
    assert image is not None and image.shape[1] > 3 * 2 * 320 and image.std() > 10

    result = run_here("tools/contact_sheet.py", tmp_path / "none.json", *arguments)
    assert_user_error(result, "none.json", "No such file")
    other = tmp_path / "other.json"
    other.write_text('[{"image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]')
    assert_user_error(run_here("tools/contact_sheet.py", other, *arguments), "image 77")


def test_mistakes_at_a_contact_sheet(tiny_coco, tmp_path, run_here):
    """All are found before anything is drawn."""
    predictions = tmp_path / "predictions.json"
    predictions.write_text("[]")

    def draw(output, *more):
        data = ("--register", "tiny", tiny_coco, tiny_coco.parent / "images", "--dataset", "tiny")
        return run_here("tools/contact_sheet.py", predictions, "--output", output, *data, *more)

    assert_user_error(draw(tmp_path / "a.xyz"), "a.xyz", "has to end in", ".png")
    assert_user_error(draw(tmp_path / "a.svg"), "a.svg", "has to end in", ".png")
    assert_user_error(draw(predictions / "a.png"), "cannot write to the folder", "json")
    for number in ("0", "-1"):
        result = draw(tmp_path / "a.png", "--num-images", number)
        assert_user_error(result, f"--num-images is {number}", "at least 1")
    for name in ("coco_2017_val", "voc_2007_val"):  # whose loaders do not say what is missing
        result = draw(tmp_path / "a.png", "--dataset", name)
        assert_user_error(result, name, "does not exist (built-in datasets are expected in")
    assert draw(tmp_path / "sheet", "--num-images", "1").returncode == 0
    assert cv2.imread(str(tmp_path / "sheet" / "contact_sheet.png")).std() > 10


def test_a_contact_sheet_of_a_dataset_without_ids(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", copy.copy(catalog.data))
    DatasetCatalog.register("no_ids", lambda: [{"file_name": "a.jpg", "image_id": 1}])
    MetadataCatalog.get("no_ids").thing_classes = ["a"]
    with pytest.raises(UserError, match="'no_ids' is not in COCO's format"):
        draw_contact_sheet("no_ids", [])


def empty(folder):
    """A file of weights that says nothing of its model."""
    torch.save({"model": {}}, folder / "empty.weights")
    return folder / "empty.weights"


def broken_json(folder):
    (folder / "images").mkdir()
    path = folder / "broken.json"
    path.write_text('{"images": [')
    return path


# What a user can get wrong: arguments (from the dataset's JSON file and an empty folder), and what
# the message has to contain.
MISTAKES = {
    "unknown config file": (
        lambda json_file, tmp: {"config": "configs/nowhere.yaml", "arguments": []},
        ["configs/nowhere.yaml"],
    ),
    "unknown key": (
        lambda json_file, tmp: {"arguments": ["MODEL.ROI_HEADS.NUM_BIN", "3"]},
        ["MODEL.ROI_HEADS.NUM_BIN", "did you mean MODEL.ROI_HEADS.NUM_BINS?"],
    ),
    "key without value": (
        lambda json_file, tmp: {"arguments": ["SEED"]},
        ["'SEED' has no value"],
    ),
    "wrong type": (
        lambda json_file, tmp: {"arguments": ["DATASETS.TRAIN", "bccd_train"]},
        ["DATASETS.TRAIN", "tuple"],
    ),
    "no bins": (
        lambda json_file, tmp: {
            "arguments": [*tiny_run(json_file, tmp), "MODEL.ROI_HEADS.NUM_BINS", "0"]
        },
        ["MODEL.ROI_HEADS.NUM_BINS"],
    ),
    "unknown refine type": (
        lambda json_file, tmp: {
            "arguments": [*tiny_run(json_file, tmp), "MODEL.BALANCED_FPN.REFINE_TYPE", "nonlocal"]
        },
        ["MODEL.BALANCED_FPN.REFINE_TYPE", "nonlocal", "non_local"],
    ),
    "refine level outside the levels": (
        lambda json_file, tmp: {
            "arguments": [*tiny_run(json_file, tmp), "MODEL.BALANCED_FPN.REFINE_LEVEL", "5"]
        },
        ["MODEL.BALANCED_FPN.REFINE_LEVEL", "5 levels"],
    ),
    "unregistered dataset": (
        lambda json_file, tmp: {"arguments": ["DATASETS.TRAIN", "('mine',)", "OUTPUT_DIR", tmp]},
        ["'mine' is not registered", "--register"],
    ),
    "missing annotation file": (
        lambda json_file, tmp: {"arguments": tiny_run(tmp / "gone.json", tmp)},
        ["'tiny'", "gone.json does not exist"],
    ),
    "missing image folder": (
        lambda json_file, tmp: {
            "arguments": [
                *("--register", "own", json_file, tmp / "gone", "--eval-only"),
                *("DATASETS.TEST", "('own',)", "OUTPUT_DIR", tmp, "MODEL.WEIGHTS", empty(tmp)),
            ]
        },
        ["'own'", "gone does not exist"],
    ),
    "broken JSON": (
        lambda json_file, tmp: {"arguments": tiny_run(broken_json(tmp), tmp)},
        ["'tiny'", "broken.json", "not a valid annotation file"],
    ),
    "wrong number of classes": (
        lambda json_file, tmp: {
            "arguments": [*tiny_run(json_file, tmp), "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
        },
        ["'tiny' has 2 classes", "MODEL.ROI_HEADS.NUM_CLASSES is 3"],
    ),
    "nothing to evaluate": (
        lambda json_file, tmp: {"arguments": tiny_run(json_file, tmp, "--eval-only")},
        ["MODEL.WEIGHTS", "--resume"],
    ),
    "missing weights": (
        lambda json_file, tmp: {
            "arguments": [*tiny_run(json_file, tmp), "MODEL.WEIGHTS", tmp / "gone.pth"]
        },
        ["MODEL.WEIGHTS", "gone.pth"],
    ),
    "several processes on a CPU": (
        lambda json_file, tmp: {"arguments": ["--num-gpus", "2"]},
        ["--num-gpus", "CUDA"],
    ),
}


@pytest.mark.parametrize("make, parts", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_reported(make, parts, tiny_coco, tmp_path, train_net_here):
    case = make(tiny_coco, tmp_path)
    if "--num-gpus" in case["arguments"] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert_user_error(train_net_here(*case.pop("arguments"), **case), *parts)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
def test_a_mistake_ends_the_program(tiny_coco, tmp_path):
    make, parts = MISTAKES["wrong number of classes"]
    assert_user_error(train_net(*make(tiny_coco, tmp_path)["arguments"]), *parts)


def test_a_refused_run_leaves_an_existing_config_alone(tiny_coco, tmp_path, train_net_here):
    options = ["--register", "kept", tiny_coco, tiny_coco.parent / "images", *TINY_MODEL]
    output = tmp_path / "output"
    options += ["OUTPUT_DIR", output, "DATASETS.TRAIN", "('kept',)", "DATASETS.TEST", "()"]
    assert train_net_here(*options).returncode == 0
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    wrong = ("MODEL.ROI_HEADS.NUM_CLASSES", "7")
    for how in ("--overwrite", "--resume"):
        assert_user_error(train_net_here(how, *options, *wrong), "NUM_CLASSES is 7")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == written
    assert list(tmp_path.iterdir()) == [output]


def test_resume_does_not_need_the_initial_weights(tiny_coco, tmp_path, train_net_here):
    options = ["--register", "goes_on", tiny_coco, tiny_coco.parent / "images", *TINY_MODEL]
    options += ["OUTPUT_DIR", tmp_path / "a", "DATASETS.TRAIN", "('goes_on',)"]
    options += ["DATASETS.TEST", "()"]
    assert train_net_here(*options).returncode == 0
    gone = ["MODEL.WEIGHTS", tmp_path / "gone.pth", "SOLVER.MAX_ITER", "3"]
    assert train_net_here("--resume", *options, *gone).returncode == 0
    elsewhere = [*options, *gone, "OUTPUT_DIR", tmp_path / "b"]
    assert_user_error(train_net_here("--resume", *elsewhere), "there is no file", "gone.pth")
