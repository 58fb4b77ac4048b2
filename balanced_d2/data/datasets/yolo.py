"""YOLO: a text file for each image, as Ultralytics, Darknet, CVAT, Label Studio and Roboflow write
them, with or without a ``data.yaml``."""

import itertools
import os
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import yaml

from balanced_d2.data.datasets.source import (
    LARGEST_FRACTION,
    SPLITS,
    Keypoints,
    Label,
    Labelled,
    LabelledImage,
    LabelledObject,
    is_image,
    list_files,
    number,
    read_text,
    shorten,
    split_in,
)
from balanced_d2.utils.errors import UserError, first_of
from balanced_d2.utils.progress import WithBar

NAME_FILES = ("_darknet.labels", "classes.txt", "obj.names", "classes.names", "coco.names")


def read_config(path: str) -> Dict:
    """The content of a ``data.yaml``, or of Darknet's ``obj.data``; values are strings, so that a
    class may be called "no" or 1.

    Raises:
        UserError: if it cannot be read.
    """
    text = read_text(path)
    if path.lower().endswith(".data"):
        pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
        return {key.strip(): value.strip() for key, value in pairs}
    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {shorten(str(error), 200)}") from error
    return content if isinstance(content, dict) else {}


def is_yolo_config(path: str) -> bool:
    """Whether a file names the parts of a YOLO dataset."""
    try:
        keys = {str(key) for key in read_config(path)}
    except UserError:
        return os.path.basename(path).lower() == "data.yaml"  # whose reader says what is wrong
    return bool(keys & SPLITS.keys()) and bool(keys & {"names", "nc"})


def read_yolo(config_file: str, image_dir: Optional[str] = None) -> Labelled:
    """Read the dataset that a ``data.yaml`` or an ``obj.data`` describes.

    Paths in it may be relative to it, to its ``path``, or come from another machine or folder: then
    as much of their end is used as exists here. Each is a folder of images, a list of images, or
    several of these.

    Args:
        image_dir: where to look for them first, before the places that the file says.

    Raises:
        UserError: naming the file, and the line or key.
    """
    config = read_config(config_file)
    splits = {key: value for key, value in config.items() if str(key) in SPLITS and value}
    if not splits:
        raise UserError(
            f"{config_file} has none of the keys train, val and test; it has "
            + (shorten(", ".join(map(str, config))) or "none at all")
        )
    folder = os.path.dirname(os.path.abspath(config_file))
    base = config.get("path") or ""
    if not isinstance(base, str):
        raise UserError(f"{config_file}: path is {shorten(base)}, not the name of a folder")
    given = [image_dir] if image_dir else []
    bases = [os.path.join(folder, base), folder, os.path.abspath(base)]
    found: Dict[str, List[str]] = {}
    taken: Dict[str, str] = {}
    notes: Tuple[str, ...] = ()
    for key, value in splits.items():
        words = value if isinstance(value, list) else [value]
        for word in words:
            if not isinstance(word, str) or not word:
                raise UserError(f"{config_file}: {key} is {shorten(value)}, not a path")
            path = resolve(word, given, bases)
            if path is None and SPLITS[str(key)] == "test" and len(splits) > 1:
                # Roboflow writes it whether or not there is one.
                notes += (f"left out {key}: {shorten(word)} does not exist",)
                continue
            if path is None:
                raise UserError(
                    f"{config_file}: {key} is {shorten(word)}, which exists neither there nor "
                    f"from {', '.join(dict.fromkeys(map(os.path.normpath, given + bases)))}"
                )
            if taken.setdefault(path, word) != word:
                raise UserError(
                    f"{config_file}: {shorten(word)} and {shorten(taken[path])} both lead to "
                    f"{path}; correct them, or path"
                )
            images = _listed_images(path, given, bases)
            if not images:
                raise UserError(f"{config_file}: {key} is {shorten(word)}, and {path} has no image")
            found.setdefault(SPLITS[str(key)], []).extend(images)
    names = _names_in(config, config_file, bases + given)
    labelled_files = {image: label_file(image) for images in found.values() for image in images}
    pose = _pose_in(config, config_file, names)
    return _read(config_file, found, labelled_files, names, notes, pose)


