"""Print what is wrong in datasets: everything that training refuses, drops or clips."""

import argparse
from collections import Counter
from typing import Dict, List

# First, so that importing Detectron2 is quiet.
from balanced_d2.data import add_register_argument, check_registered, register_from
from balanced_d2.data.checks.collect import (
    file_findings,
    findings_of,
    image_findings,
    image_problem,
)
from balanced_d2.data.checks.records import left_out_findings
from balanced_d2.utils.errors import UserError

# isort: split
from detectron2.data import MetadataCatalog
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
    metadata = MetadataCatalog.get(name)
    for line in filter(None, (metadata.get("source"), *metadata.get("notes", ()))):
        print(f"data set {name!r}: {line}")
    try:
        findings, records = findings_of(name)
    except UserError as error:
        print(f"refused: {error}")
        return False
    findings += left_out_findings(records, filter_empty=True)
    if with_images:
        images = tqdm(records, desc="images", unit="image", disable=None)
        problems = {record["file_name"]: image_problem(record) for record in images}
        findings += image_findings({path: what for path, what in problems.items() if what})
    else:
        findings += file_findings(records)
    for finding in findings:
        print(f"data set {name!r}: {finding}")
    if records:
        print(summary(name, records))
    else:
        print(f"data set {name!r}: cannot be loaded until the above is fixed")
    return not any(finding.refused for finding in findings)


def summary(name: str, records: List[Dict]) -> str:
    annotations = [
        a for record in records for a in record.get("annotations", ()) if not a.get("iscrowd", 0)
    ]
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
