"""Everything that is wrong in a dataset, without stopping at it."""

import logging
import os
from contextlib import contextmanager
from typing import Dict, List, Mapping, Optional, Tuple

from detectron2.data import MetadataCatalog
from PIL import Image, ImageOps

from balanced_d2.data.checks.coco_file import check_coco
from balanced_d2.data.checks.for_model import check_files, coco_file, load
from balanced_d2.data.checks.records import Finding, Findings, examine
from balanced_d2.data.classes import check_names
from balanced_d2.utils.errors import UserError


def findings_of(name: str) -> Tuple[List[Finding], List[Dict]]:
    """The problems in the annotations, and the records without them; none if the file is refused.

    Raises:
        UserError: if the dataset cannot be loaded at all.
    """
    with _silent_warnings():
        check_files(name)
        json_file = coco_file(name)
        in_file = check_coco(name, json_file) if json_file else []
        if any(finding.refused for finding in in_file):
            return in_file, []
        records = load(name)
        if not records:
            raise UserError(f"data set {name!r} has no images")
        check_names(name, MetadataCatalog.get(name).get("thing_classes", ()))
        records, findings = examine(name, records)
    # The check of a file has already found everything.
    return in_file if json_file else findings, records


@contextmanager
def _silent_warnings():
    """Suppress the warnings of loading, because they are among the findings."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def image_problem(record: Dict) -> Optional[str]:
    """Open and completely decode the image of a record; return why it cannot be trained on."""
    path = record["file_name"]
    try:
        with Image.open(path) as image:
            image.load()
            # Detectron2 rotates images by their EXIF data before it checks their size.
            size = ImageOps.exif_transpose(image).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        return reason if os.path.exists(path) else "does not exist"
    expected = (record.get("width", size[0]), record.get("height", size[1]))
    return None if size == expected else "is {} x {}, not {} x {}".format(*size, *expected)


def image_findings(problems: Mapping[str, str]) -> List[Finding]:
    """The finding about images, from what :func:`image_problem` says by path."""
    findings = Findings()
    findings.refuse(
        "image(s) cannot be trained on",
        list(problems),
        lambda path: f"{path} ({problems[path]})",
        "replace them or remove them from the dataset",
    )
    return findings
