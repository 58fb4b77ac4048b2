"""Images of every kind: read right, the same everywhere, or refused with their path."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils.visualizer import Visualizer
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from balanced_d2 import load_config
from balanced_d2.checkpoint import read_contents
from balanced_d2.commands import detect
from balanced_d2.data import check_datasets, image, register_coco
from balanced_d2.data.checks.image_headers import Header
from balanced_d2.data.gray_range import find_gray_range
from balanced_d2.data.image import ImageError, read_image
from balanced_d2.data.mapper import ImageMapper
from balanced_d2.export import run_exported
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization import fonts
from balanced_d2.visualization.fonts import use_font_for

from .conftest import TINY_MODEL, assert_user_error, run_program

NAME = "kinds"
TEST_SET = ("DATASETS.TEST", f"('{NAME}',)")
GRAY = (np.arange(12 * 20).reshape(12, 20) % 251).astype(np.uint8)


@pytest.fixture(autouse=True)
def unregister():
    yield
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


@pytest.fixture(scope="module")
def runner():
    return run_exported


def read_by(runner, path, gray_range=None):
    """What the runner reads, or the text of its error."""
    try:
        with open(path, "rb") as file, Image.open(file) as opened:
            return np.asarray(runner.as_rgb(opened, gray_range))
    except (OSError, ValueError) as error:
        return str(error)


# Name of the file, its pixels, and the value that is white.
DEEP = {
    "16-bit PNG": ("a.png", GRAY.astype(np.uint16) * 257, 65535),
    "16-bit TIFF": ("a.tif", GRAY.astype(np.uint16) * 257, 65535),
    "12 bits in 16": ("a.png", GRAY.astype(np.uint16) * 16, 4095),
    "8 bits in 16": ("a.png", GRAY.astype(np.uint16), 255),
    "int32": ("a.tif", GRAY.astype(np.int32) * 4000, 2**20 - 1),
    "float to 1": ("a.tif", (GRAY / 255).astype(np.float32), 1),
    "float above 1": ("a.tif", (GRAY * 3.99).astype(np.float32), 1023),
}


@pytest.mark.parametrize("name, pixels, white", DEEP.values(), ids=DEEP.keys())
def test_deep_gray_images(tmp_path, runner, name, pixels, white):
    path = str(tmp_path / name)
    Image.fromarray(pixels).save(path)
    expected = [[round(value * 255 / white) for value in row] for row in pixels.tolist()]
    for gray_range in (None, float(white)):
        read = read_image(path, "RGB", gray_range=gray_range)
        assert read.dtype == np.uint8 and np.array_equal(read, np.stack([expected] * 3, axis=-1))
        assert np.array_equal(read, read_by(runner, path, gray_range))
    half = read_image(path, "BGR", gray_range=white / 2)  # above it, everything is white
    assert half.max() == 255 and np.array_equal(half, read_by(runner, path, white / 2))
    with pytest.raises(ImageError, match="a\\.(png|tif): it is gray with more than 8 bits"):
        read_image(path, gray_range=0)
    assert image.range_of(*image.largest_value(path)) == white
    assert Header.of(path) == Header(20, 12, True)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_modes_and_orientations(tmp_path, runner, mode, orientation):
    """As Detectron2 reads 8-bit images, and turned as their EXIF data says."""
    suffix = {"CMYK": "jpg", "YCbCr": "tif", "LAB": "tif", "I;16": "tif"}.get(mode, "png")
    path = str(tmp_path / f"a.{suffix}")
    base = Image.fromarray(GRAY)
    if mode == "I;16":
        opened = Image.fromarray(GRAY.astype(np.uint16) * 257)
    else:
        opened = Image.merge("LAB", [base] * 3) if mode == "LAB" else base.convert(mode)
    opened.save(path)
    upright = read_image(path, "RGB", gray_range=65535)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened.save(path, exif=exif)
    undone = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright),
    }[orientation]
    read = read_image(path, "RGB", gray_range=65535)
    assert np.array_equal(read, undone)
    assert np.array_equal(read, read_by(runner, path, 65535))
    assert Header.of(path)[:2] == read.shape[1::-1]


def save_float(path, pixels):
    Image.fromarray(np.asarray(pixels, np.float32)).save(path)


REFUSED_IMAGES = {
    "negative": (lambda p: Image.fromarray(GRAY.astype(np.int32) - 5).save(p), "values from -5"),
    "NaN": (lambda p: save_float(p, [[np.nan, 1]]), "not finite"),
    "infinity": (lambda p: save_float(p, [[np.inf, 1]]), "not finite"),
    "no image": (lambda p: Path(p).write_text("text"), "not an image in a format"),
    "empty": (lambda p: Path(p).touch(), "not an image in a format"),
    "cut off": (
        lambda p: Path(p).write_bytes(cv2.imencode(".png", np.eye(90) * 255)[1].tobytes()[:90]),
        "truncated",
    ),
    "absent": (lambda p: None, "No such file"),
}


@pytest.mark.parametrize("write, reason", REFUSED_IMAGES.values(), ids=REFUSED_IMAGES.keys())
def test_images_that_cannot_be_read(tmp_path, write, reason):
    path = str(tmp_path / "a.tif")
    write(path)
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert path in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_broken_exif_data_are_ignored(tmp_path, runner):
    path = tmp_path / "a.jpg"
    Image.fromarray(GRAY).save(path, exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
    assert read_image(str(path)).shape == (12, 20, 3) == read_by(runner, path).shape
    assert Header.of(str(path)) == Header(20, 12, False)


def test_very_large_images(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    Image.fromarray(GRAY).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"a.png: it has more than .* megapixels"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow warns, and reads it
    assert read_image(path).shape == (12, 20, 3)


def write_data(folder, images, boxes=((2, 3, 6, 5),)):
    """Save images, by name, and a file of annotations with their real sizes; register it."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, (name, pixels) in enumerate(images.items(), 1):
        Image.fromarray(pixels).save(folder / name)
        height, width = pixels.shape[:2]
        content["images"].append(
            {"id": number, "file_name": name, "width": width, "height": height}
        )
        content["annotations"] += [
            {"id": number, "image_id": number, "category_id": 1, "bbox": list(box)} for box in boxes
        ]
    (folder / "a.json").write_text(json.dumps(content))
    register_coco(NAME, str(folder / "a.json"), str(folder))
    return content


