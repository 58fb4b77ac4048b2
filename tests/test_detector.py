"""The detector for Python: sources, inputs, batches, formats of results, and tiles."""

import json
import signal
import zipfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from PIL import Image

from balanced_d2 import Detector, load_config
from balanced_d2.checkpoint import BalancedCheckpointer
from balanced_d2.commands import detect
from balanced_d2.detection import tiles
from balanced_d2.detection.networks import TrainedModel
from balanced_d2.export import (
    describe,
    export_onnx,
    export_torchscript,
    run_exported,
    sample_images,
)
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization import video

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, assert_user_error
from .test_export import MASKS, small_model, smooth_image
from .test_run_exported import toy

NAMES = ["bright", "dark"]
OPTIONS = [*TINY_MODEL, "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
OPTIONS += ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The folder of a training, with random weights: config.yaml, a last and a best checkpoint."""
    folder = tmp_path_factory.mktemp("detector") / "mine"
    folder.mkdir()
    cfg = load_config(str(ROOT / TINY_CONFIG), [*OPTIONS, "MODEL.WEIGHTS", "start.pth"])
    (folder / "config.yaml").write_text(cfg.dump())
    for seed, name in enumerate(("model_best", "model_final")):
        torch.manual_seed(seed)
        model = predictor_of(cfg).model
        checkpointer = BalancedCheckpointer(model, str(folder), class_names=NAMES)
        checkpointer.save(name, iteration=1)
    return folder


def predictor_of(cfg):
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = ""
    return DefaultPredictor(cfg)


@pytest.fixture(scope="module")
def detector(training):
    return Detector.load(training)


@pytest.fixture(scope="module")
def expected(training):
    """The detections of Detectron2's own predictor with the last checkpoint."""
    predictor = predictor_of(load_config(str(training / "config.yaml")))
    content = torch.load(training / "model_final.pth", weights_only=False)
    predictor.model.load_state_dict(content["model"])
    return lambda image: predictor(image)["instances"]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def assert_same(found, wanted, box=1e-3, score=1e-5):
    assert len(found) == len(wanted) > 0 and found.image_size == wanted.image_size
    torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=box)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=score)
    assert found.pred_classes.tolist() == wanted.pred_classes.tolist()


def test_a_training_is_found_with_its_last_checkpoint(detector, expected, image):
    assert detector.class_names == NAMES
    assert_same(detector(image), expected(image))


def test_what_a_detector_is_loaded_from(training, detector, image, monkeypatch):
    wanted = detector(image)
    config, last = training / "config.yaml", training / "model_final.pth"
    for loaded in (Detector.load(str(last)), Detector.load(config, last)):
        assert loaded.class_names == NAMES
        assert_same(loaded(image), wanted)
    monkeypatch.chdir(training)  # here is no configs/: this is a name of the zoo
    loaded = Detector.load(TINY_CONFIG.removeprefix("configs/"), last, options=OPTIONS)
    assert_same(loaded(image), wanted)
    best = Detector.load(training, "model_best.pth")(image)
    assert best.scores.tolist() != wanted.scores.tolist()
    middle = float(wanted.scores.median())
    chosen = Detector.load(training, threshold=middle)(image)
    assert 0 < len(chosen) < len(wanted)
    assert_same(chosen, wanted[wanted.scores > middle])


