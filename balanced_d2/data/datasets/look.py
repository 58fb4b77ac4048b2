"""Finds out which format the user's dataset has."""

import os
from collections import Counter
from typing import Dict, List, Optional

from balanced_d2.data.datasets.coco_files import CocoFile, find_coco, is_coco, json_content
from balanced_d2.data.datasets.csv_file import read_csv, table_in
from balanced_d2.data.datasets.source import SPLITS, Labelled, is_image, list_files, shorten
from balanced_d2.data.datasets.via import is_via, is_via_csv, read_via
from balanced_d2.data.datasets.voc import is_voc, kind_of_xml, read_voc
from balanced_d2.data.datasets.yolo import (
    is_yolo_config,
    labels_of,
    read_yolo,
    read_yolo_folders,
)
from balanced_d2.utils.errors import UserError, first_of, raise_user_errors

# Own readers: datumaro and supervision read these formats too, but each with a heavy tree of
# dependencies, and neither says which line of which file is wrong.

KNOWN = "COCO JSON, YOLO, Pascal VOC XML or CSV"
UNKNOWN = "an object"
JSON_KINDS = (
    ("LabelMe's (an image a file)", {"shapes", "imagePath"}),
    ("Supervisely's", {"objects", "size"}),
    ("Supervisely's", {"classes", "tags"}),
    ("Datumaro's", {"items", "infos"}),
    ("CreateML's", {"image", "annotations"}),
    ("Label Studio's own", {"data", "annotations"}),
    ("Label Studio's short form", {"annotator", "annotation_id"}),
    ("Labelbox's", {"data_row", "projects"}),
    ("Google Vertex AI's", {"imageGcsUri"}),
)
"""Formats by the keys of their files, or of the first item in these."""
OTHER_FILES = {
    "TFRecord": (".tfrecord", ".tfrecords", ".record"),
    "JSON Lines, as of Google Vertex AI, Labelbox and Amazon SageMaker": (
        *(".jsonl", ".ndjson", ".manifest"),
    ),
    "a table of Hugging Face": (".parquet", ".arrow"),
    "a file of MATLAB": (".mat",),
}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".bz2", ".xz")
# So many JSON files in a folder are one for each image, of which the first says enough.
MAX_JSON_FILES = 20

Found = Labelled | Dict[str, CocoFile]


def look(path: str, image_dir: Optional[str] = None) -> Found:
    """Read a dataset whatever its format.

    Args:
        path: a file or folder with annotations.
        image_dir: the folder of the images, if they are elsewhere.

    Raises:
        UserError: if there is none or more than one format; and on what is wrong in it.
    """
    path, image_dir = os.path.normpath(path), image_dir and os.path.normpath(image_dir)
    for given in filter(None, (path, image_dir)):
        if not os.path.exists(given):
            raise UserError(f"{given} does not exist")
    if image_dir and not os.path.isdir(image_dir):
        raise UserError(f"{image_dir} is not a folder of images")
    with raise_user_errors(path):
        return (_look_in_folder if os.path.isdir(path) else _read_file)(path, image_dir)


def _read_file(path: str, image_dir: Optional[str]) -> Found:
    # The name of a file that is given by itself says no split: readers of tables take it for the
    # folder of everything.
    folder = os.path.dirname(path) or "."
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".yaml", ".yml", ".data"):
        return read_yolo(path, image_dir)
    if suffix == ".json":
        content = json_content(path)
        if is_via(content):
            images = list_files(image_dir or folder)
            return read_via(path, {path: content}, images, image_dir or folder)
        if not isinstance(content, dict) or not is_coco(content):
            raise UserError(f"{path} is not COCO JSON, but {_kind_of_json(content)}; use {KNOWN}")
        (file,) = find_coco(folder, {path: content}, image_dir).values()
        return {"": file}
    images = list_files(image_dir or folder)
    if suffix == ".xml":
        if not is_voc(path):
            raise UserError(f"{path} is not Pascal VOC XML, but {kind_of_xml(path)}; use {KNOWN}")
        return read_voc(folder, [path], images, image_dir)
    if suffix in (".csv", ".tsv", ".txt"):
        if is_via_csv(path):
            return read_via(path, {path: None}, images, image_dir or folder)
        return read_csv(path, [path], images, image_dir or folder)
    kind = _kind_of_file(path)
    raise UserError(f"{path} is " + (kind or f"not a dataset in the format {KNOWN}"))


