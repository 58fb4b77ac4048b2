#!/usr/bin/env python3
"""Print what is wrong in datasets: everything that training refuses, drops or clips."""

import argparse
import logging
import os
import sys
from collections import Counter
from contextlib import contextmanager
from typing import Dict, List, Tuple

# First, so that importing Detectron2 is quiet.
from balanced_d2.data import add_register_argument, check_registered, register_from
from balanced_d2.data.checks.coco_file import check_coco
from balanced_d2.data.checks.for_model import check_files, coco_file, load
from balanced_d2.data.checks.image_files import missing_findings, missing_images
from balanced_d2.data.checks.records import Finding, Findings, examine
from balanced_d2.data.classes import check_names
from balanced_d2.utils.errors import UserError, report_user_errors

# isort: split
from detectron2.data import MetadataCatalog
from PIL import Image, ImageOps
from tqdm import tqdm


def main(args: argparse.Namespace) -> None:
    """Print the findings for all datasets.

    Raises:
        UserError: if anything is refused.
    """
    names = register_from(args)
    names = args.names or names
    if not names:
        raise UserError("there is nothing to check: give a NAME or --register NAME PATH")
    for name in names:
        check_registered(name)
    refused = [name for name in names if not check_dataset(name, args.images)]
    if refused:
        raise UserError(f"cannot be trained on: {', '.join(refused)}")


def check_dataset(name: str, with_images: bool) -> bool:
    """Print the findings and a summary of a dataset; return whether nothing is refused."""
    source = MetadataCatalog.get(name).get("source")
    if source:
        print(f"data set {name!r}: {source}")
    try:
        with silent_warnings():
            findings, records = findings_of(name)
    except UserError as error:
        print(f"refused: {error}")
        return False
    if with_images:
        findings += image_findings(records)
    else:
        findings += missing_findings(missing_images(records))
    for finding in findings:
        print(f"data set {name!r}: {finding}")
    if records:
        print(summary(name, records))
    else:
        print(f"data set {name!r}: cannot be loaded until the above is fixed")
    return not any(finding.refused for finding in findings)


@contextmanager
def silent_warnings():
    """Suppress the warnings of loading, because they will be printed as findings."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def findings_of(name: str) -> Tuple[List[Finding], List[Dict]]:
    """The problems in the annotations, and the records without them; none if the file is refused.

    Raises:
        UserError: if the dataset cannot be loaded at all.
    """
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


def image_findings(records: List[Dict]) -> List[Finding]:
    """Open and completely decode every image of the records."""
    wrong = {}
    for record in tqdm(records, desc="images", unit="image", disable=None):
        path = record["file_name"]
        try:
            with Image.open(path) as image:
                image.load()
                # Detectron2 rotates images by their EXIF data before it checks their size.
                size = ImageOps.exif_transpose(image).size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            wrong[path] = "does not exist" if not os.path.exists(path) else str(error)
            continue
        expected = (record.get("width", size[0]), record.get("height", size[1]))
        if size != expected:
            wrong[path] = "is {} x {}, not {} x {}".format(*size, *expected)
    findings = Findings()
    findings.refuse(
        "image(s) cannot be trained on",
        list(wrong),
        lambda path: f"{path} ({wrong[path]})",
        "replace them or remove them from the dataset",
    )
    return findings


def summary(name: str, records: List[Dict]) -> str:
    annotations = [a for record in records for a in record.get("annotations", ())]
    empty = sum(not record.get("annotations") for record in records)
    counts = Counter(annotation["category_id"] for annotation in annotations)
    classes = MetadataCatalog.get(name).get("thing_classes") or sorted(counts)
    width = max(len(str(label)) for label in (*classes, "class"))
    rows = [f"  {'class':<{width}}  annotations"]
    rows += [f"  {label!s:<{width}}  {counts[i]:>11}" for i, label in enumerate(classes)]
    return "\n".join(
        [
            f"data set {name!r}: {len(records)} images ({empty} without annotations), "
            f"{len(annotations)} usable annotations, {len(classes)} classes",
            *rows,
        ]
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a registered dataset (default: those of --register)",
    )
    parser.add_argument(
        "--images", action="store_true", help="also open every image, which takes a while"
    )
    add_register_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