def test_inputs(detector, image, tmp_path):
    wanted = detector(image)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    Image.fromarray(image[:, :, ::-1]).save(tmp_path / "turned.png", exif=exif_of(6))
    with (
        Image.open(tmp_path / "image.png") as opened,
        Image.open(tmp_path / "turned.png") as turned,
    ):
        found = detector([tmp_path / "image.png", str(tmp_path / "image.png"), opened, image])
        assert np.array_equal(detector.read(turned), np.rot90(image, -1))
    assert isinstance(found, list) and len(found) == 4
    for detections in found:
        assert_same(detections, wanted)
    alpha = np.concatenate([image, image[:, :, :1]], axis=2)
    gray = image[:, :, 0]
    assert np.array_equal(detector.read(alpha), image)
    assert np.array_equal(detector.read(gray), np.stack([gray] * 3, axis=2))
    deep = gray.astype(np.uint16) * 257
    assert np.array_equal(detector.read(deep)[:, :, 1], gray)
    assert detector([]) == []


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_images_that_cannot_be_read(detector, image, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for wrong, message in (
        (tmp_path / "none.jpg", "none.jpg: No such file"),
        (tmp_path / "text.jpg", "text.jpg: it is not an image"),
        ([image, image.astype(float)], r"image 2: it is float64 of shape \(70, 90, 3\)"),
        (image[:, :, :2], r"of shape \(70, 90, 2\)"),
        (image[:0], "it is empty"),
        ([image, 5], "image 2 is of type int"),
        (-image[:, :, 0].astype(np.int16), "it is gray with values from"),
    ):
        with pytest.raises(UserError, match=message):
            detector(wrong)


def detector_of(network, **arguments):
    network.metadata, network.gray_range = Metadata(thing_classes=["square"]), None
    network.model, network.has_masks = None, False
    return Detector(network, **arguments)


def test_batches_hold_images_of_one_size():
    sizes = []

    def network(images):
        sizes.append([image.shape[0] for image in images])
        return [Instances(image.shape[:2]) for image in images]

    heights = [5, 5, 5, 5, 5, 7, 5]
    given = [np.zeros((height, 9, 3), np.uint8) for height in heights]
    found = detector_of(network, batch_size=3)(given)
    assert sizes == [[5, 5, 5], [5, 5], [7], [5]]
    assert [detections.image_size[0] for detections in found] == heights
    # One after the other: no image is read before it is needed.
    sizes.clear()
    stream = detector_of(network, batch_size=2).stream(iter([*given, None]))
    assert next(stream).image_size == (5, 9) and sizes == [[5, 5]]
    with pytest.raises(UserError, match="batch_size"):
        detector_of(network, batch_size=0)


def test_mistakes_in_sources(training, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    lazy = tmp_path / "lazy"
    lazy.mkdir()
    (lazy / "config.yaml").write_text("model:\n  _target_: x\n")
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text((training / "config.yaml").read_text())
    alone = tmp_path / "alone.pth"
    alone.write_bytes((training / "model_final.pth").read_bytes())
    (tmp_path / "text.onnx").write_text("text")
    for arguments, message in (
        ((empty,), "empty is not the folder of a training"),
        ((lazy,), "LazyConfig"),
        ((started,), "started has no checkpoint yet"),
        ((alone,), "has no config.yaml; give the config and the weights"),
        ((tmp_path / "no.pth",), "no file .*no.pth"),
        ((training / "model_final.pth", "other.pth"), "give no other weights"),
        ((training, "nothing.pth"), "nothing.pth"),
        ((tmp_path / "none.onnx",), "there is no model file .*none.onnx"),
        ((tmp_path / "text.onnx",), "text.onnx is not an exported model"),
        ((tmp_path / "text.onnx", "model.pth"), "it has its weights"),
    ):
        with pytest.raises(UserError, match=message):
            Detector.load(*arguments)
    with pytest.raises(UserError, match="not in"):
        Detector.load(training, threshold=50)


@pytest.mark.slow
@pytest.mark.parametrize("export, name", [(export_torchscript, "m.ts"), (export_onnx, "m.onnx")])
def test_exported_files(export, name, training, detector, image, tmp_path):
    if name == "m.onnx":
        pytest.importorskip("onnxruntime")
    cfg = load_config(str(training / "config.yaml"))
    model = detector._network._predictor.model
    example = torch.from_numpy(image.transpose(2, 0, 1).copy())
    export(model, example, str(tmp_path / name), describe(cfg, NAMES))
    loaded, wanted = Detector.load(tmp_path / name), detector(image)
    assert loaded.class_names == NAMES
    found = loaded(image)
    # Pillow scales the image in both, but boxes are scaled back by other code.
    assert_same(found, wanted, box=0.02, score=1e-4)
    assert found.pred_boxes.tensor.dtype == torch.float32 and isinstance(found, Instances)
    threshold = float(wanted.scores.median())
    some = Detector.load(tmp_path / name, threshold=threshold)([image])[0]
    assert len(some) == int((found.scores > threshold).sum())


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "model.zip", "model"])
def test_files_that_are_no_exported_models(name, tmp_path):
    (tmp_path / name).write_text("hello")
    with pytest.raises(UserError, match=f"{name} is not an exported model, or is damaged: "):
        Detector.load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("photo.jpg", b"hello")
    with pytest.raises(UserError, match=f"{name} is not an exported model: it has no "):
        Detector.load(tmp_path / name)


