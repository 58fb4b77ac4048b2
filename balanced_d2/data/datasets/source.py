"""What the readers of all formats share: labelled images, finding files, and COCO's dictionary."""

import math
import os
import reprlib
from functools import cache
from itertools import takewhile
from typing import Collection, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from balanced_d2.data.datasets.image_paths import fold
from balanced_d2.data.image import size_of
from balanced_d2.utils.errors import UserError, first_of
from balanced_d2.utils.progress import WithBar

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Also of formats that Pillow reads with a plugin only: such images are not overlooked."""
SPLITS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names that people give to splits, and the names they get here."""
UNREADABLE = "unreadable"
"""Key of why an image has no size."""
LARGEST_FRACTION = 2
"""A coordinate farther outside than this is no fraction of an image, but a number of pixels."""

Label = int | str


class LabelledObject(NamedTuple):
    """An object in an image: coordinates in pixels, or in fractions of the image's size."""

    label: Label
    box: Tuple[float, float, float, float]
    """x0, y0, x1, y1."""
    polygon: Sequence[float] = ()
    """x, y, x, y, ... of its outline, if that is known."""
    crowd: bool = False
    keypoints: Sequence[float] = ()
    """x, y, visibility (0: not labelled, 1: hidden, 2: visible), x, y, visibility, ..."""


class LabelledImage(NamedTuple):
    """An image and its objects."""

    path: str
    objects: List[LabelledObject]
    size: Optional[Tuple[int, int]] = None
    """Width and height, if the source has them."""


class Keypoints(NamedTuple):
    """The keypoints that every object of a dataset has."""

    names: List[str]
    flipped: List[Tuple[str, str]] = []
    """Those that change places when an image is flipped."""


class Labelled(NamedTuple):
    """What a reader has read."""

    format: str
    """Its name for the user."""
    classes: Dict[Label, str]
    """The name of each label, in the order of the model's classes."""
    splits: Dict[str, List[LabelledImage]]
    """The images of "train", "val" and "test"; of "" if the source has no split."""
    in_fractions: bool = False
    """Whether coordinates are fractions of the image's size."""
    notes: Tuple[str, ...] = ()
    """What was left out, for the log."""
    keypoints: Optional[Keypoints] = None


def as_coco(labelled: Labelled, image_root: str) -> Dict[str, Dict]:
    """The content of a COCO annotation file for each split.

    Sizes are read from the headers of the images, no pixels are. The names of the images are
    relative to ``image_root``. Categories are numbered from 1. An image that cannot be read, and
    whose size the source does not say, has ``UNREADABLE`` instead: :func:`without_unreadable`.

    Raises:
        UserError: if there are no objects, their corners are none, or the size of an image is not
            the one that the source says.
    """
    _check_objects(labelled)
    numbers = {label: number for number, label in enumerate(labelled.classes, start=1)}
    categories = [
        {"id": number, "name": labelled.classes[label]} for label, number in numbers.items()
    ]
    if labelled.keypoints:
        for category in categories:
            category["keypoints"] = labelled.keypoints.names
    contents = {}
    real = cache(os.path.realpath)
    for split, images in labelled.splits.items():
        sizes = read_sizes(images)
        content: Dict[str, List[Dict]] = {"images": [], "annotations": [], "categories": categories}
        for image, size in zip(images, sizes):
            image_id = len(content["images"]) + 1
            file_name = os.path.relpath(image.path, image_root)
            if file_name.startswith(os.pardir):  # which, behind a link, is of where it leads
                folder, name = os.path.split(image.path)
                file_name = os.path.join(os.path.relpath(real(folder), real(image_root)), name)
            entry = {"id": image_id, "file_name": file_name}
            scale = (1, 1)
            if isinstance(size, str):
                entry[UNREADABLE] = size
            else:
                entry.update(width=size[0], height=size[1])
                scale = size if labelled.in_fractions else scale
            content["images"].append(entry)
            for item in image.objects:
                annotation = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": numbers[item.label],
                    **_shape(item, scale),
                    "iscrowd": int(item.crowd),
                }
                content["annotations"].append(annotation)
        contents[split] = content
    return contents


def without_unreadable(content: Dict) -> Tuple[Dict, List[str]]:
    """The content of a split of :func:`as_coco` without the images that cannot be read, and for
    each of these why.

    Raises:
        UserError: if none can be read.
    """
    why = {i["id"]: i[UNREADABLE] for i in content["images"] if UNREADABLE in i}
    if len(why) == len(content["images"]):
        raise UserError(f"none of the {len(why)} image(s) can be read: {first_of([*why.values()])}")
    images = [image for image in content["images"] if image["id"] not in why]
    annotations = [a for a in content["annotations"] if a["image_id"] not in why]
    return {**content, "images": images, "annotations": annotations}, list(why.values())


