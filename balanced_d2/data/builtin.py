"""The project's own data sets, registered as Detectron2 registers its built-in ones.

``$DETECTRON2_DATASETS`` (default: ``./datasets``) is the folder that holds them.
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from balanced_d2.data.coco import load_coco, register_coco
from balanced_d2.data.shapes import CLASSES, SPLITS, ensure_shapes


def register_bccd(root: str) -> None:
    """BCCD, blood cells: ``root/bccd/{images/,train.json,val.json}``."""
    folder = os.path.join(root, "bccd")
    for split in ("train", "val"):
        register_coco(
            f"bccd_{split}", os.path.join(folder, f"{split}.json"), os.path.join(folder, "images")
        )


def register_balanced_shapes(root: str) -> None:
    """Synthetic shapes, drawn into ``root/balanced_shapes`` the first time they are used."""
    folder = os.path.join(root, "balanced_shapes")

    def load(name: str, json_file: str, image_root: str):
        ensure_shapes(folder)
        return load_coco(name, json_file, image_root)

    for split in SPLITS:
        name = f"balanced_shapes_{split}"
        files = {
            "json_file": os.path.join(folder, f"{split}.json"),
            "image_root": os.path.join(folder, split),
        }
        DatasetCatalog.register(name, lambda name=name, files=files: load(name, **files))
        MetadataCatalog.get(name).set(
            evaluator_type="coco", thing_classes=list(CLASSES), generated=True, **files
        )


_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_bccd(_root)
register_balanced_shapes(_root)