def resolve(word: str, *places: Sequence[str]) -> Optional[str]:
    """The existing file or folder that a path means, without as many of its first folders as
    necessary; None if there is none.

    Args:
        *places: folders that it may be relative to; what the first ones have is not looked for in
            others.
    """
    if "\0" in word:
        return None
    if os.path.isabs(word) and os.path.exists(word):
        return os.path.normpath(word)
    parts = [part for part in word.replace("\\", "/").split("/") if part not in ("", ".")]
    start = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    tails = [parts, *(parts[i:] for i in range(max(start, 1), len(parts)))]
    for bases, tail in itertools.product(places, tails):
        for base in bases:
            path = os.path.normpath(os.path.join(base, *tail)) if tail else base
            try:
                if os.path.exists(path):
                    return path
            except (OSError, ValueError):
                return None
    return None


def _listed_images(path: str, given: List[str], bases: List[str]) -> List[str]:
    """The images in a folder, or those that a text file lists."""
    if os.path.isdir(path):
        return [file for file in list_files(path) if is_image(file)]
    if not path.lower().endswith(".txt"):
        return [path] if is_image(path) else []
    lines = [line.strip() for line in read_text(path).splitlines()]
    places = [os.path.dirname(path), *bases]
    found = {line: resolve(line, given, places) for line in lines if line}
    missing = [shorten(line) for line, image in found.items() if not image or os.path.isdir(image)]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(found)} image(s) in it do not exist: "
            f"{first_of(missing)}"
        )
    return [str(found[line]) for line in lines if line]