def test_one_range_for_a_dataset(tmp_path):
    write_data(
        tmp_path,
        {"a.png": GRAY.astype(np.uint16), "b.png": GRAY.astype(np.uint16) * 10, "c.png": GRAY},
    )
    cfg = load_config("", [*TEST_SET, "MODEL.ROI_HEADS.NUM_CLASSES", "1"])
    assert check_datasets(cfg, train=False).deep == [NAME]
    assert find_gray_range([NAME]) == 4095  # from 2390
    record = DatasetCatalog.get(NAME)[0]
    cfg = load_config("", ["INPUT.GRAY_RANGE", "4095.0", "INPUT.MIN_SIZE_TEST", "0"])
    pixels = ImageMapper(cfg, is_train=False)(record)["image"]
    assert pixels.max() == round(239 * 255 / 4095)


def test_eight_bits_have_no_range_and_detectron2s_pixels(tmp_path):
    write_data(tmp_path, {"a.png": np.stack([GRAY] * 3, axis=-1)})
    cfg = load_config("", [*TEST_SET, "MODEL.ROI_HEADS.NUM_CLASSES", "1"])
    assert check_datasets(cfg, train=False).deep == []
    cfg = load_config("", ["INPUT.MIN_SIZE_TRAIN", "(12,)", "INPUT.RANDOM_FLIP", "none"])
    (record,) = DatasetCatalog.get(NAME)
    ours, theirs = (mapper(cfg, is_train=True)(record) for mapper in (ImageMapper, DatasetMapper))
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("is_train", [True, False])
def test_no_side_is_scaled_to_nothing(tmp_path, is_train):
    write_data(tmp_path, {"a.png": np.zeros((1, 3000, 3), np.uint8)})
    mapper = pickle.loads(pickle.dumps(ImageMapper(load_config("", []), is_train=is_train)))
    (record,) = DatasetCatalog.get(NAME)
    assert mapper(record)["image"].shape == (3, 1, 1333)
    # As in a LazyConfig.
    resize = T.ResizeShortestEdge(800, 1333)
    mapper = ImageMapper(is_train=is_train, augmentations=[resize], image_format="BGR")
    assert mapper(record)["image"].shape == (3, 1, 1333)
    assert type(resize) is T.ResizeShortestEdge  # which others may use


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_headers_are_checked_at_the_start(tmp_path, key):
    content = write_data(tmp_path, {"a.png": GRAY, "b.png": GRAY, "c.png": GRAY, "d.png": GRAY})
    content["images"][0].update(width=12, height=20)
    (tmp_path / "b.png").write_text("text")
    content["images"][3].update(width=100_000, height=100_000)
    (tmp_path / "a.json").write_text(json.dumps(content))
    cfg = load_config("", [f"DATASETS.{key}", f"('{NAME}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "1"])
    with pytest.raises(UserError) as error:
        check_datasets(cfg, train=key == "TRAIN")
    for part in (
        f"{tmp_path}/b.png (it is not an image",
        f"{tmp_path}/a.png (is 20 x 12, not 12 x 20)",
        f"{tmp_path}/d.png (100000 x 100000); refused: cut them into tiles",
    ):
        assert part in str(error.value)
    cfg.DATALOADER.SKIP_BAD_IMAGES = True
    if key == "TRAIN":
        check_datasets(cfg)
    else:
        with pytest.raises(UserError):
            check_datasets(cfg, train=False)


@pytest.mark.slow
def test_from_training_to_the_exported_file(tmp_path, train_net_here, run_here):
    """16-bit images: the range is in config, checkpoint and exported file, and used by all."""
    rng = np.random.default_rng(0)
    pixels = {f"{n}.png": (rng.random((64, 80)) * 3000).astype(np.uint16) for n in range(2)}
    write_data(tmp_path, pixels, boxes=[(10, 10, 30, 30)])
    DatasetCatalog.pop(NAME)
    own = ["--register", NAME, tmp_path / "a.json", tmp_path]
    data = ["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)"]
    opts = [*data, *TINY_MODEL, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "OUTPUT_DIR", tmp_path / "out"]
    result = train_net_here(*own, *opts, "DATALOADER.NUM_WORKERS", "0")
    assert result.returncode == 0, result.stderr
    assert "4095 is white (INPUT.GRAY_RANGE)" in result.stdout
    assert "is not known" not in result.stdout + result.stderr
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    weights = tmp_path / "out" / "model_final.pth"
    assert config["INPUT"]["GRAY_RANGE"] == 4095 == read_contents(str(weights)).gray_range

    config = tmp_path / "config.yaml"  # one that does not have it
    config.write_text(
        "_BASE_: " + str(tmp_path / "out" / "config.yaml") + "\nINPUT: {GRAY_RANGE: 0.0}"
    )
    with_weights = ["MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    result = run_here(
        *("demo.py", "--config-file", config, *own, "--input", tmp_path / "0.png", "--json"),
        *("--output", tmp_path / "drawn", "--confidence-threshold", "0", *with_weights),
    )
    assert result.returncode == 0 and "is not known" not in result.stdout + result.stderr
    result = run_here(
        *("tools/export_model.py", "--config-file", config, *own, "--output", tmp_path / "file"),
        *("--no-verify", *with_weights),
    )
    assert result.returncode == 0, result.stderr
    result = run_program(
        *("tools/run_exported.py", tmp_path / "file" / "model.ts", tmp_path / "0.png"),
        *("--threshold", "0"),
    )
    assert result.returncode == 0, result.stderr
    exported = json.loads(result.stdout)["detections"]
    drawn = json.loads((tmp_path / "drawn" / "0.json").read_text())["detections"]
    assert len(exported) == len(drawn) > 0
    scores = [sorted(found["score"] for found in part) for part in (exported, drawn)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


# Names in pictures


NAMES = ("$\\frac$", "price $x", "a_b^c", "\\alpha {", "圆形", "สวัสดี", "कुत्ता", "🐈", "Ærø", "")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_they_are(name, runner):
    blank = np.zeros((60, 90, 3), np.uint8)
    use_font_for((name,))
    drawer = Visualizer(blank)
    drawer.draw_text(name, (10, 10))
    (text,) = drawer.output.ax.texts
    assert text.get_text() == name and not text.get_parse_math()
    assert drawer.output.get_image().shape == blank.shape
    detection = {"class": name, "class_id": 0, "score": 0.5, "bbox": [10, 10, 50, 40]}
    font = runner.find_font(name)
    assert runner.draw(Image.fromarray(blank), [detection], font).size == (90, 60)


def test_a_font_that_has_the_characters_is_found(monkeypatch, caplog):
    """The installed fonts as a table: which characters each has."""
    installed = {"Default": "abc", "Other": "ส", "Both": "a圆é", "Bold": "圆"}
    entries = [
        SimpleNamespace(
            name=name, fname=name, style="normal", weight=700 if name == "Bold" else 400
        )
        for name in installed
    ]
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(fonts.font_manager, "findfont", lambda properties: "Default")
    monkeypatch.setattr(fonts, "_characters", lambda file: frozenset(map(ord, installed[file])))
    use_font = use_font_for.__wrapped__  # whatever was asked for before
    families = rcParams["font.sans-serif"]
    for names, found in ((["abc a"], []), (["a圆", "é"], ["Both"]), (["圆"], ["Both"])):
        monkeypatch.setitem(rcParams, "font.sans-serif", families)
        use_font(tuple(names))
        assert rcParams["font.sans-serif"] == [*found, *families]
    assert not caplog.records
    use_font(("ก圆",))
    assert "no installed font has all characters" in caplog.text and "ก" in caplog.text


def test_the_runner_finds_a_font(runner, monkeypatch, tmp_path, capsys):
    import matplotlib

    fonts = f"{matplotlib.get_data_path()}/fonts/ttf"
    monkeypatch.setattr(runner, "FONT_FOLDERS", (fonts,))
    font = ImageFont.truetype(runner.find_font("Жук"), 20)
    assert "DejaVu" in font.getname()[0]
    assert runner.find_font("beetle") == ""  # Pillow's own has these
    monkeypatch.setattr(runner, "FONT_FOLDERS", (str(tmp_path),))
    assert runner.find_font("Жук") == ""
    assert capsys.readouterr().err.count("no installed font has all characters") == 1
    # What is missing is named, not what every font has.
    assert runner.find_font("jalapeño") == ""
    assert capsys.readouterr().err.endswith(" such as ñ\n")
    (tmp_path / "Sans.ttf").symlink_to(f"{fonts}/DejaVuSans.ttf")
    assert runner.find_font("Жук 猫") == f"{tmp_path}/Sans.ttf"
    assert capsys.readouterr().err.endswith(" such as 猫\n")


def test_the_runner_looks_for_a_font_once(runner, monkeypatch, tmp_path, capsys):
    """For all class names, whichever are in an image."""
    monkeypatch.setattr(runner, "FONT_FOLDERS", (str(tmp_path),))
    image = Image.new("RGB", (90, 60))
    box = {"score": 0.5, "bbox": [10, 10, 50, 40]}
    names = ["猫", "狗", "cat"]
    with runner.Output(str(tmp_path / "out"), [], names) as output:
        for i, shown in enumerate(([0], [1], [0, 1], [2])):
            detections = [{"class": names[j], "class_id": j, **box} for j in shown]
            output.write({"image": f"{i}.png", "detections": detections}, image.copy(), 0.0)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: no installed font has all characters")


def test_charts_write_names_as_they_are(tmp_path):
    from balanced_d2.visualization.error_chart import _draw_bars

    figure = Figure()
    _draw_bars(figure.add_subplot(), ["$\\frac$", "圆形"], [1.0, 2.0], "#000000")
    figure.savefig(tmp_path / "a.png")


def test_the_demo_takes_a_path_for_that_file(tmp_path):
    for name in ("a[1].jpg", "a1.jpg", "b*.jpg", "b2.jpg"):
        (tmp_path / name).touch()
    for given, found in (
        ("a[1].jpg", ["a[1].jpg"]),
        ("b*.jpg", ["b*.jpg"]),
        ("a?.jpg", ["a1.jpg"]),
    ):
        sources = detect.list_sources([str(tmp_path / given)], None)
        assert [source.path for source in sources] == [str(tmp_path / name) for name in found]


@pytest.mark.slow
def test_the_demo_refuses_an_image_with_its_path(tmp_path, demo):
    (tmp_path / "a.png").write_text("text")
    result = run_program(
        *("demo.py", "--config-file", demo / "output" / "config.yaml", "--input"),
        *(tmp_path / "a.png", "--output", tmp_path / "out"),
        *("MODEL.WEIGHTS", demo / "output" / "model_final.pth"),
        env={"DETECTRON2_DATASETS": str(demo / "datasets")},
    )
    assert_user_error(result, f"{tmp_path}/a.png: it is not an image in a format that Pillow reads")