@pytest.mark.parametrize("content", [b"hello\n", b"", b"\x80\x04.", bytes(100)])
def test_files_that_are_no_checkpoints(content, training, tmp_path):
    """The reason is a sentence, whatever the reader of checkpoints says."""
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot load the checkpoint .*x\.pth: \S+ .*\w \S+"):
        Detector.load(training, tmp_path / "x.pth")


def test_masks_and_keypoints_of_exported_files(monkeypatch):
    """Whatever the file, what it finds is given as Detectron2 gives it."""
    from balanced_d2.detection.networks import ExportedModel
    from balanced_d2.export import run_exported

    outputs = {
        "boxes": np.array([[1, 2, 11, 12], [0, 0, 4, 4]], np.float32),
        "classes": np.array([1, 0]),
        "scores": np.array([0.9, 0.2], np.float32),
        "masks": np.ones((2, 28, 28), np.float32),
        "keypoints": np.array([[[3, 4, 0.5]]] * 2, np.float32),
        "image_size": np.array([16, 20]),
    }

    class File:
        metadata = {"class_names": NAMES, "gray_range": 0}
        score_threshold = 0.0

        def __init__(self, path, device):
            self.outputs = list(outputs)

        def preprocess(self, picture):
            return np.asarray(picture).transpose(2, 0, 1)

        def detect(self, arrays):
            return [dict(outputs) for _ in arrays]

    monkeypatch.setattr(run_exported, "ExportedDetector", File)
    found = Detector(ExportedModel("any", threshold=0.5))(np.zeros((16, 20, 3), np.uint8))
    assert len(found) == 1 and found.pred_masks.shape == (1, 16, 20)
    assert found.pred_masks[0].nonzero().tolist() == [
        [y, x] for y in range(2, 12) for x in range(1, 11)
    ]
    assert found.pred_keypoints.tolist() == [[[3, 4, 0.5]]]
    network = ExportedModel("any")
    assert network.has_masks
    (without,) = network([np.zeros((16, 20, 3), np.uint8)], masks=False)
    assert len(without) == 2 and not without.has("pred_masks")

    def refuse(self, arrays):
        raise run_exported.UserError("the model does not take it")

    monkeypatch.setattr(File, "detect", refuse)
    with pytest.raises(UserError, match="the model does not take it"):  # as other errors of ours
        Detector(ExportedModel("any"))(np.zeros((16, 20, 3), np.uint8))


def test_batches_of_exported_files(image, tmp_path):
    """Images of one size go through a file that takes batches together."""
    loaded = Detector.load(toy(tmp_path / "model.onnx"), batch_size=3)
    images = [np.full((20, 30, 3), 20 * i, np.uint8) for i in range(4)] + [image.copy()]
    for i, one in enumerate(images):
        one[0, :4, 2] = 1 + i, 2, 9, 11  # red: where the toy detects a box
    alone = [loaded(one) for one in images]
    shapes, run = [], loaded._network._file._run
    loaded._network._file._run = lambda array: shapes.append(array.shape) or run(array)
    for found, wanted in zip(loaded(images), alone, strict=True):
        assert_same(found, wanted)
    assert shapes == [(3, 3, 20, 30), (1, 3, 20, 30), (1, 3, 70, 90)]


