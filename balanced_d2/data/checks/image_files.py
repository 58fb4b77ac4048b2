"""Whether the files of a dataset's images exist, by listings of their folders."""

import os
from typing import Collection, Dict, List, Mapping, Sequence, Set

from detectron2.data import MetadataCatalog

from balanced_d2.data.checks.records import Findings

KEYS = ("file_name", "sem_seg_file_name", "pan_seg_file_name")


def missing_images(records: Sequence[Dict]) -> Dict[str, str]:
    """The images that have no file, or no file with the classes of their pixels.

    Each folder is listed once, which is much faster on network drives than looking up every file.
    Addresses such as ``s3://…`` are not looked up.

    Returns:
        The missing file of each, by the ``file_name`` of its record.
    """
    listings: Dict[str, Set[str]] = {}
    missing: Dict[str, str] = {}
    for record in records:
        for key in KEYS:
            path = os.fspath(record.get(key) or "")
            if not path or "://" in path:
                continue
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = _files_in(folder)
            # The look-up is for file systems that do not tell upper from lower case.
            if name not in listings[folder] and not os.path.isfile(path):
                missing.setdefault(os.fspath(record.get("file_name", path)), path)
    return missing


def with_files(records: Sequence[Dict], missing: Collection[str]) -> List[Dict]:
    """The records without those that :func:`missing_images` has found."""
    return [r for r in records if os.fspath(r.get("file_name", "")) not in missing]


def missing_findings(missing: Mapping[str, str]) -> Findings:
    """A finding that refuses what :func:`missing_images` has found, if that is anything."""
    findings = Findings()
    findings.refuse(
        "image file(s) do not exist",
        list(missing.values()),
        str,
        "check the folder and the names, remove them from the data, or set "
        "DATALOADER.SKIP_BAD_IMAGES to True to leave them out",
    )
    return findings


def unreadable_findings(name: str) -> Findings:
    """A finding that refuses the images that a dataset was registered without, since their size is
    only in their files, which cannot be read; if there are any.

    ``DATALOADER.SKIP_BAD_IMAGES`` allows it. That they are left out is among the notes.
    """
    findings = Findings()
    findings.refuse(
        "image(s) cannot be read",
        MetadataCatalog.get(name).get("unreadable", ()),
        str,
        "add, replace or remove them, or set DATALOADER.SKIP_BAD_IMAGES to True to leave them out",
    )
    return findings


def _files_in(folder: str) -> Set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()
