"""Pascal VOC: an XML file for each image, as LabelImg, CVAT and Roboflow write them."""

import os
from typing import Dict, List, Optional, Tuple
from xml.etree import ElementTree

from balanced_d2.data.datasets.source import (
    SPLITS,
    ImageIndex,
    Labelled,
    LabelledImage,
    LabelledObject,
    number,
    read_text,
    shorten,
    sorted_by_name,
    split_in,
)
from balanced_d2.utils.errors import UserError, first_of
from balanced_d2.utils.progress import WithBar


def is_voc(path: str) -> bool:
    """Whether an XML file begins as Pascal VOC's do."""
    try:
        for _, element in ElementTree.iterparse(path, events=("start",)):
            return element.tag == "annotation"
    except (ElementTree.ParseError, ValueError, LookupError):
        pass
    # A broken file is reported by the reader.
    with open(path, "rb") as file:
        return b"<annotation>" in file.read(1000)


def kind_of_xml(path: str) -> str:
    """What an XML file is that is not Pascal VOC's, for a message."""
    try:
        for _, element in ElementTree.iterparse(path, events=("start",)):
            known = {"annotations": "CVAT's own XML", "dataset": "XML of dlib's imglab"}
            return known.get(element.tag, f"XML that begins with <{shorten(element.tag)}>")
    except (ElementTree.ParseError, ValueError, LookupError):
        pass
    return "no valid XML"


def read_voc(
    root: str, files: List[str], images: List[str], image_dir: Optional[str] = None
) -> Labelled:
    """Read XML files.

    Splits are those of lists in ``ImageSets/Main``, or else of folders with the name of a split.
    The classes are sorted by name. The corners of boxes are taken as they are, except in the
    original VOC data, where the first pixel is 1. "Difficult" objects are kept, as in
    Detectron2's own reader.

    Args:
        root: the folder of everything.
        files: all files in it.
        images: those in the folder of the images.
        image_dir: that folder, if it is not the same.

    Raises:
        UserError: naming the file and the element.
    """
    xml_files = [path for path in files if path.lower().endswith(".xml")]
    index = ImageIndex(images, image_dir or root)
    read: Dict[str, LabelledImage] = {}
    missing: List[str] = []
    for path in WithBar(xml_files, desc="reading XML", unit="file"):
        image, found = _read_file(path, index)
        read[path] = image
        if not found:
            missing.append(f"{path} ({os.path.basename(image.path)})")
    if len(missing) == len(xml_files):
        raise UserError(
            f"{root}: none of the images of {len(missing)} XML file(s) has been found; give their "
            f"folder as the last argument of --register: {first_of(missing)}"
        )
    labels = {item.label for image in read.values() for item in image.objects}
    splits, notes = _splits(root, files, read)
    return Labelled(
        "Pascal VOC XML",
        sorted_by_name(labels),
        splits,
        notes=(*notes, *index.note_unused({image.path for image in read.values()})),
    )


def _splits(
    root: str, files: List[str], read: Dict[str, LabelledImage]
) -> Tuple[Dict[str, List[LabelledImage]], Tuple[str, ...]]:
    lists = {}
    for path in files:
        folder, name = os.path.split(path)
        stem, suffix = os.path.splitext(name.lower())
        if suffix == ".txt" and stem in SPLITS and "ImageSets" in folder.split(os.sep)[-2:]:
            lists[stem] = path
    if {"train", "val"} & lists.keys():
        lists.pop("trainval", None)
    if not lists:
        splits: Dict[str, List[LabelledImage]] = {}
        for path, image in read.items():
            splits.setdefault(split_in(os.path.join(os.path.dirname(path), "_"), root), [])
            splits[split_in(os.path.join(os.path.dirname(path), "_"), root)].append(image)
        if "" in splits and len(splits) > 1:
            raise UserError(
                f"{root}: {len(splits[''])} XML file(s) are in no folder of a split, but others are"
            )
        return splits, ()
    by_stem: Dict[str, List[LabelledImage]] = {}
    for path, image in read.items():
        by_stem.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(image)
    splits, listed = {}, set()
    for stem, path in lists.items():
        images, unknown = [], []
        for line in filter(None, map(str.strip, read_text(path).splitlines())):
            # VOC's own lists may have a second column; names may have folders and a suffix.
            name = os.path.basename(line.replace("\\", "/"))
            keys = (name, os.path.splitext(name)[0], name.split()[0] if name.split() else "")
            found = next((by_stem[key] for key in keys if key in by_stem), None)
            if found is None or len(found) > 1:
                unknown.append(shorten(line))
            else:
                images += found
                listed.add(found[0].path)
        if unknown:
            raise UserError(
                f"{path}: there is not one XML file for {len(unknown)} of the names in it: "
                f"{first_of(unknown)}"
            )
        if images:
            splits.setdefault(SPLITS[stem], []).extend(images)
    others = [image.path for image in read.values() if image.path not in listed]
    if not others:
        return splits, ()
    return splits, (
        f"left out {len(others)} image(s) that no list in ImageSets names: {first_of(others)}",
    )