def test_thresholds_below_that_of_an_exported_file(tmp_path, caplog):
    path = toy(tmp_path / "model.onnx", score_threshold=0.25)
    for threshold in (None, 0.25, 0.9):
        Detector.load(path, threshold=threshold)
    assert not caplog.records
    Detector.load(path, threshold=0.2)
    assert "the threshold 0.2 has no effect below 0.25" in caplog.text


def instances(boxes, scores, classes, size=(40, 60)):
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return found


def test_coco(detector):
    found = instances([[10, 20, 30, 35]], [0.75], [1])
    (result,) = detector.as_coco(found, image_id=7)
    assert json.loads(json.dumps(result)) == {
        **{"image_id": 7, "category_id": 2, "bbox": [10, 20, 20, 15], "score": 0.75}
    }
    assert detector.as_coco(found, 7, category_ids=[11, 13])[0]["category_id"] == 13
    assert detector.as_coco(found[:0], 7) == []


def test_supervision(detector):
    pytest.importorskip("supervision")
    found = instances([[10, 20, 30, 35], [0, 0, 5, 5]], [0.75, 0.5], [1, 0])
    found.pred_masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    result = detector.as_supervision(found)
    assert result.xyxy.tolist() == [[10, 20, 30, 35], [0, 0, 5, 5]]
    assert result.confidence.tolist() == [0.75, 0.5] and result.class_id.tolist() == [1, 0]
    assert result["class_name"].tolist() == ["dark", "bright"]
    assert result.mask.shape == (2, 40, 60)
    assert len(detector.as_supervision(found[:0])) == 0


def test_without_supervision(detector, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install supervision"):
        detector.as_supervision(instances([], [], []))


@pytest.mark.parametrize("height, width", [(100, 250), (64, 64), (30, 500), (129, 65)])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.9])
def test_tiles_cover_the_image(height, width, overlap):
    size = 64
    found = tiles.tiles_of(height, width, size, overlap)
    covered = np.zeros((height, width), int)
    for tile in found:
        assert (tile.x2 - tile.x1, tile.y2 - tile.y1) == (min(size, width), min(size, height))
        assert tile.x1 >= 0 and tile.y1 >= 0 and tile.x2 <= width and tile.y2 <= height
        covered[tile.y1 : tile.y2, tile.x1 : tile.x2] += 1
    assert covered.min() == 1 and len(set(found)) == len(found)
    for starts in ({t.x1 for t in found}, {t.y1 for t in found}):
        ordered = sorted(starts)
        for a, b in zip(ordered, ordered[1:]):
            assert b - a <= round(size * (1 - overlap))


def test_tiles_that_there_cannot_be(detector, image):
    for tile, overlap, message in ((10, 0.2, "tiles of 10"), (64, 1.0, "overlap of 1 ")):
        with pytest.raises(UserError, match=message):
            detector(image, tile=tile, overlap=overlap)


def test_boxes_at_inner_sides_are_cut():
    tile = tiles.Tile(0, 40, 64, 104)  # in an image of 104 x 200: left and bottom are the image's
    boxes = np.array(
        [[0, 50, 30, 104], [10, 42, 30, 60], [10, 60, 62, 80], [10, 44, 60, 100]], float
    )
    assert tiles.is_cut(boxes, tile, 104, 200).tolist() == [False, True, True, False]


def merged_by_a_loop(boxes, scores, classes, cut):
    """The rule in plain Python, in float64."""
    order = sorted(range(len(boxes)), key=lambda i: (bool(cut[i]), -float(scores[i]), i))
    kept = []
    for i in order:
        x1, y1, x2, y2 = map(float, boxes[i])
        for j in kept:
            if classes[i] != classes[j]:
                continue
            u1, v1, u2, v2 = map(float, boxes[j])
            width, height = min(x2, u2) - max(x1, u1), min(y2, v2) - max(y1, v1)
            common = max(width, 0.0) * max(height, 0.0)
            area, other = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
            if common / (area + other - common) > 0.5 or (cut[i] and common > 0.5 * area):
                break
        else:
            kept.append(i)
    return sorted(kept, key=lambda i: (-float(scores[i]), i))


