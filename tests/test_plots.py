"""tools/plot_*.py, and the numbers that they plot."""

import csv
import json
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer

from balanced_d2 import load_config
from balanced_d2.analysis.features import balance_levels, energy
from balanced_d2.analysis.metrics import names_of_runs, read_metrics
from balanced_d2.analysis.sampling import Negatives, sample_negatives
from balanced_d2.checkpoint import load_weights
from balanced_d2.data.datasets.coco import register_coco
from balanced_d2.data.loader import TrainLoader
from balanced_d2.engine import build_predictor
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization.pair import draw_pair
from balanced_d2.visualization.sampling_plot import draw_sampling, histogram
from balanced_d2.visualization.training_plot import draw_training
from balanced_d2.visualization.validation_images import ValidationImages

from .conftest import DEMO_CONFIG, assert_user_error


@pytest.fixture
def opts(demo, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo / "datasets"))
    return ["MODEL.WEIGHTS", str(demo / "output" / "model_final.pth"), "MODEL.DEVICE", "cpu"]


def assert_is_picture(path):
    image = cv2.imread(str(path))
    assert image is not None and image.std() > 10
    assert path.stat().st_size < 150 * 1024


# Sampling


@pytest.fixture
def shapes(demo):
    """The demo's training data under another name, since this process expects it elsewhere."""
    name, folder = "shapes_of_demo", demo / "datasets" / "balanced_shapes"
    register_coco(name, str(folder / "train.json"), str(folder / "train"))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def cfg(opts, shapes):
    options = ["DATASETS.TRAIN", f"('{shapes}',)", "DATASETS.TEST", "()", "SEED", "3"]
    return load_config(DEMO_CONFIG, [*opts, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "5"])


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return intersection / (areas - intersection)


def reference_negatives(cfg, model, num_iterations):
    """IoU and size of all negatives, in plain loops: training's proposals with an IoU below 0.5."""
    found = []
    model.train()
    with EventStorage(), torch.no_grad():
        for _, batch in zip(range(num_iterations), TrainLoader(cfg)):
            images = model.preprocess_image(batch)
            features = model.backbone(images.tensor)
            targets = [image["instances"] for image in batch]
            proposals, _ = model.proposal_generator(images, features, targets)
            for image, target in zip(proposals, targets):
                truth = target.gt_boxes.tensor.double().tolist()
                for box in image.proposal_boxes.tensor.double().tolist():
                    size = ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
                    found.append((max(iou(box, gt) for gt in truth), size))
    return np.array(sorted(pair for pair in found if pair[0] < 0.5))


def test_sampled_negatives(cfg):
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    negatives = sample_negatives(cfg, model, 3)
    assert negatives.num_images == 12
    assert np.allclose(negatives.bin_edges, [0, 1 / 6, 1 / 3, 1 / 2])
    # Proposals come from batch statistics, so changed running statistics make no difference.
    expected = reference_negatives(cfg, model, 3)
    available, sizes = negatives.available
    assert len(available) == len(expected)
    assert np.allclose(np.sort(available), expected[:, 0], atol=1e-5)
    assert np.allclose(np.sort(sizes), np.sort(expected[:, 1]), rtol=1e-4)

    sampled = [negatives.sampled[name] for name in ("random", "iou_balanced")]
    pairs = set(zip(*negatives.available))
    for of in sampled:
        assert set(zip(*of)) <= pairs
    random, balanced = (of.ious for of in sampled)
    assert len(random) == len(balanced)
    # Each bin supplies a third of the samples, unless it has fewer in an image.
    shares = np.histogram(balanced, negatives.bin_edges)[0] / len(balanced)
    assert shares[2] > 1.3 * np.mean(available >= 1 / 3)
    # A random sample follows the distribution of all negatives, within five standard errors.
    for edge in (0.05, 1 / 6, 1 / 3):
        share = np.mean(available > edge)
        error = np.sqrt(share * (1 - share) / len(random))
        assert abs(np.mean(random > edge) - share) < 5 * error
    assert sampled[1].hard > sampled[0].hard
    few, none = np.array([0.0, 0.05, 0.06, 0.3]), np.array([])
    assert Negatives(few, few).hard == 0.5 and Negatives(none, none).hard == 0

    counts = histogram(negatives)
    assert counts["random"].sum() == len(random) and counts["available"].sum() == len(expected)
    labels = draw_sampling(negatives, "t").axes[0].get_legend_handles_labels()[1]
    assert f"IoU-balanced sampling: {sampled[1].hard:.0%} hard" in labels

    again = sample_negatives(cfg, model, 3).sampled
    assert all(np.array_equal(again[name], negatives.sampled[name]) for name in again)


