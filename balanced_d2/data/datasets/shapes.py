"""Synthetic detection datasets: shapes of very different sizes over clutter, from a seed."""

import json
import math
import shutil
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np
from iopath.common.file_io import file_lock
from tqdm import tqdm

from balanced_d2.utils.errors import UserError

CLASSES = ("disk", "square", "triangle", "ring", "cross")
HUES = (0, 30, 65, 105, 145)
"""The hue around which each class is coloured (OpenCV: 0 to 180)."""
TAIL_CLASSES = ("red", "orange", "lime", "green", "jade", "azure", "blue", "violet", "pink")
"""The classes of data with a tail: hues at equal distances, of all shapes."""
SPLITS = {"train": 320, "val": 80}
"""Number of images of each split."""

# Increase this when the drawing changes: datasets drawn by an older version are drawn again.
VERSION = 1


class ShapesConfig(NamedTuple):
    """The appearance of a dataset of shapes."""

    image_size: Tuple[int, int] = (128, 160)
    """Height and width in pixels."""
    shape_size: Tuple[float, float] = (12.0, 84.0)
    """Smallest and largest side of a shape's box in pixels; sizes are log-uniform between."""
    shapes_per_image: Tuple[int, int] = (4, 9)
    """Fewest and most shapes in an image."""
    min_visible: float = 0.6
    """Minimum share of a shape's pixels that stays visible where shapes overlap."""
    jpeg_quality: int = 92
    seed: int = 0
    tail: float = 0.0
    """0: the classes are the shapes, all as frequent. Otherwise they are :data:`TAIL_CLASSES`,
    alike in difficulty because they differ in hue alone, and in the training split the most
    frequent has this many times the objects of the rarest, with equal ratios between neighbours.
    Which class is how frequent depends on the seed. In the other split all are as frequent."""


DEFAULT = ShapesConfig()
TAIL = ShapesConfig(tail=100.0)


def class_names(config: ShapesConfig) -> Tuple[str, ...]:
    """The classes of a dataset, in order."""
    return TAIL_CLASSES if config.tail else CLASSES


def class_shares(config: ShapesConfig, split: str) -> np.ndarray:
    """The share of each class among the objects of a split, (K,), as it is drawn."""
    number = len(class_names(config))
    if not config.tail or split != "train":
        return np.full(number, 1 / number)
    shares = config.tail ** (-np.arange(number) / (number - 1))
    order = np.random.default_rng((config.seed, len(SPLITS))).permutation(number)
    return (shares / shares.sum())[order]


def ensure_shapes(folder: str, config: ShapesConfig = DEFAULT) -> None:
    """Draw the dataset into ``folder`` unless it exists: ``SPLIT.json`` and ``SPLIT/*.jpg``.

    The folder appears only when it is complete. Processes that call this at the same time wait
    for each other. An older version of the same dataset is replaced; any other folder with that
    name is left alone.

    Raises:
        UserError: if the folder cannot be written or contains something else.
    """
    target = Path(folder).absolute()
    expected = {"generator": "balanced_shapes", "version": VERSION, **config._asdict()}
    if not config.tail:  # so that data of before there was one stay
        del expected["tail"]
    expected = json.loads(json.dumps(expected))  # tuples as they read back from a file
    if _read_info(target) == expected:
        return
    try:
        with file_lock(str(target)):
            info = _read_info(target)
            if info == expected:
                return
            if target.exists() and (info or {}).get("generator") != "balanced_shapes":
                raise UserError(
                    f"{target} exists but is not the generated dataset balanced_shapes; move it "
                    "away or set DETECTRON2_DATASETS to another folder"
                )
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _draw_splits(partial, config)
            (partial / "info.json").write_text(json.dumps(expected, indent=2))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    except OSError as error:
        raise UserError(
            f"cannot write the generated dataset to {target} ({error.strerror}); set "
            "DETECTRON2_DATASETS to a folder that is writable"
        ) from error


def _read_info(folder: Path) -> Optional[Dict]:
    try:
        return json.loads((folder / "info.json").read_text())
    except (OSError, ValueError):
        return None


