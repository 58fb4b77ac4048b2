"""Registered datasets as a model takes them: its classes in its order, only images that exist."""

from typing import Any, Collection, Dict, List, NamedTuple, Optional, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

IDS = "thing_dataset_id_to_contiguous_id"  # of the metadata


class Change(NamedTuple):
    """How a dataset differs from what its loader gives."""

    numbers: Optional[List[int]] = None
    """The model's number of each of its classes; None: the same."""
    missing: Collection[str] = frozenset()
    """The images that are left out, by ``file_name``."""


def adapt(name: str, change: Change, classes: Sequence[str]) -> None:
    """Register a dataset again, under the same name, with a change. Each process has to do this.

    The metadata have ``thing_classes`` at once, and category ids once the dataset is loaded: its
    own for its classes, unused ones for classes that it does not have. With images left out,
    ``images_left_out`` is their number.

    Args:
        classes: the model's, if the numbers change.
    """
    own, load_own = MetadataCatalog.get(name), DatasetCatalog.data[name]
    changed: Dict[str, Any] = {}
    if change.numbers is not None:
        changed["thing_classes"] = list(classes)
    if change.missing:
        changed["images_left_out"] = len(change.missing)
    adapted = Metadata(**{**own.as_dict(), **changed})

    def load() -> List[Dict]:
        # Loaders write into the metadata, which allow no other value.
        MetadataCatalog[name] = own
        try:
            records = load_own()
        finally:
            MetadataCatalog[name] = adapted
        vars(adapted).update({**own.as_dict(), **changed})
        kept = [record for record in records if record.get("file_name") not in change.missing]
        if change.numbers is None:
            return kept
        vars(adapted).pop("thing_colors", None)  # of classes in another order
        if own.get(IDS) is not None:
            vars(adapted)[IDS] = _ids(own.get(IDS), change.numbers, len(classes))
        return [_renumbered(record, change.numbers) for record in kept]

    DatasetCatalog.data[name] = load
    MetadataCatalog[name] = adapted


def _ids(own: Dict[int, int], numbers: Sequence[int], num_classes: int) -> Dict[int, int]:
    ids = {category: numbers[number] for category, number in own.items()}
    others = sorted(set(range(num_classes)) - set(ids.values()))
    return {**ids, **{max(own) + 1 + i: number for i, number in enumerate(others)}}


def _renumbered(record: Dict[str, Any], numbers: Sequence[int]) -> Dict[str, Any]:
    if "annotations" not in record:
        return record
    annotations = [{**a, "category_id": numbers[a["category_id"]]} for a in record["annotations"]]
    return {**record, "annotations": annotations}
