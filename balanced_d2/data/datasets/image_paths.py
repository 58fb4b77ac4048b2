"""The files that annotations name, as they are called on this disk."""

import os
import unicodedata
from functools import cache
from typing import Dict, List, NamedTuple, Optional, Sequence
from urllib.parse import unquote

from balanced_d2.data.checks.records import Findings


class Found(NamedTuple):
    """The files of a list of names."""

    paths: List[str]
    """One for each name; for those that are not there, the path as it was given."""
    missing: List[int]
    """Indices of the names of which there is no file."""
    renamed: List[int]
    """Indices of those whose file has another name or place than they say."""


def find_images(root: str, names: Sequence[str]) -> Found:
    """Find the files that a data set names, by listing folders and not one by one.

    A file that has exactly the name is taken. Otherwise one that differs in its slashes, in upper
    and lower case or in the Unicode normal form of letters; and otherwise one at the end of the
    path, for paths of another machine: of ``C:\\data\\images\\1.jpg`` it is ``images/1.jpg`` in
    ``root``, or ``1.jpg``. Such a file is only taken if it is the only one, and of one name only.

    Args:
        root: the folder that names are relative to.
        names: relative or absolute paths.
    """
    paths = [os.path.join(root, name) for name in names]
    if "://" in root:
        return Found(paths, [], [])
    listing = _Listing()
    absent = [index for index, path in enumerate(paths) if not listing.has(path)]
    owners: Dict[str, List[int]] = {}
    for index in absent:
        path = listing.closest(root, names[index])
        if path:
            owners.setdefault(path, []).append(index)
    given = set(paths)
    renamed = []
    for path, indices in owners.items():
        # Several names of one file may be several images of which the others are missing.
        if path not in given and len({names[index] for index in indices}) == 1:
            for index in indices:
                paths[index] = path
            renamed += indices
    return Found(paths, sorted(set(absent) - set(renamed)), sorted(renamed))


def renamed_findings(names: Sequence[str], found: Found) -> Findings:
    """What :func:`find_images` has found by another name or place than ``names`` say."""
    findings = Findings()
    findings.add(
        "found by another name",
        "image(s)",
        found.renamed,
        lambda index: f"{names[index]} is {found.paths[index]}",
    )
    return findings


class _Listing:
    """The contents of folders, each read once."""

    def __init__(self):
        self._names = cache(_names_in)
        self._folded = cache(self._fold_all)

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self._names(folder or ".") if name not in ("", ".", "..") else False

    def _fold_all(self, folder: str) -> Dict[str, Optional[str]]:
        folded: Dict[str, Optional[str]] = {}
        for name in self._names(folder):
            key = fold(name)
            folded[key] = None if key in folded else name
        return folded

    def closest(self, root: str, name: str) -> Optional[str]:
        """The file that another way of writing ``name`` means, None if there is none."""
        for written in dict.fromkeys((name, unquote(name))):
            parts = [p for p in written.replace("\\", "/").split("/") if p not in ("", ".")]
            absolute = os.path.isabs(written)
            if absolute and (path := self._walk(os.sep, parts)):
                return path
            for start in range(len(parts)):
                if path := self._walk(root, parts[start:]):
                    return path
        return None

    def _walk(self, folder: str, parts: Sequence[str]) -> Optional[str]:
        for part in parts:
            if part == "..":
                folder = os.path.dirname(folder) or "."
                continue
            found = part if part in self._names(folder) else self._folded(folder).get(fold(part))
            if found is None:
                return None
            folder = os.path.join(folder, found)
        return folder if os.path.isfile(folder) else None


def _names_in(folder: str) -> frozenset:
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a null character
        return frozenset()


def fold(name: str) -> str:
    """A name without what differs between systems: upper and lower case, and forms of Unicode."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