def _check_objects(labelled: Labelled) -> None:
    images = [image for of_split in labelled.splits.values() for image in of_split]
    boxes = [(image.path, item.box) for image in images for item in image.objects]
    if not boxes:
        raise UserError(f"none of the {len(images)} image(s) has an object ({labelled.format})")
    # A few are errors, and are dropped as boxes without a size.
    wrong = [(path, box) for path, box in boxes if box[2] < box[0] or box[3] < box[1]]
    if len(wrong) > 0.1 * len(boxes):
        path, box = wrong[0]
        raise UserError(
            f"{len(wrong)} of {len(boxes)} boxes end before they begin, the first in {path}: "
            f"{shorten(box)}; are they x, y, width, height instead of two corners?"
        )


def _shape(item: LabelledObject, scale: Tuple[int, int]) -> Dict:
    x0, y0, x1, y1 = (value * scale[i % 2] for i, value in enumerate(item.box))
    shape: Dict = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": max(0, x1 - x0) * max(0, y1 - y0)}
    if item.polygon:
        polygon = [value * scale[i % 2] for i, value in enumerate(item.polygon)]
        xs, ys = polygon[::2], polygon[1::2]
        doubled = sum(x * ys[i - 1] - xs[i - 1] * y for i, (x, y) in enumerate(zip(xs, ys)))
        shape.update(segmentation=[polygon], area=abs(doubled) / 2)
    if item.keypoints:
        shape["keypoints"] = [value * (*scale, 1)[i % 3] for i, value in enumerate(item.keypoints)]
    return shape


def read_sizes(images: List[LabelledImage]) -> List[Tuple[int, int] | str]:
    """Width and height of each image, as it is shown: rotated as its EXIF data says.

    An image that cannot be read has the size that the source says, since it is reported where it
    is used, or else the reason instead.

    Raises:
        UserError: if the source says another size.
    """
    sizes: List[Tuple[int, int] | str] = []
    different = []
    for image in WithBar(images, desc="reading sizes", unit="image"):
        try:
            size = image_size(image.path)
        except UserError as error:
            sizes.append(image.size or str(error))
            continue
        if image.size and size != image.size:
            different.append("{} is {} x {}, not {} x {}".format(image.path, *size, *image.size))
        sizes.append(size)
    if different:
        raise UserError(
            f"{len(different)} of {len(images)} image(s) do not have the size for which they were "
            "annotated (were they scaled, or rotated by their EXIF data?): " + first_of(different)
        )
    return sizes


def image_size(path: str) -> Tuple[int, int]:
    """Width and height of an image, rotated as its EXIF data says, from its header.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return size_of(image)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty") from error
        raise UserError(
            f"{path} is not an image in a format that Pillow reads; convert it to PNG or JPEG"
        ) from error
    except Exception as error:  # Pillow's formats raise errors of many types
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def list_files(folder: str) -> List[str]:
    """All files in a folder and its sub-folders, sorted; hidden ones are left out.

    These include what macOS adds to archives. Links to folders are followed once.

    Raises:
        OSError: if a folder cannot be read.
    """

    files: List[str] = []
    folders, seen = [folder], {os.path.realpath(folder)}
    while folders:
        with os.scandir(folders.pop()) as entries:
            inner = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in inner:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in seen:
                    folders.append(entry.path)
                    seen.add(real)
            elif entry.is_file() or not os.path.exists(entry.path):  # no pipe, which would block
                files.append(entry.path)
    return sorted(files)


def is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def split_in(path: str, root: str) -> str:
    """The split that the name of a file or of a folder around it says, inside of ``root``; "" if
    none does. The outermost folder counts, then the file."""
    parts = os.path.relpath(path, root).lower().split(os.sep)
    for part in parts[:-1]:
        if part.rstrip("0123456789") in SPLITS:
            return SPLITS[part.rstrip("0123456789")]
    words = "".join(c if c.isalpha() else " " for c in parts[-1]).split()
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def read_text(path: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 (byte {error.start + 1}); save it as UTF-8"
        ) from error


def number(text: str) -> float:
    """A finite number, or ValueError."""
    value = float(text)
    if not math.isfinite(value) or "_" in text:  # Python reads 1_0 as 10
        raise ValueError(f"{text!r} is not a finite number")
    return value


def shorten(text: object, length: int = 80) -> str:
    """A text from a file for a message, on one line."""
    # A few lines of YAML can be a list that is endless as text.
    line = " ".join((text if isinstance(text, str) else reprlib.repr(text)).split())
    return line if len(line) <= length else line[:length] + "..."


def check_found(root: str, paths: Collection[str]) -> None:
    """Raise :class:`UserError` if none of the images of a dataset exists.

    That some are missing is reported where they are needed.
    """
    missing = [path for path in paths if not os.path.exists(path)]
    if missing and len(missing) == len(paths):
        raise UserError(
            f"{root}: none of the {len(paths)} images has been found; give their folder as the "
            f"last argument of --register: {first_of(sorted(missing))}"
        )


def sorted_by_name(labels: Iterable[Label]) -> Dict[Label, str]:
    """Classes in the order of their names; if all are numbers, of these."""
    names = {label: str(label) for label in labels}
    are_numbers = all(name.isdecimal() for name in names.values())
    order = sorted(names, key=lambda x: (int(names[x]) if are_numbers else 0, names[x]))
    return {label: names[label] for label in order}


class _Folders(NamedTuple):
    """The folders on the way to one, from the root of the file system."""

    names: List[str]
    folded: List[str]


def _folders_of(folder: str) -> _Folders:
    names = os.path.abspath(folder).split(os.sep)
    return _Folders(names, list(map(fold, names)))


def _num_equal(some: Iterable[str], others: Iterable[str]) -> int:
    """How many of the first ones are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others)))