def test_plot_sampling(run_here, opts, shapes, demo, tmp_path):
    folder = demo / "datasets" / "balanced_shapes"
    arguments = [
        *("--config-file", DEMO_CONFIG, "--iterations", "2"),
        *("--register", "mine", folder / "train.json", folder / "train"),
        *("--output", tmp_path / "plots" / "sampling.png"),
    ]
    opts = [*opts, "DATASETS.TRAIN", "('mine',)"]
    result = run_here("tools/plot_sampling.py", *arguments, *opts)
    assert result.returncode == 0, result.stderr
    assert_is_picture(tmp_path / "plots" / "sampling.png")
    rows = list(csv.DictReader((tmp_path / "plots" / "sampling.csv").open()))
    assert list(rows[0]) == ["iou_low", "iou_high", "available", "random", "iou_balanced"]
    assert len(rows) == 20 and float(rows[-1]["iou_high"]) == 0.5
    printed = dict(re.findall(r"^(\w+) +([\d,]+) negatives", result.stdout, re.MULTILINE))
    for line in result.stdout.splitlines()[:3]:  # random, evenly over IoU, all
        levels = re.findall(r"([\d.]+)% on (p\d)", line)
        assert [level for _, level in levels] == ["p2", "p3", "p4", "p5"]
        assert sum(float(share) for share, _ in levels) == pytest.approx(100, abs=0.21)
    for name in ("random", "iou_balanced"):
        assert sum(int(row[name]) for row in rows) == int(printed[name].replace(",", ""))

    def plot(*arguments):
        return run_here("tools/plot_sampling.py", "--config-file", *arguments)

    retinanet = "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.yaml"
    assert_user_error(plot(DEMO_CONFIG, "--iterations", "0"), "--iterations is 0")
    assert_user_error(plot(DEMO_CONFIG, "--output", tmp_path / "x.gif"), "x.gif", ".png")
    no_weights = ("--output", tmp_path / "x.png", "MODEL.WEIGHTS", "")
    assert_user_error(plot(retinanet, *no_weights), "does not sample proposals")
    assert_user_error(
        plot(DEMO_CONFIG, "--output", tmp_path / "x.png"), "nothing to sample from: set MODEL"
    )


# Features