@pytest.mark.parametrize("seed", range(20))
def test_merging_is_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    number = int(rng.integers(0, 120))
    centres = rng.uniform(0, 100, (8, 4))[rng.integers(0, 8, number)]
    corners = centres[:, :2] + rng.normal(0, 4, (number, 2))
    boxes = np.concatenate([corners, corners + 3 + centres[:, 2:] / 3], axis=1).astype(np.float32)
    scores = rng.random(number).round(1).astype(np.float32)  # some are equal
    classes, cut = rng.integers(0, 2, number), rng.random(number) < 0.4
    kept = tiles.merge(boxes, scores, classes, cut)
    assert kept.tolist() == merged_by_a_loop(boxes, scores, classes, cut)
    assert len(kept) < number or number < 10


def squares(images, masks=True):
    """A network that finds each bright region, as far as it is in the image."""
    found = []
    for image in images:
        _, _, stats, _ = cv2.connectedComponentsWithStats(image[:, :, 0])
        boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:].tolist()]
        scores = [0.5 + 0.4 * (w * h) / image[:, :, 0].size for _, _, w, h, _ in stats[1:].tolist()]
        order = np.argsort(scores)[::-1]
        detections = instances(
            [boxes[i] for i in order], [scores[i] for i in order], [0] * len(boxes), image.shape[:2]
        )
        detections.pred_keypoints = torch.tensor(
            [[[boxes[i][0], boxes[i][1], 1.0]] for i in order], dtype=torch.float32
        ).reshape(-1, 1, 3)
        found.append(detections)
    return found


def test_each_object_is_found_once_in_tiles():
    image, wanted = np.zeros((200, 300, 3), np.uint8), []
    for y in range(5, 190, 23):
        for x in range(4, 285, 19):
            image[y : y + 9, x : x + 11] = 255
            wanted.append([x, y, x + 11, y + 9])
    largest = 0

    def network(images, masks):
        nonlocal largest
        if images[0].shape == image.shape:  # in which the objects look like others
            whole = squares(images)[0][::2]
            whole.pred_classes += 1
            return [whole]
        largest = max(largest, sum(part.size for part in images))
        return squares(images)

    found = detector_of(network, batch_size=2)(image, tile=64, overlap=0.25)
    assert sorted(found.pred_boxes.tensor.tolist()) == sorted(wanted)
    assert found.image_size == (200, 300)
    assert found.pred_keypoints[:, 0, :2].tolist() == found.pred_boxes.tensor[:, :2].tolist()
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert largest <= 2 * 64 * 64 * 3  # however large the image is


def test_a_large_object_is_found_as_a_whole():
    """No tile holds it; what the tiles find are its parts."""
    image = np.zeros((200, 300, 3), np.uint8)
    image[20:180, 30:270] = 255
    found = detector_of(squares)(image, tile=64)
    assert found.pred_boxes.tensor.tolist() == [[30, 20, 270, 180]]


def test_no_masks_are_made_in_tiles(caplog):
    """Nor for the image as a whole; and that is said once."""
    asked = []

    def network(images, masks=True):
        asked.append(masks)
        return squares(images)

    detector = detector_of(network)
    network.has_masks = True
    image = np.zeros((100, 150, 3), np.uint8)
    detector([image, image], tile=64)
    assert asked and not any(asked)
    assert caplog.text.count("detections in tiles have no masks") == 1
    asked.clear()
    detector(image, tile=150)
    assert asked == [True]


