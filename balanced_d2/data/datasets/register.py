"""The ``--register`` argument: a user's own dataset without Python code."""

import argparse
import atexit
import functools
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.utils.logger import log_first_n

from balanced_d2.data.datasets.coco import register_coco
from balanced_d2.data.datasets.coco_files import CocoFile, may_be_coco
from balanced_d2.data.datasets.coco_json import read_coco
from balanced_d2.data.datasets.look import Found, look
from balanced_d2.data.datasets.source import (
    SPLITS,
    Labelled,
    LabelledImage,
    as_coco,
    without_unreadable,
)
from balanced_d2.data.datasets.split import split_content
from balanced_d2.utils.arguments import split_at_key
from balanced_d2.utils.errors import UserError, first_of
from balanced_d2.utils.files import raise_if_unwritable


def add_register_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--register",
        nargs="+",
        action="append",
        default=[],
        # With as many names as in a call; argparse has no form for "one or two".
        metavar=("NAME", "PATH"),
        help="register a dataset (COCO JSON, YOLO, Pascal VOC XML, CSV, VIA) under a name: its "
        "file or folder and, if necessary, the folder of its images (repeatable)",
    )
    parser.add_argument(
        "--split",
        type=float,
        metavar="FRACTION",
        help="divide what --register has without a split into NAME_train and NAME_val",
    )


def register_from(args: argparse.Namespace) -> List[str]:
    """Register the datasets of ``--register``. Each process has to do this for itself.

    The options of the config that ``--register`` has taken for paths are moved to ``args.opts``.

    Returns:
        The names that were registered.

    Raises:
        UserError: if a name is already taken, a dataset cannot be recognised or it is not valid.
    """
    names: List[str] = []
    fraction = getattr(args, "split", None)  # absent where a program makes its arguments itself
    if fraction is not None and not args.register:
        raise UserError("--split divides the datasets of --register, of which there are none")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"--split is {fraction}, not between 0 and 1")
    for i, words in enumerate(args.register):
        paths, options = split_at_key(words, start=2)
        if options and hasattr(args, "opts"):
            args.register[i], args.opts = paths, options + args.opts
            words = paths
        if not 2 <= len(words) <= 3:
            raise UserError(
                "--register takes a name, a file or folder and, if necessary, the folder of the "
                f"images, but is given: {' '.join(words)}"
            )
        image_dir = words[2] if len(words) == 3 else None
        names += register_source(words[0], words[1], image_dir, fraction)
    return names


def register_source(
    name: str, path: str, image_dir: Optional[str] = None, fraction: Optional[float] = None
) -> List[str]:
    """Register a dataset of any format: ``name``, or ``name_train`` and others for its splits.

    A COCO file whose image folder is given is not read before it is used. Of others, the
    annotations and the sizes of the images are read.

    Args:
        fraction: if the dataset has no split, it is divided into ``name_train`` and ``name_val``,
            which has this share of the images.

    Returns:
        The names that were registered.

    Raises:
        UserError: as for :func:`register_from`.
    """
    is_json = path.lower().endswith(".json")
    if fraction is None and image_dir is not None and is_json and may_be_coco(path):
        register_coco(name, path, image_dir)
        return [name]
    try:
        return _register_found(name, path, image_dir, look(path, image_dir), fraction)
    except UserError as error:
        raise UserError(f"--register {name}: {error}") from error


def _register_found(
    name: str, path: str, image_dir: Optional[str], found: Found, fraction: Optional[float]
) -> List[str]:
    notes: Tuple[str, ...] = ()
    contents: Dict[str, Dict] = {}
    # The names in it decide on the split, and so do not depend on where its images lie.
    root = image_dir or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
    if isinstance(found, Labelled):
        contents = as_coco(found, root)
        notes = (*found.notes, *_note_shared(found.splits))
    if fraction is not None:
        if len(found.splits if isinstance(found, Labelled) else found) > 1:
            raise UserError(f"{path} already has a split; leave out --split")
        if not isinstance(found, Labelled):
            (file,) = found.values()
            content, findings = read_coco(name, file.json_file)
            contents, root, notes = {"": content}, file.image_root, tuple(map(str, findings))
        (content,) = contents.values()
        contents, more = split_content(content, fraction)
        notes += more
    unreadable: Dict[str, List[str]] = {}
    if isinstance(found, Labelled):
        for split, content in contents.items():
            contents[split], unreadable[split] = without_unreadable(content)
    all_unreadable = [why for of_split in unreadable.values() for why in of_split]
    if all_unreadable:
        notes += (f"left out {len(all_unreadable)} image(s): {first_of(all_unreadable)}",)
    if isinstance(found, Labelled) or fraction is not None:
        files = {split: CocoFile("", root, len(c["images"])) for split, c in contents.items()}
    else:
        files = found
    order = ("", *dict.fromkeys(SPLITS.values()))
    names = {split: f"{name}_{split}" if split else name for split in order if split in files}
    kind = found.format if isinstance(found, Labelled) else "COCO JSON"
    counts = ", ".join(f"{n} ({files[split].num_images} images)" for split, n in names.items())
    line = f"{kind} from {path}: {counts}"
    metadata: Dict = {"source": line, "notes": notes}
    if isinstance(found, Labelled) and found.keypoints:
        points = found.keypoints
        metadata.update(keypoint_names=points.names, keypoint_flip_map=points.flipped)
    for split, full_name in names.items():
        json_file = files[split].json_file
        if split in contents:
            json_file = _write_json(full_name, contents[split])
            metadata.update(origin=path, unreadable=unreadable.get(split, []))
        log = functools.partial(_log, line, notes)
        register_coco(full_name, json_file, files[split].image_root, prepare=log, **metadata)
    return list(names.values())


def _note_shared(splits: Dict[str, List[LabelledImage]]) -> Tuple[str, ...]:
    """A note about images that are in several splits, as in Ultralytics' examples: there, results
    say nothing about other images."""
    counts = Counter(path for images in splits.values() for path in {i.path for i in images})
    shared = [path for path, count in counts.items() if count > 1]
    if not shared:
        return ()
    return (f"{len(shared)} image(s) are in more than one split: {first_of(shared)}",)


def _log(line: str, notes: Sequence[str]) -> None:
    # When a dataset is first loaded, because there is no log yet when it is registered.
    log_first_n(logging.INFO, line, key="message", name=__name__)
    for note in notes:
        log_first_n(logging.WARNING, f"{line}: {note}", key="message", name=__name__)


def _write_json(name: str, content: Dict) -> str:
    """Write an annotation file, which evaluators read, for as long as this process runs."""
    folder = _temporary_folder()
    path = os.path.join(folder, f"{name.replace(os.sep, '_')}.json")
    with raise_if_unwritable(path), open(path, "w") as file:
        json.dump(content, file)
    return path


@functools.cache
def _temporary_folder() -> str:
    with raise_if_unwritable(f"the folder for temporary files {tempfile.gettempdir()}"):
        folder = tempfile.mkdtemp(prefix="balanced_d2_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