def test_balanced_levels(cfg):
    """For an image that needs padding, against Detectron2's own FPN and the balancer alone."""
    predictor = build_predictor(cfg, "visualize")
    image = np.random.default_rng(0).integers(0, 256, (100, 136, 3), dtype=np.uint8)
    levels = balance_levels(predictor, image)
    assert [level.name for level in levels] == ["p2", "p3", "p4", "p5", "p6"]

    plain = cfg.clone()
    plain.MODEL.BALANCED_FPN.ENABLED = False
    fpn = build_model(plain).eval()
    fpn.load_state_dict(predictor.model.state_dict(), strict=False)
    scaled = predictor.aug.get_transform(image).apply_image(image)
    inputs = [{"image": torch.from_numpy(scaled.astype("float32").transpose(2, 0, 1))}]
    with torch.no_grad():
        before = fpn.backbone(fpn.preprocess_image(inputs).tensor)
        after = dict(zip(before, predictor.model.backbone.balancer(list(before.values()))))
    height, width = scaled.shape[:2]
    assert (height, width) == (128, 174)
    for level in levels:
        size = -(-height // level.stride), -(-width // level.stride)
        for norms, features in (
            (level.before, before[level.name]),
            (level.after, after[level.name]),
            (level.added, after[level.name] - before[level.name]),
        ):
            assert norms.shape == size
            cropped = features[0, :, : size[0], : size[1]].double()
            expected = sum(channel.square() for channel in cropped).mean()
            assert energy(norms) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(UserError, match="no balanced feature pyramid"):
        plain.MODEL.WEIGHTS = ""
        predictor.model = fpn
        balance_levels(predictor, image)


def test_balanced_levels_in_mixed_precision(cfg):
    image = np.random.default_rng(0).integers(0, 256, (100, 136, 3), dtype=np.uint8)
    exact = balance_levels(build_predictor(cfg.clone(), "visualize"), image)
    mixed = cfg.clone()
    mixed.TEST.AMP.ENABLED = True
    for level, wanted in zip(balance_levels(build_predictor(mixed, "visualize"), image), exact):
        assert energy(level.after) == pytest.approx(energy(wanted.after), rel=0.05)


def test_plot_features(run_here, opts, demo, tmp_path):
    image = next((demo / "datasets" / "balanced_shapes" / "val").iterdir())
    arguments = ["--config-file", DEMO_CONFIG, "--output", tmp_path]
    result = run_here("tools/plot_features.py", "--input", image, *arguments, *opts)
    assert result.returncode == 0, result.stderr
    assert_is_picture(tmp_path / "features.png")
    assert re.search(r"^p4 +8 x 10( +[\d.]+){4}$", result.stdout, re.MULTILINE)
    result = run_here("tools/plot_features.py", "--input", tmp_path / "no.jpg", *arguments, *opts)
    assert_user_error(result, "no.jpg", "No such file")


def test_features_do_not_replace_their_image(run_here, tmp_path):
    photo, link = tmp_path / "photo.png", tmp_path / "link.png"
    cv2.imwrite(str(photo), np.zeros((20, 30, 3), np.uint8))
    link.hardlink_to(photo)
    arguments = ["--config-file", DEMO_CONFIG, "--input", photo, "--output", link]
    result = run_here("tools/plot_features.py", *arguments)
    assert_user_error(result, "link.png is an input and would be replaced")


# Training runs


def write_metrics(folder, text):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(text)
    return str(folder)


def test_metrics_of_killed_and_resumed_runs(tmp_path, caplog):
    killed = (
        '{"iteration": 19, "total_loss": 2.0, "lr": 0.1}\n'
        '{"iteration": 39, "total_loss": 1.5, "lr": 0.1}\n'
        '{"iteration": 59, "total_l'
    )
    folder = write_metrics(tmp_path / "killed", killed)
    assert read_metrics(folder) == {"total_loss": {19: 2.0, 39: 1.5}, "lr": {19: 0.1, 39: 0.1}}
    assert "1 line(s) are cut off" in caplog.text
    # Resumed from iteration 20: its first record is appended to the line that was cut off.
    resumed = (
        '{"iteration": 39, "total_loss": 1.25}\n\n{"bbox/AP": NaN, "iteration": 39}\n'
        '{"bbox/AP": 4.0, "iteration": 59, "eta": "soon"}\n[1, 2]\n'
    )
    folder = write_metrics(tmp_path / "resumed", killed + resumed)
    metrics = read_metrics(folder)
    assert metrics["total_loss"] == {19: 2.0, 39: 1.25}
    assert set(metrics) == {"total_loss", "lr", "bbox/AP"} and metrics["bbox/AP"][59] == 4.0


def test_names_of_runs():
    assert names_of_runs(["output/demo/"]) == ["demo"]
    assert names_of_runs(["output/a/seed1", "output/b/seed1"]) == ["a", "b"]
    assert names_of_runs(["output/a/seed1", "output/a/seed2"]) == ["seed1", "seed2"]
    assert names_of_runs(["x", "x/y"]) == ["x", "x/y"]
    with pytest.raises(UserError, match="twice"):
        names_of_runs(["x", "./x"])


def test_panels_of_a_run():
    line = {
        **{f"roi_head/num_neg_bin{k}{s}": {9: k} for k in range(3) for s in ("", "_available")},
        **{"total_loss": {9: 1.0, 19: 0.5}, "loss_cls": {9: 0.3}, "lr": {9: 0.1}},
        **{"bbox/AP": {19: 30.0}, "bbox/AP50": {19: 60.0}, "bbox/AP-disk": {19: 3.0}},
        **{"time": {9: 0.2}},
    }
    other = {"total_loss": {4: 2.0}, "loss_box_reg": {4: 1.0}}
    figure = draw_training({"a": line, "b": other})
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [
        *("total_loss", "loss_box_reg", "loss_cls", "learning rate", "bbox AP (%)"),
        *("negatives sampled per image", "negatives available per image"),
    ]
    drawn = [line.get_xydata().tolist() for line in panels["total_loss"].lines]
    assert [[9, 1.0], [19, 0.5]] in drawn and [[4, 2.0]] in drawn
    legend = [text.get_text() for text in panels["bbox AP (%)"].get_legend().get_texts()]
    assert legend == ["AP", "AP50"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_plot_training(run_here, demo, tmp_path):
    folder = write_metrics(
        tmp_path / "other", json.dumps({"iteration": 3, "total_loss": 1.0}) + '\n{"iter'
    )
    picture = tmp_path / "training.png"
    arguments = (demo / "output", folder, "--output", picture)
    result = run_here("tools/plot_training.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert_is_picture(picture)
    assert_user_error(run_here("tools/plot_training.py", tmp_path / "gone"), "gone", "OUTPUT_DIR")
    empty = write_metrics(tmp_path / "empty", "\n")
    assert_user_error(run_here("tools/plot_training.py", empty), "has no metrics")


# Pictures in TensorBoard


@pytest.fixture
def tiny(tiny_coco):
    register_coco("tiny_shown", str(tiny_coco), str(tiny_coco.parent / "images"))
    yield "tiny_shown", json.loads(tiny_coco.read_text())["images"], tiny_coco.parent / "images"
    DatasetCatalog.remove("tiny_shown")
    MetadataCatalog.remove("tiny_shown")


def outputs_of(images, score):
    for image in images:
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 70.0, 60.0]]))
        found.scores, found.pred_classes = torch.tensor([score]), torch.tensor([0])
        yield [{"image_id": image["id"]}], [{"instances": found}]