def test_masks_can_be_left_out():
    """As they cost the mask head's time, and each the size of the image."""
    model = small_model(*MASKS)
    cfg = load_config(str(ROOT / TINY_CONFIG), ["INPUT.MIN_SIZE_TEST", "64"])
    names = Metadata(thing_classes=["a", "b", "c"])
    network = TrainedModel(
        SimpleNamespace(model=model, cfg=cfg, input_format="BGR", metadata=names)
    )
    calls = []
    model.roi_heads.mask_head.register_forward_hook(lambda *_: calls.append(1))
    image = smooth_image(80, 70).permute(1, 2, 0).numpy()
    (without,) = network([image], masks=False)
    assert network.has_masks and not calls and not without.has("pred_masks")
    (found,) = network([image])
    assert calls and found.pred_masks.shape == (len(found), 80, 70)
    assert_same(without, found)


@pytest.mark.parametrize("shape", [(3000, 1, 3), (1, 3000, 3)])
def test_images_keep_a_pixel_however_thin(shape, detector, tmp_path):
    image = np.full(shape, 200, np.uint8)
    assert detector(image).image_size == shape[:2]
    cfg = load_config(str(ROOT / TINY_CONFIG), OPTIONS)
    cv2.imwrite(str(tmp_path / "thin.png"), image)
    assert len(sample_images(cfg, str(tmp_path / "thin.png"))) == 4


def test_a_small_image_is_one_tile(detector, image):
    assert_same(detector(image, tile=640), detector(image))


def test_tiles_of_a_model(detector, training):
    """The detections of the whole and of each tile, merged by the loop."""
    image = np.random.default_rng(1).integers(0, 256, (100, 150, 3), dtype=np.uint8)

    def held(box):
        u1, v1, u2, v2 = box
        return any(
            (x1 == 0 or u1 >= x1 + 3)
            and (y1 == 0 or v1 >= y1 + 3)
            and (x2 == 150 or u2 <= x2 - 3)
            and (y2 == 100 or v2 <= y2 - 3)
            for x1, y1, x2, y2 in tiles.tiles_of(100, 150, 80, 0.25)
        )

    found = detector(image, tile=80, overlap=0.25)
    boxes, scores, classes, cut = [], [], [], []
    for x1, y1, x2, y2 in [(0, 0, 150, 100), *tiles.tiles_of(100, 150, 80, 0.25)]:
        part = detector(np.ascontiguousarray(image[y1:y2, x1:x2]))
        if (x2 - x1, y2 - y1) == (150, 100):  # only what no tile holds, with a margin
            part = part[torch.tensor([not held(box) for box in part.pred_boxes.tensor.tolist()])]
        moved = part.pred_boxes.tensor.numpy() + np.array([x1, y1, x1, y1], np.float32)
        boxes.append(moved)
        scores += part.scores.tolist()
        classes += part.pred_classes.tolist()
        is_whole = (x2 - x1, y2 - y1) == (150, 100)
        cut += (
            [False] * len(part)
            if is_whole
            else tiles.is_cut(moved, tiles.Tile(x1, y1, x2, y2), 100, 150).tolist()
        )
    boxes = np.concatenate(boxes)
    kept = merged_by_a_loop(boxes, scores, classes, cut)
    assert 10 < len(kept) < len(boxes)
    assert np.allclose(found.pred_boxes.tensor.numpy(), boxes[kept], atol=1e-3)
    assert np.allclose(found.scores.numpy(), np.array(scores)[kept], atol=1e-5)


def test_demo_with_a_training_and_tiles(training, image, tmp_path, run_here):
    cv2.imwrite(str(tmp_path / "image.png"), image)
    arguments = ("--input", tmp_path / "image.png", "--output", tmp_path / "out", "--json")
    arguments += ("--confidence-threshold", "0")
    result = run_here(
        "demo.py", *arguments, "--model", training, "--tile", "64", "--overlap", "0.3"
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "image.json").read_text())["detections"]
    wanted = Detector.load(training, threshold=0)(image, tile=64, overlap=0.3)
    assert np.allclose([d["bbox"] for d in found], wanted.pred_boxes.tensor, atol=1e-3)
    assert [d["class"] for d in found] == [NAMES[i] for i in wanted.pred_classes]
    assert_user_error(run_here("demo.py", *arguments), "either --model or --config-file")
    result = run_here("demo.py", *arguments, "--model", training, "--tile", "3")
    assert_user_error(result, "tiles of 3 pixels are too small")