class ImageIndex:
    """Finds the images that annotations name, although folders have been moved.

    Args:
        files: those in the folder of the images; others than images are ignored.
        root: that folder.
    """

    def __init__(self, files: Iterable[str], root: str):
        self._root = root
        self.images = [path for path in files if is_image(path)]
        # As the names of annotations are written: without the "./" of the current folder.
        self._paths = {os.path.normpath(path): path for path in self.images}
        self._by_name: Dict[str, List[str]] = {}
        self._by_stem: Dict[str, List[str]] = {}
        for path in self.images:
            name = fold(os.path.basename(path))
            self._by_name.setdefault(name, []).append(path)
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(path)
        self._named: Dict[str, Tuple[str, bool]] = {}
        self._folders_of = cache(_folders_of)

    def find(self, name: str, near: str, where: str) -> Optional[str]:
        """The image with a name, None if there is none.

        It is the file of that path, absolute, or relative to ``near``, to the folder around it or
        to that of the images; otherwise the one that has the same name and most of the same
        folders, whatever its suffix, and of several the one closest to ``near``.

        Args:
            name: with or without folders and a suffix, with / or \\.
            near: the folder of the annotation.
            where: the annotation, for messages.

        Raises:
            UserError: if there are several, or another name has led to the same image, and one of
                the two is not its path.
        """
        name = name.strip()
        if not name or "\0" in name:
            return None
        found = self._exact(name, near)
        is_exact = found is not None
        if found is None:
            parts = name.replace("\\", "/").split("/")
            # Names that tools write as parts of an address.
            found = self._similar(parts, near, where) or self._similar(
                [unquote(part) for part in parts], near, where
            )
        if found is None:
            return None
        other, other_is_exact = self._named.setdefault(found, (name, is_exact))
        if other != name and not (is_exact and other_is_exact):
            missing, present = (other, name) if is_exact else (name, other)
            raise UserError(
                f"{where}: there is no image {shorten(missing)}, and {found}, which has its file "
                f"name, has been found for {shorten(present)}: give the folder of the images as "
                "the last argument of --register"
            )
        return found

    def _exact(self, name: str, near: str) -> Optional[str]:
        forms = dict.fromkeys((name, name.replace("\\", "/"), unquote(name)))
        # A name that says its folder may do so from the folder around the annotation's.
        around = [os.path.dirname(near)] if any(map(os.path.dirname, forms)) else []
        places = (os.path.join(f, form) for f in (near, self._root, *around) for form in forms)
        for path in dict.fromkeys(map(os.path.normpath, places)):
            if path in self._paths:
                return self._paths[path]
            if os.path.isabs(name) and os.path.isfile(path):
                return path
        return None

    def _similar(self, parts: List[str], near: str, where: str) -> Optional[str]:
        *folders, last = map(fold, parts)
        stem = os.path.splitext(last)[0] if is_image(last) else last
        found = self._by_name.get(last) or self._by_stem.get(stem, [])
        if len(found) <= 1:
            return found[0] if found else None

        around = self._folders_of(near)

        def likeness(path: str) -> Tuple[int, bool, int]:
            own = self._folders_of(os.path.dirname(path))
            same = _num_equal(reversed(own.folded), reversed(folders))
            return same, own.names == around.names, _num_equal(own.names, around.names)

        found = sorted(found, key=likeness, reverse=True)
        if likeness(found[0]) == likeness(found[1]):
            is_same = os.path.dirname(found[0]) == os.path.dirname(found[1])
            advice = "give the folder of the images as the last argument of --register"
            raise UserError(
                f"{where}: {shorten('/'.join(parts))} may be {found[0]} or {found[1]}: "
                + ("remove one" if is_same else advice)
            )
        return found[0]

    def note_unused(self, used: Set[str]) -> Tuple[str, ...]:
        """A note about the images that no annotation names."""
        unused = [path for path in self.images if path not in used]
        if not unused:
            return ()
        return (f"left out {len(unused)} image(s) without annotations: {first_of(unused)}",)