def test_validation_images(tiny):
    name, images, folder = tiny

    def shown(score, num_images=3):
        with EventStorage(7) as storage:
            evaluator = ValidationImages(name, num_images)
            evaluator.reset()
            for inputs, outputs in outputs_of(images, score):
                evaluator.process(inputs, outputs)
            assert DatasetEvaluators([evaluator]).evaluate() == {}
            return {tag: (image, step) for tag, image, step in storage._vis_data}

    detected, below = shown(0.9), shown(0.4)
    assert list(detected) == [f"{name}/{images[i]['id']}" for i in (0, 2, 5)]
    assert len(shown(0.9, num_images=99)) == len(images)
    for tag, (picture, step) in detected.items():
        assert step == 7 and picture.dtype == np.uint8
        assert picture.shape == (3, 256, 644)
        file_name = f"{tag.partition('/')[2]}.jpg"
        image = read_image(str(folder / file_name), format="RGB")
        untouched = Visualizer(image, scale=4).get_output().get_image().transpose(2, 0, 1)
        left, right = picture[:, :, :320], picture[:, :, 324:]
        assert (left != untouched).any() and (right != untouched).any()
        # No detection reaches the threshold.
        assert (below[tag][0][:, :, 324:] == untouched).all()


def test_validation_images_outside_training(tiny):
    name, images, _ = tiny
    evaluator = ValidationImages(name)
    evaluator.reset()
    for inputs, outputs in outputs_of(images, 0.9):
        evaluator.process(inputs, outputs)
    assert evaluator.evaluate() is None


def test_class_names_are_drawn_as_they_are(tiny_coco, caplog):
    """Dollar signs are no formulas; a script that no font has is reported, once."""
    record = {"file_name": str(tiny_coco.parent / "images" / "1.jpg"), "annotations": []}
    found = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[8.0, 8, 40, 40]])))
    found.pred_classes, found.scores = torch.tensor([0]), torch.tensor([0.9])
    pictures = [
        draw_pair(record, found, Metadata(thing_classes=[name]))
        for name in ("$\\frac$", "$x$ and $y$", "\U000f1234")  # the last is of no script
    ]
    assert all(picture.std() > 0 for picture in pictures)
    draw_pair(record, found, Metadata(thing_classes=["\U000f1234"]))
    (warning,) = (text for text in caplog.messages if "no installed font" in text)
    assert "class names, such as \U000f1234" in warning