def test_demo_keeps_its_inputs(image, tmp_path):
    """By whatever name an output is one of them: here, as with file systems without case."""
    photo, pictures = tmp_path / "Photo.PNG", tmp_path / "pictures"
    pictures.mkdir()
    cv2.imwrite(str(photo), image)
    (pictures / "Photo.png").hardlink_to(photo)
    sources = detect.list_sources([str(photo)], str(pictures))
    with pytest.raises(UserError, match="Photo.png is an input and would be replaced"):
        detect.check_output(sources, str(pictures))
    (pictures / "Photo.png").unlink()
    detect.check_output(sources, str(pictures))


def test_demo_counts_what_it_has_processed(training, image, tmp_path, run_here, monkeypatch):
    def quit_at_once(picture, wait):
        raise detect.Quit

    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    monkeypatch.setattr(detect, "show", quit_at_once)
    monkeypatch.setattr(detect, "check_output", lambda sources, output: None)  # of a screen
    arguments = ("--model", training, "--input", tmp_path, "--confidence-threshold", "0")
    result = run_here("demo.py", *arguments)
    assert result.returncode == 0, result.stderr
    number = len(Detector.load(training, threshold=0)(image))
    assert result.stdout == f"1 of 3 input(s), {number} detection(s)\n"


@pytest.mark.parametrize("source", ["--input", "--webcam"])
@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_demo_and_its_video(
    source, received, training, image, tmp_path, run_here, monkeypatch
):
    clip, calls = str(tmp_path / "clip.mp4"), []
    with video.create_video(clip, 5, image.shape[1::-1]) as writer:
        for _ in range(4):
            writer.write(image)
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    find = Detector.__call__

    def interrupt_the_third(self, image, **options):
        calls.append(image)
        if len(calls) == 3:
            signal.raise_signal(received)
        return find(self, image, **options)

    monkeypatch.setattr(Detector, "__call__", interrupt_the_third)
    monkeypatch.setattr(detect, "VideoReader", lambda _: video.VideoReader(clip))
    given = ["--input", clip, tmp_path / "photo.png"] if source == "--input" else [source]
    arguments = ("--model", training, "--output", tmp_path / "out", "--json", *given)
    result = run_here("demo.py", *arguments)
    name = "webcam" if source == "--webcam" else "clip"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.mp4", f"{name}.json"}
    drawn = cv2.VideoCapture(str(tmp_path / "out" / f"{name}.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 2
    content = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert [frame["frame"] for frame in content["frames"]] == [0, 1]
    if source == "--input":
        assert result.returncode == 130 and "0 of 2 input(s)" in result.stdout
    else:  # whose recording has no other end
        assert result.returncode == 0 and "1 of 1 input(s)" in result.stdout


def test_demo_takes_what_the_runner_takes(image, tmp_path, run_here):
    """And draws a GIF, which has 256 colours, as PNG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for suffix in run_exported.IMAGES:
        Image.fromarray(image).save(folder / f"{suffix[1:]}{suffix}")
    arguments = ("--model", toy(tmp_path / "model.onnx"), "--input", folder)
    result = run_here("demo.py", *arguments, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {path.name.replace(".gif", ".png") for path in folder.iterdir()}


def test_pictures_of_a_run_differ_without_case_too():
    names = set()
    found = [detect.picture(path, "out", names) for path in ("a/X.jpg", "b/x.jpg", "b/x_2.png")]
    assert [path.removeprefix("out/") for path in found] == ["X.jpg", "x_2.jpg", "x_2_2.png"]
