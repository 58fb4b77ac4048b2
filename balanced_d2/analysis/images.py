"""What the images themselves show: which cannot be read, and which are there twice.

The hash is the usual one of the low frequencies (pHash), as the package ImageHash has it; that is
one more package to install, for ten lines.
"""

import json
import os
from typing import Dict, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np
from tqdm import tqdm

from balanced_d2.data.checks.collect import image_problem
from balanced_d2.data.image import read_image
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import replacing

SIDE = 16
"""The hash has SIDE * SIDE bits."""
MAX_DISTANCE = 32
"""Images are called duplicates if no more than this many bits differ. Two different photographs
differ in about half of them, copies of another size or quality in a few."""

_VERSION = 1  # of the cache; another one is read again
_ROWS = 512


class Look(NamedTuple):
    """What opening an image has shown."""

    hash: str
    """In hexadecimal digits; empty if the image cannot be read."""
    problem: str
    """Why it cannot be trained on, empty if it can."""


def look_at(records: List[Dict], cache_file: str) -> List[Look]:
    """Open and completely decode all images, except those that have not changed since last time.

    Args:
        records: Detectron2's standard dataset dicts.
        cache_file: keeps what was found, by path, size and date of the image. It may be deleted.
    """
    cache = _read_cache(cache_file)
    looks = []
    try:
        for record in tqdm(records, desc="images", unit="image", disable=None):
            key = _key(record)
            if key is None or key not in cache:
                problem = image_problem(record) or ""
                look = Look(_hash(record["file_name"]), problem)
                if key is None:  # there is no such file
                    looks.append(look)
                    continue
                cache[key] = list(look)
            looks.append(Look(*cache[key]))
    finally:  # also after Ctrl-C
        with replacing(cache_file) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, "images": cache}, file)
    return looks


def _key(record: Dict) -> Optional[str]:
    path = os.path.abspath(record["file_name"])
    try:
        stat = os.stat(path)
    except OSError:
        return None
    expected = (record.get("width"), record.get("height"))
    return json.dumps([path, stat.st_size, stat.st_mtime_ns, *expected])


def _read_cache(path: str) -> Dict[str, List[str]]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content["version"] != _VERSION:
            return {}
        cache = {key: list(map(str, Look(*look))) for key, look in content["images"].items()}
        lengths = {len(bytes.fromhex(value)) for value, _ in cache.values()}
        return cache if lengths <= {0, SIDE * SIDE // 8} else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _hash(path: str) -> str:
    try:
        return perceptual_hash(cv2.cvtColor(read_image(path), cv2.COLOR_BGR2GRAY))
    except UserError:
        return ""


def perceptual_hash(image: np.ndarray) -> str:
    """The hash of an image, which hardly changes with its size, quality and brightness.

    Args:
        image: uint8 (H, W), gray.

    Returns:
        SIDE * SIDE bits in hexadecimal digits: which of the low frequencies (DCT) of the image are
        above their median.
    """
    small = cv2.resize(image, (4 * SIDE, 4 * SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:SIDE, :SIDE].reshape(-1)
    return np.packbits(low > np.median(low[1:])).tobytes().hex()


class Twins(NamedTuple):
    """For every image the most similar one, if that is similar enough to be a duplicate."""

    elsewhere: np.ndarray
    """Int (I,), index of the most similar image in another split, -1 if none is a duplicate."""
    within: np.ndarray
    """Int (I,), the same for the image's own split."""


def find_twins(hashes: List[str], splits: np.ndarray) -> Twins:
    """Find duplicates among images.

    Args:
        hashes: of the I images; an empty one has no twin.
        splits: int (I,), index of the split of each image.
    """
    elsewhere, within = np.full((2, len(hashes)), -1)
    known = np.flatnonzero([bool(value) for value in hashes])
    packed = np.array([list(bytes.fromhex(hashes[i])) for i in known], dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(-1, SIDE * SIDE // 8), axis=1)
    # The product of two rows is the number of equal bits minus that of different ones.
    signs = 2 * bits.astype(np.float32) - 1
    for start in range(0, len(known), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(known)))
        distances = (signs.shape[1] - signs[rows] @ signs.T) / 2
        distances[np.arange(len(rows)), rows] = np.inf
        is_same = splits[known[rows], None] == splits[known][None]
        for twins, wanted in ((elsewhere, ~is_same), (within, is_same)):
            nearest, distance = _nearest(np.where(wanted, distances, np.inf))
            found = distance <= MAX_DISTANCE
            twins[known[rows[found]]] = known[nearest[found]]
    return Twins(elsewhere, within)


def _nearest(distances: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    nearest = distances.argmin(axis=1)
    return nearest, distances[np.arange(len(distances)), nearest]