def _read_file(path: str, index: ImageIndex) -> Tuple[LabelledImage, bool]:
    """The image of an XML file, and whether it exists."""
    try:
        tree = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    # An unknown encoding is a LookupError.
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path} is not valid XML: {error}") from error
    if tree.tag != "annotation":
        raise UserError(
            f"{path} is not Pascal VOC: it begins with <{shorten(tree.tag)}>, not <annotation>"
        )
    folder, stem = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    name = (tree.findtext("filename") or "").strip()
    # Images are often renamed together with their files, and their names in the files are not.
    named, suffix = os.path.splitext(os.path.basename(name.replace("\\", "/")))
    parent = os.path.join(os.path.basename(folder), stem + (suffix if named == stem else ""))
    image = index.find(parent, folder, path) or (index.find(name, folder, path) if name else None)
    is_one_based = (tree.findtext("source/database") or "").startswith("The VOC")
    objects = [
        _read_object(element, f"{path}, object {position}", float(is_one_based))
        for position, element in enumerate(tree.findall("object"), start=1)
    ]
    found = LabelledImage(
        image or os.path.join(folder, os.path.basename(name.replace("\\", "/")) or stem),
        objects,
        _read_size(tree, path),
    )
    return found, image is not None


def _read_size(tree: ElementTree.Element, path: str) -> Optional[Tuple[int, int]]:
    texts = [(tree.findtext(f"size/{side}") or "0").strip() for side in ("width", "height")]
    try:
        width, height = (int(number(text or "0")) for text in texts)
    except ValueError as error:
        raise UserError(f"{path}: its size is {shorten(' x '.join(texts))}") from error
    # Some programs write 0.
    return (width, height) if width > 0 and height > 0 else None


def _read_object(element: ElementTree.Element, where: str, first_pixel: float) -> LabelledObject:
    label = (element.findtext("name") or "").strip()
    if not label:
        raise UserError(f"{where} has no <name>; add it")
    outline = element.find("polygon")
    polygon = _read_polygon(outline, where) if outline is not None else []
    box = element.find("bndbox")
    if box is None and not polygon:
        kind = "a rotated box" if element.find("robndbox") is not None else "no <bndbox>"
        raise UserError(f"{where} ({shorten(label)}) has {kind}; give it an upright <bndbox>")
    if box is None:
        corners = [min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])]
    else:
        corners = [_read_number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = corners
    return LabelledObject(label, (x0 - first_pixel, y0 - first_pixel, x1, y1), polygon)


def _read_polygon(outline: ElementTree.Element, where: str) -> List[float]:
    """x1, y1, x2, y2, ... (Roboflow), or <pt><x>, <y> (LabelMe)."""
    points = outline.findall("pt")
    if points:
        polygon = [_read_number(point, key, where) for point in points for key in ("x", "y")]
    else:
        count = sum(child.tag[:1] == "x" for child in outline)
        keys = [f"{axis}{i}" for i in range(1, count + 1) for axis in "xy"]
        polygon = [_read_number(outline, key, where) for key in keys]
    if len(polygon) < 6:
        raise UserError(f"{where}: its <polygon> has less than three points; remove it")
    return polygon


def _read_number(element: ElementTree.Element, key: str, where: str) -> float:
    text = element.findtext(key)
    try:
        return number(text or "")
    except ValueError as error:
        raise UserError(
            f"{where}: <{key}> of its <{element.tag}> is "
            + ("missing" if text is None else f"{shorten(text)!r}, not a number")
        ) from error