def _names_in(config: Dict, path: str, bases: List[str]) -> Optional[Dict[Label, str]]:
    names = config.get("names")
    if isinstance(names, str) and names:
        file = resolve(names, bases)
        if file is None or os.path.isdir(file):
            raise UserError(f"{path}: names is {shorten(names)}, which is not a file")
        return _read_names(file)
    if isinstance(names, dict):
        by_number = {}
        for key, name in names.items():
            try:
                by_number[int(key)] = name
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}: names has the key {shorten(key)}, no number") from error
        names = dict(sorted(by_number.items()))
    elif isinstance(names, list):
        names = dict(enumerate(names))
    elif names:
        raise UserError(f"{path}: names is {shorten(names)}, not a list of names")
    try:
        number_of_classes = int(config.get("nc") or config.get("classes") or len(names or ()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: nc is {shorten(config.get('nc'))}, not a number") from error
    if not names:
        if not 0 < number_of_classes <= 10000:
            return None
        return {i: str(i) for i in range(number_of_classes)}
    wrong = [name for name in names.values() if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise UserError(f"{path}: names has {shorten(wrong[0]) or 'an empty name'}, not a name")
    if number_of_classes != len(names):
        raise UserError(
            f"{path}: nc is {number_of_classes}, but there are {len(names)} names; correct one"
        )
    return {label: name.strip() for label, name in names.items()}


class Pose(NamedTuple):
    """How the keypoints of each object are written."""

    keypoints: Keypoints
    size: int
    """Numbers for each: x, y, and visibility if there are three."""


def _pose_in(config: Dict, path: str, names: Optional[Dict[Label, str]]) -> Optional[Pose]:
    if not config.get("kpt_shape"):
        return None
    try:
        count, size = map(int, config["kpt_shape"])
        flips = [int(index) for index in config.get("flip_idx") or range(count)]
        if not (0 < count <= 1000 and size in (2, 3) and sorted(flips) == list(range(count))):
            raise ValueError
    except (TypeError, ValueError) as error:
        shape = ", ".join(f"{k}: {shorten(config.get(k))}" for k in ("kpt_shape", "flip_idx"))
        raise UserError(
            f"{path}: {shape} are not the number of keypoints, 2 or 3, and the order of keypoints "
            "in a flipped image"
        ) from error
    titles = config.get("kpt_names")
    if isinstance(titles, dict):  # for each class, of which those of the first count
        titles = next(iter(titles.values()), None)
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        titles = []
    if len(set(titles)) != count:
        titles = [str(i) for i in range(count)]
    pairs = [(titles[i], titles[other]) for i, other in enumerate(flips) if i < other]
    return Pose(Keypoints(titles, pairs), size)


def _read_names(path: str) -> Dict[Label, str]:
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    empty = next((i for i, name in enumerate(names, start=1) if not name), None)
    if empty or not names:
        raise UserError(f"{path}, line {empty or 1}: there is no name of a class")
    return dict(enumerate(names))


def label_file(image: str) -> str:
    """Where the labels of an image are: in ``labels`` if it is in ``images``, or else beside it."""
    folder, stem = os.path.split(os.path.splitext(image)[0])
    parts = folder.split(os.sep)
    folders = [folder]
    for i in reversed(range(len(parts))):
        if parts[i].lower() == "images":
            spelled = ("labels", "Labels", "LABELS")
            folders = [os.sep.join([*parts[:i], s, *parts[i + 1 :]]) for s in spelled] + folders
            break
    paths = [os.path.join(each, stem + suffix) for each in folders for suffix in (".txt", ".TXT")]
    return next(filter(os.path.isfile, paths), os.path.join(folder, f"{stem}.txt"))


def labels_of(images: List[str], root: str, image_root: str) -> Dict[str, str]:
    """The label file of each image that has one: as in :func:`label_file`, or at the same place in
    another folder."""
    found = {}
    for image in images:
        place = os.path.splitext(os.path.relpath(image, image_root))[0] + ".txt"
        for path in (label_file(image), os.path.join(root, place)):
            if os.path.isfile(path):
                found[image] = path
                break
    return found


def read_yolo_folders(root: str, files: List[str], images: List[str], image_root: str) -> Labelled:
    """Read images and label files from folders, without a ``data.yaml``.

    Splits are folders with their names. The names of the classes are in one of ``NAME_FILES``; if
    there is none, they are numbers.

    Args:
        root, image_root: the folders of the label files and of the images.
        files, images: all files in them.

    Raises:
        UserError: naming the file and the line.
    """
    found = labels_of(images, root, image_root)
    labelled_folders = {os.path.dirname(image) for image in found}
    used = [image for image in images if os.path.dirname(image) in labelled_folders]
    splits: Dict[str, List[str]] = {}
    for image in used:
        splits.setdefault(split_in(os.path.dirname(image) + "/_", image_root), []).append(image)
    if "" in splits and len(splits) > 1:
        raise UserError(
            f"{root}: {len(splits[''])} labelled image(s) are in no folder of a split, but others "
            f"are: {first_of(splits[''])}"
        )
    places = {os.path.dirname(path) for path in found.values()}
    around = [os.path.join(f, n) for f in (*places, os.path.dirname(root)) for n in NAME_FILES]
    name_files = [path for path in files if os.path.basename(path).lower() in NAME_FILES]
    name_files = sorted({*name_files, *filter(os.path.isfile, around)})
    names = {path: _read_names(path) for path in name_files}
    if len(set(map(str, names.values()))) > 1:
        raise UserError(f"{root} has different names of classes in {first_of(name_files)}")
    left_out = [image for image in images if os.path.dirname(image) not in labelled_folders]
    known = {*found.values(), *name_files}
    orphans = [
        path
        for path in files
        if path.lower().endswith(".txt") and os.path.dirname(path) in places and path not in known
    ]
    labels = {image: found.get(image, "") for image in used}
    return _read(
        root,
        splits,
        labels,
        next(iter(names.values()), None),
        (
            *_note(left_out, "image(s) in folders without labels"),
            *_note(orphans, "text file(s) without an image"),
        ),
    )


def _note(paths: List[str], what: str) -> Tuple[str, ...]:
    return (f"left out {len(paths)} {what}: {first_of(paths)}",) if paths else ()


def _read(
    source: str,
    splits: Dict[str, List[str]],
    label_files: Dict[str, str],
    names: Optional[Dict[Label, str]],
    notes: Tuple[str, ...],
    pose: Optional[Pose] = None,
) -> Labelled:
    read: Dict[str, List[LabelledImage]] = {}
    used: Set[Label] = set()
    unlabelled: Dict[str, None] = {}
    for split, images in splits.items():
        if not any(os.path.isfile(label_files[image]) for image in images):
            message = (
                f"none of the {len(images)} images has a label file; that of {images[0]} would be "
                f"{label_files[images[0]] or 'beside it'}"
            )
            if split != "test" or len(splits) == 1:
                raise UserError(f"{source}: {split or 'the dataset'}: {message}")
            notes = (*notes, f"left out test: {message}")
            continue
        read[split] = []
        for image in WithBar(images, desc=f"reading labels {split}", unit="file"):
            path, objects = label_files[image], []
            if os.path.isfile(path):
                objects = read_labels(path, names, pose)
            else:
                unlabelled[image] = None
            used.update(item.label for item in objects)
            read[split].append(LabelledImage(image, objects))
    if unlabelled:
        notes += (
            f"{len(unlabelled)} image(s) have no label file, and so no object in them: "
            f"{first_of(list(unlabelled))}",
        )
    if names is None:
        names = {i: str(i) for i in range(max(map(int, used), default=0) + 1)}
        notes = (*notes, "the names of the classes are in no file: using numbers")
    keypoints = pose and pose.keypoints
    return Labelled("YOLO", names, read, in_fractions=True, notes=notes, keypoints=keypoints)


def read_labels(
    path: str, names: Optional[Dict[Label, str]], pose: Optional[Pose] = None
) -> List[LabelledObject]:
    """The objects in a label file: class, then centre and size of a box, or a polygon, or a box and
    its keypoints.

    Args:
        names: the classes that there are, None if they are not known.
        pose: of the keypoints, if there are any.

    Raises:
        UserError: naming the file and the line.
    """
    lines = read_text(path).splitlines()
    return [
        _read_line(line.split(), names, pose, f"{path}, line {position}")
        for position, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _read_line(
    words: List[str], names: Optional[Dict[Label, str]], pose: Optional[Pose], where: str
) -> LabelledObject:
    try:
        values = [number(word) for word in words]
    except ValueError as error:
        line = shorten(" ".join(words))
        for kind, count, place in (("KITTI", 15, 0), ("DOTA", 10, 8)):
            if len(words) in (count, count + 1) and words[place][:1].isalpha():
                raise UserError(f"{where} is a label of {kind}, not of YOLO: {line}") from error
        advice = "; separate them by spaces" if "," in line else ""
        raise UserError(f"{where}: not all are numbers: {line}{advice}") from error
    points: List[float] = []
    if pose:
        count = len(pose.keypoints.names)
        if len(values) != 5 + count * pose.size:
            raise UserError(
                f"{where} has {len(values)} numbers; a box has 5, and each of the {count} "
                f"keypoints of kpt_shape {pose.size}"
            )
        values, points = values[:5], _keypoints(values[5:], pose.size, where)
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        score = " (is the last one a score? labels have none)" if len(values) == 6 else ""
        raise UserError(
            f"{where} has {len(values)} numbers{score}; a box has 5 (class, x, y, width, height), "
            "a polygon 7, 9, 11, ..."
        )
    label, coordinates = values[0], values[1:]
    if label != int(label) or not (0 <= label < 10000 if names is None else int(label) in names):
        known = ""
        if names is not None and list(names) == list(range(len(names))):
            known = f", but there are {len(names)} classes, from 0"
        elif names is not None:
            known = f", but names has {shorten(', '.join(map(str, names)))}"
        raise UserError(f"{where}: its class is {words[0]}{known}")
    if max(map(abs, coordinates)) > LARGEST_FRACTION:
        raise UserError(
            f"{where}: {shorten(' '.join(words[1:5]))} are no fractions of the image's width and "
            "height; are they pixels? divide them by its size"
        )
    if len(coordinates) > 4:
        xs, ys = coordinates[::2], coordinates[1::2]
        box = (min(xs), min(ys), max(xs), max(ys))
        return LabelledObject(int(label), box, coordinates)
    x, y, width, height = coordinates
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return LabelledObject(int(label), box, keypoints=points)


def _keypoints(values: List[float], size: int, where: str) -> List[float]:
    """x, y and visibility of each; without a visibility, those at 0, 0 are not labelled."""
    points: List[float] = []
    for start in range(0, len(values), size):
        x, y, *given = values[start : start + size]
        visibility = given[0] if given else 2 * (x != 0 or y != 0)
        if visibility not in (0, 1, 2) or max(abs(x), abs(y)) > LARGEST_FRACTION:
            raise UserError(
                f"{where}: a keypoint is {x:g} {y:g} {visibility:g}, not fractions of the image's "
                "width and height, and 0, 1 or 2"
            )
        points += (x, y, visibility) if visibility else (0, 0, 0)
    return points