def _draw_splits(folder: Path, config: ShapesConfig) -> None:
    progress = tqdm(total=sum(SPLITS.values()), desc="drawing shapes", unit="image", disable=None)
    for index, (split, num_images) in enumerate(SPLITS.items()):
        (folder / split).mkdir()
        images: List[Dict] = []
        annotations: List[Dict] = []
        for image_id in range(1, num_images + 1):
            rng = np.random.default_rng((config.seed, index, image_id))
            image, shapes = draw_image(rng, config, split)
            file_name = f"{image_id:06d}.jpg"
            cv2.imwrite(
                str(folder / split / file_name),
                image,
                [cv2.IMWRITE_JPEG_QUALITY, config.jpeg_quality],
            )
            height, width = image.shape[:2]
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
            for category, box in shapes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
            progress.update()
        categories = [
            {"id": i, "name": name} for i, name in enumerate(class_names(config), start=1)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    progress.close()


def draw_image(
    rng: np.random.Generator, config: ShapesConfig, split: str = "train"
) -> Tuple[np.ndarray, List[Tuple[int, List[int]]]]:
    """Draw one image.

    Returns:
        uint8 image (H, W, 3), BGR; list of (class index, box as x, y, width, height in pixels).
        The boxes enclose the whole shapes, even where another shape covers a part.
    """
    image = _draw_background(rng, config.image_size)
    _draw_clutter(rng, image)
    categories: List[int] = []
    masks: List[np.ndarray] = []
    visible: List[np.ndarray] = []
    for _ in range(int(rng.integers(*config.shapes_per_image, endpoint=True))):
        shape = category = int(rng.integers(len(CLASSES)))
        if config.tail:
            category = int(rng.choice(len(TAIL_CLASSES), p=class_shares(config, split)))
        mask = _place(rng, CLASSES[shape], config, masks, visible)
        if mask is None:
            continue
        if config.tail:
            _paint(rng, image, mask, 180 * category / len(TAIL_CLASSES), spread=6)
        else:
            _paint(rng, image, mask, HUES[category])
        visible = [part & ~mask for part in visible]
        categories.append(category)
        masks.append(mask)
        visible.append(mask)
    image = cv2.GaussianBlur(image, (3, 3), 0.5)
    image = image + rng.normal(0, rng.uniform(2, 8), image.shape)
    shapes = [(c, list(cv2.boundingRect(mask))) for c, mask in zip(categories, masks)]
    return image.clip(0, 255).astype(np.uint8), shapes


def _draw_background(rng: np.random.Generator, size: Tuple[int, int]) -> np.ndarray:
    # A few random greys with a tint, enlarged: a soft, uneven background.
    greys = rng.uniform(50, 205, (3, 4, 1))
    colours = (greys + rng.uniform(-15, 15, (3, 4, 3))).astype(np.float32)
    return cv2.resize(colours, size[::-1], interpolation=cv2.INTER_CUBIC)


def _draw_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(6, 18))):
        points = rng.uniform(0, (width, height), (int(rng.integers(2, 5)), 2)).astype(np.int32)
        colour = (rng.uniform(0, 255) + rng.uniform(-30, 30, 3)).tolist()
        cv2.polylines(image, [points], False, colour, int(rng.integers(1, 3)), cv2.LINE_AA)


def _place(
    rng: np.random.Generator,
    name: str,
    config: ShapesConfig,
    others: List[np.ndarray],
    visible: List[np.ndarray],
) -> Optional[np.ndarray]:
    """The mask of a shape that hides none of the others too much, or None if there is no room.

    Args:
        others: the masks of the existing shapes.
        visible: the part of each that is still visible.
    """
    height, width = config.image_size
    size = math.exp(rng.uniform(*np.log(config.shape_size)))
    for _ in range(20):
        half = size / 2
        centre = rng.uniform((half, half), (width - half, height - half))
        mask = _shape_mask(name, centre, size, rng.uniform(0, 2 * math.pi), config.image_size)
        left = [
            np.count_nonzero(part & ~mask) / np.count_nonzero(other)
            for other, part in zip(others, visible)
        ]
        if mask.any() and min(left, default=1.0) >= config.min_visible:
            return mask
    return None


def _shape_mask(name: str, centre, size: float, angle: float, image_size) -> np.ndarray:
    """uint8 mask, 1 inside the shape, whose outer circle has diameter ``size``."""
    mask = np.zeros(image_size, np.uint8)
    radius = size / 2
    if name == "disk":
        cv2.circle(mask, _fixed(centre), _fixed(radius), 1, cv2.FILLED, shift=_SHIFT)
    elif name == "ring":
        cv2.circle(mask, _fixed(centre), _fixed(radius), 1, cv2.FILLED, shift=_SHIFT)
        cv2.circle(mask, _fixed(centre), _fixed(radius * 0.55), 0, cv2.FILLED, shift=_SHIFT)
    elif name == "cross":
        for turn in (0, math.pi / 2):
            # A bar three times as long as it is wide.
            corners = _polygon(centre, radius, [angle + turn + a for a in _BAR_CORNERS])
            cv2.fillPoly(mask, [corners], 1, shift=_SHIFT)
    else:
        num_corners = {"triangle": 3, "square": 4}[name]
        angles = [angle + 2 * math.pi * k / num_corners for k in range(num_corners)]
        cv2.fillPoly(mask, [_polygon(centre, radius, angles)], 1, shift=_SHIFT)
    return mask


_SHIFT = 4  # fractional bits of OpenCV's coordinates
_BAR_CORNERS = [s * math.atan(1 / 3) + t for t in (0, math.pi) for s in (-1, 1)]


def _fixed(value):
    return np.round(np.asarray(value) * 2**_SHIFT).astype(int).tolist()


def _polygon(centre, radius: float, angles: List[float]) -> np.ndarray:
    points = [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]
    return np.array(_fixed(points), np.int32)


def _paint(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, hue: float, spread: float = 10
) -> None:
    """Fill the mask with a colour near the hue, a little uneven."""
    inside = mask.astype(bool)
    hsv = [(hue + rng.uniform(-spread, spread)) % 180, rng.uniform(130, 255), rng.uniform(110, 255)]
    colour = cv2.cvtColor(np.array([[hsv]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    shade: np.ndarray = rng.uniform(0.85, 1.15, (4, 4)).astype(np.float32)
    shade = cv2.resize(shade, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    image[inside] = colour * shade[inside, None]
