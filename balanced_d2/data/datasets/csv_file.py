"""CSV tables of boxes: with a header (torchvision's and TensorFlow's tutorials, Roboflow, Open
Images), or without (keras-retinanet, makesense.ai, Google's AutoML and Vertex)."""

import csv
import io
import os
import re
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from balanced_d2.data.datasets.source import (
    LARGEST_FRACTION,
    SPLITS,
    ImageIndex,
    Label,
    Labelled,
    LabelledImage,
    LabelledObject,
    check_found,
    is_image,
    number,
    read_text,
    shorten,
    sorted_by_name,
    split_in,
)
from balanced_d2.utils.errors import UserError, first_of

COLUMNS = {
    "file": ("filename", "file", "image", "imagename", "imagepath", "path", "filepath", "imageid"),
    "label": ("class", "label", "labelname", "classname", "category", "categoryname", "name"),
    # x1 is the first corner beside x2, and the second beside x0.
    "x0": ("xmin", "x0", "x1", "left", "bboxxmin"),
    "y0": ("ymin", "y0", "y1", "top", "bboxymin"),
    "x1": ("xmax", "x2", "x1", "right", "bboxxmax"),
    "y1": ("ymax", "y2", "y1", "bottom", "bboxymax"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
    "split": ("split", "set", "subset", "usage", "mluse"),
    "crowd": ("isgroupof", "iscrowd"),
}
"""The names of columns, in small letters without other characters."""
BOX = ("x0", "y0", "x1", "y1")
CORNER_AND_SIZE = ("x0", "y0", "box_width", "box_height")
NAME_FILES = ("classes.csv", "_classes.csv", "class_mapping.csv", "class-descriptions.csv")
NUMBERS = (*BOX, "box_width", "box_height", "width", "height")
GOOGLE_SPLITS = ("train", "training", "validation", "validate", "test", "unassigned")


class Table(NamedTuple):
    """The columns of a file."""

    format: str
    columns: Dict[str, int]
    """The number of each column by its key in ``COLUMNS``."""
    has_header: bool
    in_fractions: bool
    delimiter: str = ","


def table_in(path: str) -> Optional[Table]:
    """The columns of a file, None if it is no table of boxes.

    Raises:
        UserError: if it cannot be read.
    """
    text = read_text(path)
    line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=line.count)
    rows = _rows(path, text[: len(line) + 20000], delimiter)
    try:
        _, row = next(rows)
    except (StopIteration, UserError):
        return None
    names = [re.sub("[^a-z0-9]", "", cell.lower()) for cell in row]
    columns = {
        key: next(names.index(name) for name in known if name in names)
        for key, known in COLUMNS.items()
        if any(name in names for name in known)
    }
    required = ("file", "label", *BOX)
    if len({columns[key] for key in required if key in columns}) == len(required):
        is_open_images = {"imageid", "labelname"} <= set(names)
        kind = "CSV of Open Images" if is_open_images else "CSV with a header"
        if is_open_images:
            columns = {key: i for key, i in columns.items() if key not in ("width", "height")}
        return Table(kind, columns, True, is_open_images, delimiter)
    first = row[0].strip().lower()
    if len(row) >= 8 and (first in GOOGLE_SPLITS or first.startswith("gs://")):
        columns = {"file": 0, "label": 1, "x0": 2, "y0": 3, "x1": 6, "y1": 7}
        if first in GOOGLE_SPLITS:
            columns = {"split": 0, **{key: i + 1 for key, i in columns.items()}}
        return Table("CSV of Google's AutoML", columns, False, True, delimiter)
    if len(row) == 6 and _are_numbers(row[1:5]):
        columns = {"file": 0, "x0": 1, "y0": 2, "x1": 3, "y1": 4, "label": 5}
        return Table("CSV without a header", columns, False, False, delimiter)
    if len(row) == 8 and is_image(row[5]) and _are_numbers(row[1:5] + row[6:]):
        columns = {"label": 0, "file": 5, "width": 6, "height": 7}
        columns.update({key: i for i, key in enumerate(CORNER_AND_SIZE, start=1)})
        return Table("CSV of makesense.ai", columns, False, False, delimiter)
    if len(row) == 8 and is_image(row[0]) and _are_numbers(row[1:3] + row[4:]):
        columns = {"file": 0, "width": 1, "height": 2, "label": 3}
        columns.update({key: i for i, key in enumerate(BOX, start=4)})
        return Table("CSV without a header", columns, False, False, delimiter)
    return None


