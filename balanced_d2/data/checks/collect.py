"""Everything that is wrong in a dataset, without stopping at it."""

import logging
import os
from contextlib import contextmanager
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.data import MetadataCatalog

from balanced_d2.data.checks.coco_file import check_coco
from balanced_d2.data.checks.for_model import check_files, coco_file, load
from balanced_d2.data.checks.image_files import (
    missing_findings,
    missing_images,
    unreadable_findings,
    with_files,
)
from balanced_d2.data.checks.image_headers import header_findings, read_headers
from balanced_d2.data.checks.records import Finding, Findings, examine
from balanced_d2.data.classes import check_names
from balanced_d2.data.image import ImageError, read_image
from balanced_d2.utils.errors import UserError


def findings_of(name: str) -> Tuple[List[Finding], List[Dict]]:
    """The problems in the annotations, and the records without them; none if the file is refused.

    Raises:
        UserError: if the dataset cannot be loaded at all.
    """
    with _silent_warnings():
        check_files(name)
        json_file = coco_file(name)
        root = MetadataCatalog.get(name).get("image_root")
        in_file = check_coco(name, json_file, image_root=root) if json_file else []
        if any(finding.refused for finding in in_file):
            return in_file, []
        records = load(name)
        if not records:
            raise UserError(f"data set {name!r} has no images")
        check_names(name, MetadataCatalog.get(name).get("thing_classes", ()))
        records, findings = examine(name, records)
    # The check of a file has already found everything.
    found = in_file if json_file else findings
    return [*found, *unreadable_findings(name)], records


@contextmanager
def _silent_warnings():
    """Suppress the warnings of loading, because they are among the findings."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def file_findings(records: Sequence[Dict]) -> List[Finding]:
    """What is wrong with the images, as far as listings of their folders and headers say."""
    missing = missing_images(records)
    present = with_files(records, missing)
    headers = header_findings(present, read_headers(present), may_skip=False)
    return [*missing_findings(missing), *headers]


def image_problem(record: Dict) -> Optional[str]:
    """Open and completely decode the image of a record; return why it cannot be trained on."""
    path = record["file_name"]
    try:
        height, width = read_image(path).shape[:2]
    except ImageError as error:
        reason = str(error).removeprefix(f"cannot read the image {path}: ")
        return reason if os.path.exists(path) else "does not exist"
    size = (width, height)
    expected = (record.get("width", width), record.get("height", height))
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
