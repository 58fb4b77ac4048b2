"""Dividing a dataset into train and val."""

import hashlib
from typing import Dict, FrozenSet, List, Set, Tuple

from balanced_d2.utils.errors import UserError, first_of

SEED = 0


def split_content(content: Dict, fraction: float) -> Tuple[Dict[str, Dict], Tuple[str, ...]]:
    """Divide the content of a COCO annotation file by image.

    Args:
        content: lists of images, annotations and categories.
        fraction: the share of the images for "val".

    Returns:
        The contents of "train" and "val", and notes on what could not be done.

    Raises:
        UserError: if there are less than two images.
    """
    names = {_hashable(image.get("id")): _name(image) for image in content["images"]}
    labels: Dict[str, Set[str]] = {name: set() for name in names.values()}
    for annotation in content["annotations"]:
        name = names.get(_hashable(annotation.get("image_id")))
        if name is not None:
            labels[name].add(str(annotation.get("category_id")))
    val = choose_val({name: frozenset(classes) for name, classes in labels.items()}, fraction)
    contents = {}
    for split, is_val in (("train", False), ("val", True)):
        images = [image for image in content["images"] if (_name(image) in val) == is_val]
        ids = {_hashable(image.get("id")) for image in images}
        annotations = [a for a in content["annotations"] if _hashable(a.get("image_id")) in ids]
        contents[split] = {**content, "images": images, "annotations": annotations}
    titles = {str(c.get("id")): str(c.get("name")) for c in content["categories"]}
    one_sided = [
        titles.get(label, label)
        for label, held_by in _holders(list(labels), labels).items()
        if len(held_by) > 1 and len({name in val for name in held_by}) == 1
    ]
    if not one_sided:
        return contents, ()
    return contents, (
        f"{len(one_sided)} class(es) are only in one part of --split, because of the classes that "
        f"they share images with: {first_of(sorted(one_sided), 10)}",
    )


def _name(image: Dict) -> str:
    return str(image.get("file_name")).replace("\\", "/")


def _hashable(value: object) -> object:
    return value if isinstance(value, (int, str)) else None


def choose_val(labels: Dict[str, FrozenSet[str]], fraction: float) -> Set[str]:
    """Choose the images for validation, the same on every machine.

    Every class that at least two images have is in both parts, unless other classes in the same
    images rule it out, with about ``fraction`` of its images in the chosen part: iterative
    stratification, which begins with the rarest class (Sechidis et al., 2011). Within a class, the
    order follows from a hash of the names.

    Args:
        labels: the classes in each image, by the image's name.
        fraction: in (0, 1).

    Raises:
        UserError: if there are less than two images.
    """
    if len(labels) < 2:
        raise UserError(f"--split needs at least two images, but there are {len(labels)}")
    names = sorted(labels, key=_digest)
    holders = _holders(names, labels)
    in_val: Dict[str, bool] = {}
    for label in sorted(holders, key=lambda label: (len(holders[label]), label)):
        chosen = sum(in_val.get(name, False) for name in holders[label])
        wanted = _share(len(holders[label]), fraction)
        for name in holders[label]:
            if name not in in_val:
                in_val[name] = chosen < wanted
                chosen += in_val[name]
    chosen, wanted = sum(in_val.values()), _share(len(names), fraction)
    for name in names:
        if name not in in_val:
            in_val[name] = chosen < wanted
            chosen += in_val[name]
    _bring_to_both(in_val, labels, holders)
    if len(set(in_val.values())) == 1:  # every class is in a single image
        for name in names:
            in_val[name] = False
        for name in names[:wanted]:
            in_val[name] = True
    return {name for name in names if in_val[name]}


def _share(count: int, fraction: float) -> int:
    """The part of ``count`` for validation, so that both parts have one if there are two."""
    return min(max(1, round(fraction * count)), count - 1)


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"{SEED}/{name}".encode("utf-8", "surrogatepass")).digest()


def _holders(names: List[str], labels) -> Dict[str, List[str]]:
    """The images of each class."""
    holders: Dict[str, List[str]] = {}
    for name in names:
        for label in sorted(labels[name]):
            holders.setdefault(label, []).append(name)
    return holders


def _bring_to_both(
    in_val: Dict[str, bool],
    labels: Dict[str, FrozenSet[str]],
    holders: Dict[str, List[str]],
) -> None:
    """Move images so that more classes are in both parts."""
    chosen = {label: sum(map(in_val.__getitem__, names)) for label, names in holders.items()}

    def one_sided(label: str, change: int = 0) -> bool:
        total = len(holders[label])
        return total > 1 and not 0 < chosen[label] + change < total

    def move_one() -> bool:
        """Move the first image that helps; return whether there is one."""
        for label in filter(one_sided, holders):
            for name in holders[label]:
                change = -1 if in_val[name] else 1
                before = sum(one_sided(other) for other in labels[name])
                if sum(one_sided(other, change) for other in labels[name]) < before:
                    in_val[name] = not in_val[name]
                    for other in labels[name]:
                        chosen[other] += change
                    return True
        return False

    while move_one():  # each leaves fewer classes in only one part
        pass
