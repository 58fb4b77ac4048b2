"""Finding COCO JSON files and their images in folders."""

import os
import re
from mmap import ACCESS_READ, mmap
from typing import Dict, List, NamedTuple, Optional

from balanced_d2.data.datasets.coco_json import parse_json
from balanced_d2.data.datasets.image_paths import find_images
from balanced_d2.data.datasets.source import SPLITS, split_in
from balanced_d2.utils.errors import UserError

MAX_LOOKED_FOR = 50


class CocoFile(NamedTuple):
    """An annotation file, and the folder that its images are relative to."""

    json_file: str
    image_root: str
    num_images: int


def json_content(path: str) -> object:
    """What is in a JSON file; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return parse_json(file.read())
    except (OSError, ValueError, RecursionError):
        return None


def may_be_coco(path: str) -> bool:
    """Whether a JSON file is for the reader of COCO's: it has images, even if nothing else, or it
    cannot be read, which that reader explains.

    It is searched and not parsed, which takes many times its size in memory, if it has images.
    """
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if re.search(rb'"images"\s*:', content):
                return True
    except (OSError, ValueError):  # the second of an empty file
        return True
    return json_content(path) is None


def is_coco(content: object) -> bool:
    """Whether the content of a file is COCO's, with classes."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    )


def find_coco(root: str, files: Dict[str, Dict], image_dir: Optional[str]) -> Dict[str, CocoFile]:
    """The annotation file of each split; of "" if there is only one, without the name of a split.

    Args:
        root: the folder of everything.
        files: the contents by path.
        image_dir: the folder of the images, if it is given.

    Raises:
        UserError: if there are several for a split, or if the images cannot be found.
    """
    # COCO itself also has files for keypoints, of the same images.
    instances = {p: c for p, c in files.items() if os.path.basename(p).startswith("instances_")}
    splits: Dict[str, List[str]] = {}
    for path in instances or files:
        splits.setdefault(split_in(path, root), []).append(path)
    several = next((paths for paths in splits.values() if len(paths) > 1), None)
    if several or ("" in splits and len(splits) > 1):
        paths = several or [path for paths in splits.values() for path in paths]
        raise UserError(
            f"{root} has several COCO files: {', '.join(sorted(paths))}; give one of them and the "
            "folder of its images"
        )
    return {
        split: CocoFile(
            path, _image_root(path, files[path], root, image_dir), len(files[path]["images"])
        )
        for split, (path,) in splits.items()
    }


def _image_root(path: str, content: Dict, root: str, image_dir: Optional[str]) -> str:
    """The folder in which most of the first images of a file are."""
    folder, name = os.path.split(path)
    stem = re.sub("^instances_", "", os.path.splitext(name)[0])
    split = split_in(path, root)
    names = [stem, *(spelled for spelled, meant in SPLITS.items() if meant == split)]
    around = [image_dir] if image_dir else dict.fromkeys((folder, os.path.dirname(folder), root))
    places = ["", "images", "Images", "JPEGImages", "data", *names]
    places += [os.path.join(*pair) for n in names for pair in (("images", n), (n, "images"))]
    candidates = [os.path.join(a, p) for a in around for p in places]
    images = content["images"][:MAX_LOOKED_FOR]
    file_names = [
        image["file_name"]
        for image in images
        if isinstance(image, dict) and isinstance(image.get("file_name"), str)
    ]

    def found(candidate: str) -> int:
        return sum(os.path.isfile(os.path.join(candidate, n)) for n in file_names if "\0" not in n)

    def found_in_any_spelling(candidate: str) -> int:
        return len(file_names) - len(find_images(candidate, file_names).missing)

    best = max(candidates, key=found)
    if not found(best):
        best = max(candidates, key=found_in_any_spelling)
    if file_names and not found_in_any_spelling(best):
        where = image_dir or f"{folder} and folders near it"
        raise UserError(
            f"{path}: its images, such as {file_names[0]}, have not been found in {where}; give "
            "their folder as the last argument of --register"
        )
    return os.path.normpath(best)
