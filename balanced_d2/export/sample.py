"""The images that a model is traced with, verified on and quantised by."""

import logging
from pathlib import Path
from typing import Iterator, List

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from balanced_d2.data.image import read_image
from balanced_d2.export.run_exported import IMAGES, network_size
from balanced_d2.utils.errors import UserError

logger = logging.getLogger(__name__)

# As many images of a folder are enough to measure ranges on.
MAX_CALIBRATION_IMAGES = 100


def sample_images(cfg: CfgNode, file: str = "") -> List[torch.Tensor]:
    """One image at four sizes, as the network takes it: uint8, shape (C, H, W).

    The first is for tracing. The others, to verify with, are of the size that the config tests at,
    of an odd size, and of one that needs no padding.

    Args:
        cfg: says size and order of the channels.
        file: the image. By default the first one of ``DATASETS.TEST``, or noise if there is none,
            with a warning that says why.

    Raises:
        UserError: if ``file`` cannot be read.
    """
    image = scaled(_read(file, cfg, "sample image") if file else _first_test_image(cfg), cfg)
    height, width = image.shape[:2]
    sizes = [
        (height * 7 // 8, width * 5 // 6),
        (height, width),
        (height * 3 // 4 | 1, width * 2 // 3 | 1),
        (_round_up(height * 9 // 8, 32), _round_up(width * 9 // 8, 32)),
    ]
    resized = (cv2.resize(image, (max(w, 32), max(h, 32))) for h, w in sizes)
    return [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in resized]


def calibration_images(cfg: CfgNode, folder: str) -> Iterator[np.ndarray]:
    """The images of a folder and those below as the network takes them: float32, (C, H, W).

    Of more than ``MAX_CALIBRATION_IMAGES``, so many are taken, evenly spread over their names.

    Args:
        cfg: says size and order of the channels.

    Raises:
        UserError: at once, if the folder has no images, or one cannot be read.
    """
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGES)
    files = [file for file in found if not file.is_dir()]
    if not files:
        raise UserError(f"there are no images in the folder {folder} to quantise by")
    number = min(len(files), MAX_CALIBRATION_IMAGES)
    files = [files[i * len(files) // number] for i in range(number)]

    def read(file: Path) -> np.ndarray:
        return _read(str(file), cfg, "calibration image")

    for file in files:  # a bad one is found before minutes have gone into the export
        read(file)
    progress = tqdm(files, desc="measuring ranges", unit="image", disable=None)
    images = (scaled(read(file), cfg) for file in progress)
    return (image.transpose(2, 0, 1).astype(np.float32) for image in images)


def scaled(image: np.ndarray, cfg: CfgNode) -> np.ndarray:
    """An image as Detectron2's ``ResizeShortestEdge`` scales it for tests, but for its sides, which
    keep a pixel each however thin it is.

    Args:
        image: shape (H, W, C).
        cfg: says ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``.
    """
    height, width = image.shape[:2]
    limits = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    new_width, new_height = network_size(width, height, *limits)
    return T.ResizeTransform(height, width, new_height, new_width).apply_image(image)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _read(file: str, cfg: CfgNode, what: str = "image") -> np.ndarray:
    return read_image(file, cfg.INPUT.FORMAT, what, gray_range=cfg.INPUT.GRAY_RANGE or None)


def _first_test_image(cfg: CfgNode) -> np.ndarray:
    reasons = []
    for dataset in cfg.DATASETS.TEST:
        if dataset not in DatasetCatalog:
            reasons.append(f"{dataset} is not registered (--register)")
            continue
        try:
            return _read(DatasetCatalog.get(dataset)[0]["file_name"], cfg)
        except IndexError:
            reasons.append(f"{dataset} has no images")
        except KeyError as error:
            reasons.append(f"the records of {dataset} have no {error}")
        except (OSError, UserError) as error:
            reasons.append(" ".join(str(error).split()))
    if reasons:
        logger.warning(
            "note: noise is taken for an image to trace and verify with (--sample-image): "
            + "; ".join(reasons)
        )
    blocks = np.random.default_rng(0).integers(256, size=(15, 20, 3), dtype=np.uint8)
    return cv2.resize(blocks, (640, 480), interpolation=cv2.INTER_CUBIC)