def _look_in_folder(root: str, image_dir: Optional[str]) -> Found:
    root = _innermost(root)
    image_root = image_dir or root
    files = list_files(root)
    images = [path for path in (list_files(image_dir) if image_dir else files) if is_image(path)]
    by_suffix: Dict[str, List[str]] = {}
    for path in files:
        by_suffix.setdefault(os.path.splitext(path)[1].lower(), []).append(path)

    def of(*suffixes: str) -> List[str]:
        return [path for suffix in suffixes for path in by_suffix.get(suffix, [])]

    configs = [path for path in of(".yaml", ".yml", ".data") if is_yolo_config(path)]
    labelled = [] if configs else list(labels_of(images, root, image_root).values())
    xml_files = [path for path in of(".xml") if is_voc(path)]
    tables = [path for path in of(".csv", ".tsv") if _is_table(path)]
    outermost = sorted(of(".json"), key=lambda path: path.count(os.sep))[:MAX_JSON_FILES]
    contents = {path: json_content(path) for path in outermost}
    coco = {path: c for path, c in contents.items() if isinstance(c, dict) and is_coco(c)}
    via: Dict[str, object] = {path: c for path, c in contents.items() if is_via(c)}
    via.update(dict.fromkeys(path for path in of(".csv") if is_via_csv(path)))
    found = {
        "YOLO": configs or labelled,
        "Pascal VOC XML": xml_files,
        "CSV": tables,
        "COCO JSON": list(coco),
        "VGG Image Annotator": list(via),
    }
    present = {name: paths for name, paths in found.items() if paths}
    if len(present) > 1:
        listed = " and ".join(f"{name} ({first_of(paths, 2)})" for name, paths in present.items())
        raise UserError(f"{root} has {listed}: give the file or the folder that you mean")
    if len(configs) > 1:
        raise UserError(f"{root} has several YOLO datasets: {first_of(configs, 10)}; give one")
    if configs:
        return read_yolo(configs[0], image_dir)
    if labelled:
        return read_yolo_folders(root, files, images, image_root)
    if xml_files:
        return read_voc(root, files, images, image_dir)
    if tables:
        return read_csv(root, tables, images, image_root)
    if coco:
        return find_coco(root, coco, image_dir)
    if via:
        return read_via(root, via, images, image_dir)
    for path in of(".csv", ".tsv"):
        table_in(path)  # says why, if it cannot be read
    raise UserError(f"{root} has no {KNOWN}: {_what_is_there(files, contents)}")


def _is_table(path: str) -> bool:
    try:
        return table_in(path) is not None
    except UserError:
        return False


def _innermost(folder: str) -> str:
    """The folder in a folder that has nothing else, as archives unpack."""
    while True:
        names = [n for n in os.listdir(folder) if not n.startswith(".") and n != "__MACOSX"]
        inner = os.path.join(folder, names[0]) if len(names) == 1 else ""
        has_meaning = bool(inner) and names[0].lower() in (*SPLITS, "images", "annotations")
        if not os.path.isdir(inner) or os.path.islink(inner) or has_meaning:
            return folder
        folder = inner


def _what_is_there(files: List[str], contents: Dict[str, object]) -> str:
    if not files:
        return "it is empty"
    kinds = {path: _kind_of_json(content) for path, content in contents.items()}
    for path, kind in sorted(kinds.items(), key=lambda item: item[1].startswith(UNKNOWN)):
        return f"{path} is {kind}"
    for path in files:
        kind = _kind_of_file(path)
        if kind:
            return f"{path} is {kind}"
    counts = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in files)
    return "it has " + ", ".join(f"{n} file(s) {suffix}" for suffix, n in counts.most_common(5))


def _kind_of_file(path: str) -> str:
    """What a file is that is not read, for a message; "" if that is not known."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".xml":
        return f"{kind_of_xml(path)}; export the data as {KNOWN}"
    if suffix in ARCHIVES:
        return "an archive; unpack it, and give the folder"
    for kind, suffixes in OTHER_FILES.items():
        if suffix in suffixes or any(f"{other}-" in os.path.basename(path) for other in suffixes):
            return f"{kind}; export the data as {KNOWN}"
    return ""


def _kind_of_json(content: object) -> str:
    """What a JSON file is that is not COCO's, for a message."""
    item = content[0] if isinstance(content, list) and content else content
    if isinstance(item, dict):
        keys = {str(key) for key in item}
        if keys >= {"image_id", "score"}:
            return "detections, which are no annotations"
        for kind, marks in JSON_KINDS:
            if keys >= marks:
                return f"{kind}, to be exported as COCO"
    if isinstance(content, dict):
        return f"{UNKNOWN} with {shorten(', '.join(sorted(map(str, content))[:5])) or 'nothing'}"
    return "a list" if isinstance(content, list) else "no valid JSON"
