"""Packages that only some configs need: a missing one is reported at the start, before any work."""

import runpy
import sys

import detectron2.data.transforms as T
import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog

from balanced_d2 import load_config
from balanced_d2.config.checks import check_crop
from balanced_d2.config.lazy import load_lazy_config, trainer_config
from balanced_d2.data.checks.for_model import load
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_MODEL, assert_user_error

LAZY = "configs/COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.py"
MASKS = "configs/COCO-InstanceSegmentation/balanced_mask_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture
def without(monkeypatch):
    """Make a package appear to be missing."""
    return lambda module: monkeypatch.setitem(sys.modules, module, None)


def test_shapely_for_cropped_polygons(without, tiny_coco, tmp_path, train_net_here):
    without("shapely")
    register = ["--register", "cropped", tiny_coco, tiny_coco.parent / "images"]
    options = [*TINY_MODEL, "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", "", "SOLVER.STEPS", "()"]
    options += ["DATASETS.TRAIN", "('cropped',)", "DATASETS.TEST", "()"]
    result = train_net_here(*register, *options, "INPUT.CROP.ENABLED", "True", config=MASKS)
    assert_user_error(result, "INPUT.CROP.ENABLED", "pip install shapely")
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    "options",
    [
        ("INPUT.CROP.ENABLED", "False"),
        ("INPUT.CROP.ENABLED", "True", "INPUT.MASK_FORMAT", "bitmask"),
        ("INPUT.CROP.ENABLED", "True", "MODEL.MASK_ON", "False"),
    ],
)
def test_shapely_is_required_only_if_it_is_used(without, options):
    without("shapely")
    check_crop(load_config(str(ROOT / MASKS), options))


def test_shapely_for_crops_of_a_lazy_config(without):
    without("shapely")
    lazy = load_lazy_config(str(ROOT / LAZY))
    mapper = lazy.dataloader.train.mapper
    mapper.augmentations.append(L(T.RandomCrop)(crop_type="relative", crop_size=(0.5, 0.5)))
    check_crop(trainer_config(lazy))
    mapper.use_instance_mask = True
    with pytest.raises(UserError, match="pip install shapely"):
        check_crop(trainer_config(lazy))


@pytest.mark.parametrize(
    "module, advice", [("lvis", "pip install --no-deps lvis"), ("nowhere", "pip install nowhere")]
)
def test_a_dataset_whose_loader_needs_a_missing_package(without, module, advice):
    without(module)
    DatasetCatalog.register("loaded", lambda: __import__(module))
    try:
        with pytest.raises(UserError, match=f"'loaded'.*without the package {module}.*{advice}"):
            load("loaded")
    finally:
        DatasetCatalog.remove("loaded")
        MetadataCatalog.pop("loaded", None)


def test_missing_opencv_is_reported_by_its_own_name(without):
    """The user chooses one of several packages that provide it; none is required by name."""
    without("cv2")
    file = ROOT / "balanced_d2" / "utils" / "requirements.py"
    with pytest.raises(ModuleNotFoundError, match="pip install opencv-python .*headless"):
        runpy.run_path(str(file))
