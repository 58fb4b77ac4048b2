"""What the headers of images say, without reading their pixels."""

import os
from typing import Dict, List, Mapping, NamedTuple, Sequence

from PIL import Image

from balanced_d2.data.checks.records import Finding, Findings
from balanced_d2.data.image import READ_ERRORS, is_deep, max_pixels, reason_of, size_of

MAX_HEADERS = 1000
"""How many images of a dataset are looked at. Faults of an export are in all of them; those of
single images are found by ``tools/check_dataset.py --images``."""


class Header(NamedTuple):
    """What is known of an image without its pixels."""

    width: int
    height: int
    """Once it is rotated as its EXIF data says."""
    is_deep: bool
    """Whether it is gray with more than 8 bits."""

    @staticmethod
    def of(path: str) -> "Header | str":
        """The header of an image, or why it cannot be read."""
        try:
            with Image.open(path) as image:
                return Header(*size_of(image), is_deep(image))
        except READ_ERRORS as error:
            return reason_of(error)


def read_headers(records: Sequence[Dict]) -> Dict[str, "Header | str"]:
    """Headers by path, or why they cannot be read, of at most :data:`MAX_HEADERS` images that are
    spread evenly."""
    step = max(1, -(-len(records) // MAX_HEADERS))
    paths = [os.fspath(record["file_name"]) for record in records[::step] if "file_name" in record]
    return {path: Header.of(path) for path in paths if "://" not in path}


def header_findings(
    records: Sequence[Dict], headers: Mapping[str, "Header | str"], may_skip: bool
) -> List[Finding]:
    """What is wrong with the images of a dataset, as far as their headers and records say.

    Args:
        records: Detectron2's standard dataset dicts, of images that exist.
        headers: from :func:`read_headers`.
        may_skip: whether images that cannot be read will be skipped, and only reported.
    """
    outcome = "will be skipped:" if may_skip else "refused"
    findings = Findings()
    findings.add(
        outcome,
        "image(s) cannot be read",
        [path for path, header in headers.items() if isinstance(header, str)],
        lambda path: f"{path} ({headers[path]})",
        "replace or remove them, or skip them in training with DATALOADER.SKIP_BAD_IMAGES True",
    )
    wrong = {}
    for record in records:
        header = headers.get(os.fspath(record.get("file_name", "")))
        if isinstance(header, Header) and {"width", "height"} <= record.keys():
            sizes = (record["width"], record["height"]), (header.width, header.height)
            if sizes[0] != sizes[1]:
                wrong[os.fspath(record["file_name"])] = "is {2} x {3}, not {0} x {1}".format(
                    *sum(sizes, ())
                )
    findings.add(
        outcome,
        "image(s), rotated as their EXIF data says, have another size than in the annotations",
        list(wrong),
        lambda path: f"{path} ({wrong[path]})",
        "correct width and height, or replace the images",
    )
    large = [r for r in records if r.get("width", 0) * r.get("height", 0) > max_pixels()]
    findings.add(
        outcome,
        f"image(s) have more than the {max_pixels() / 1e6:.0f} megapixels allowed",
        large,
        lambda record: f"{record.get('file_name')} ({record['width']} x {record['height']})",
        "cut them into tiles",
    )
    return findings