def _are_numbers(texts: List[str]) -> bool:
    """Whether all are numbers, or empty."""
    try:
        for text in filter(str.strip, texts):
            number(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _rows(path: str, text: str, delimiter: str) -> Iterator[Tuple[int, List[str]]]:
    """The rows that are not empty, each with the number of its last line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error
        if any(cell.strip() for cell in row):
            yield reader.line_num, row


def read_csv(root: str, files: List[str], images: List[str], image_root: str) -> Labelled:
    """Read tables of boxes.

    Splits are in a column, or in the names of the files or of their folders. The classes are sorted
    by name, except where a file of ``NAME_FILES`` beside them numbers them.

    Args:
        root: the folder of everything.
        files: the tables.
        images: the files in ``image_root``, the folder of the images.

    Raises:
        UserError: naming the file and the line.
    """
    index = ImageIndex(images, image_root)
    splits: Dict[str, List[LabelledImage]] = {}
    formats, in_fractions = set(), set()
    labels: set[Label] = set()
    owners: Dict[Tuple[str, str], str] = {}
    for path in files:
        table = table_in(path)
        if table is None:
            row = shorten(next(iter(read_text(path).splitlines()), "") or "nothing")
            raise UserError(
                f"{path} is no table of boxes; its first line is: {row}. Known are a header with "
                "filename, class, xmin, ymin, xmax, ymax, rows path,x1,y1,x2,y2,class without a "
                "header, and the tables of Google, makesense.ai, Open Images and VIA"
            )
        formats.add(table.format)
        in_fractions.add(table.in_fractions)
        for split, image in _read_table(path, table, index, split_in(path, root)):
            other = owners.setdefault((split, image.path), path)
            if other != path:
                raise UserError(f"{other} and {path} both have {image.path}: give one of them")
            splits.setdefault(split, []).append(image)
            labels.update(item.label for item in image.objects)
    if not splits:
        raise UserError(f"{root}: there is no row with an image")
    if "" in splits and len(splits) > 1:
        raise UserError(
            f"{root}: {len(splits[''])} image(s) belong to no split, but others do: "
            + first_of([image.path for image in splits[""]])
        )
    if len(in_fractions) > 1:
        raise UserError(f"{root} has tables of different formats: {', '.join(sorted(formats))}")
    used = {image.path for images_of in splits.values() for image in images_of}
    check_found(root, used)
    return Labelled(
        " and ".join(sorted(formats)),
        _classes(files, labels),
        splits,
        in_fractions.pop(),
        index.note_unused(used),
    )


def _read_table(
    path: str, table: Table, index: ImageIndex, split: str
) -> Iterator[Tuple[str, LabelledImage]]:
    read: Dict[Tuple[str, str], LabelledImage] = {}
    found: Dict[str, str] = {}
    first_rows: List[str] = []
    looks_like_fractions = not table.in_fractions
    rows = _rows(path, read_text(path), table.delimiter)
    if table.has_header:
        next(rows)
    folder = os.path.dirname(path)
    for line, row in rows:
        where = f"{path}, line {line}"
        cells = {key: row[i].strip() if i < len(row) else "" for key, i in table.columns.items()}
        cells = {key: "" if c.lower() in ("nan", "null") else c for key, c in cells.items()}
        if table.delimiter != ",":  # as Excel writes decimals where it separates by semicolons
            cells.update({key: cells[key].replace(",", ".") for key in NUMBERS if key in cells})
        name = cells["file"]
        if not name:
            raise UserError(f"{where} names no image: {shorten(table.delimiter.join(row))}")
        if name not in found:
            image = index.find(name, folder, where)
            found[name] = image or os.path.join(folder, name.replace("\0", ""))
        key = (_split(cells, split, where), found[name])
        if key not in read:
            read[key] = LabelledImage(found[name], [], _size(cells, where))
        if any(cells.get(part) for part in (*BOX, "box_width", "box_height", "label")):
            item = _read_row(cells, where)
            if table.in_fractions and max(map(abs, item.box)) > LARGEST_FRACTION:
                raise UserError(
                    f"{where}: {shorten(item.box)} are no fractions of the image's width and "
                    f"height, as they are in {table.format}; divide them by its size"
                )
            read[key].objects.append(item)
            first_rows = first_rows or [where]
            looks_like_fractions &= max(map(abs, item.box)) <= 1
    if first_rows and looks_like_fractions:
        raise UserError(
            f"{path}: all boxes are between 0 and 1, but have to be in pixels ({first_rows[0]} is "
            "the first); multiply them by the size of the image"
        )
    return iter([(of_split, image) for (of_split, _), image in read.items()])


def _split(cells: Dict[str, str], split: str, where: str) -> str:
    word = cells.get("split", "").lower()
    if not word or word == "unassigned":
        return split
    if word not in SPLITS:
        raise UserError(f"{where}: its split is {shorten(word)}, not train, val or test")
    return SPLITS[word]


def _size(cells: Dict[str, str], where: str) -> Optional[Tuple[int, int]]:
    texts = (cells.get("width", ""), cells.get("height", ""))
    if not all(texts):
        return None
    try:
        width, height = (int(number(text)) for text in texts)
    except ValueError as error:
        raise UserError(f"{where}: the image's size is {shorten(' x '.join(texts))}") from error
    return (width, height) if width > 0 and height > 0 else None


def _read_row(cells: Dict[str, str], where: str) -> LabelledObject:
    if not cells["label"]:
        raise UserError(f"{where} has a box, but no class")
    keys = BOX if "x1" in cells else CORNER_AND_SIZE
    try:
        x0, y0, x1, y1 = (number(cells[key]) for key in keys)
    except ValueError as error:
        box = shorten(", ".join(cells[key] for key in keys))
        raise UserError(f"{where}: its box is {box}, not four numbers") from error
    if keys is CORNER_AND_SIZE:
        x1, y1 = x0 + x1, y0 + y1
    crowd = cells.get("crowd", "").lower() in ("1", "1.0", "true")
    return LabelledObject(cells["label"], (x0, y0, x1, y1), crowd=crowd)


def _classes(files: List[str], labels: set) -> Dict[Label, str]:
    """The classes in the order of a file with name, number, or else sorted; Open Images' codes
    have their names from a file with code, name."""
    for folder in dict.fromkeys(map(os.path.dirname, files)):
        for name in sorted(os.listdir(folder or ".")):
            if not name.lower().endswith(NAME_FILES) and "class-descriptions" not in name.lower():
                continue
            path = os.path.join(folder, name)
            pairs = [row for _, row in _rows(path, read_text(path), ",")]
            if any(len(row) != 2 for row in pairs):
                continue
            first, second = ([row[i].strip() for row in pairs] for i in (0, 1))
            if labels <= set(first) and all(text.isdecimal() for text in second):
                order = sorted(range(len(first)), key=lambda i: int(second[i]))
                return {first[i]: first[i] for i in order}
            if labels <= set(first):
                titles: Dict[Label, str] = {k: v for k, v in zip(first, second) if k in labels}
                return dict(sorted(titles.items(), key=lambda item: item[1]))
    return sorted_by_name(labels)
