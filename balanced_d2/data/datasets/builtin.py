"""The project's own datasets, registered as Detectron2 registers its built-in ones.

They are expected in ``$DETECTRON2_DATASETS`` (default: ``./datasets``). A name that the user has
already registered is left alone.
"""

import os
from functools import partial

from detectron2.data import DatasetCatalog

from balanced_d2.data.datasets.coco import register_coco
from balanced_d2.data.datasets.shapes import DEFAULT, SPLITS, TAIL, class_names, ensure_shapes


def register_published(root: str) -> None:
    """BCCD, blood cells, and Aquarium: ``root/NAME/{train.json,val.json}``, with BCCD's images in
    ``images/`` beside them, and Aquarium's where the file says."""
    for dataset, images in (("bccd", "images"), ("aquarium", "")):
        folder = os.path.join(root, dataset)
        for split in ("train", "val"):
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                json_file = os.path.join(folder, f"{split}.json")
                register_coco(name, json_file, os.path.join(folder, images))


def register_balanced_shapes(root: str) -> None:
    """Synthetic shapes, drawn into ``root/balanced_shapes`` the first time they are used, and
    ``root/tail_shapes``, whose classes are not equally frequent in the training split."""
    for dataset, config in (("balanced_shapes", DEFAULT), ("tail_shapes", TAIL)):
        folder = os.path.join(root, dataset)
        for split in SPLITS:
            name = f"{dataset}_{split}"
            if name not in DatasetCatalog:
                register_coco(
                    name,
                    os.path.join(folder, f"{split}.json"),
                    os.path.join(folder, split),
                    prepare=partial(ensure_shapes, folder, config),
                    thing_classes=list(class_names(config)),
                    generated=True,
                )


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_published(_root)
register_balanced_shapes(_root)
