"""An annotation file as pycocotools can evaluate it, whatever tool wrote it."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Dict, List, Mapping

from pycocotools.coco import COCO


class GroundTruth(COCO):
    """pycocotools' annotations; a copy of a file's without what is computed wrongly.

    pycocotools takes a match with annotation 0 for no match, and needs keypoints in all annotations
    if they are in one, and masks in crowds too, which here get that of their box. Its fast versions
    compute with the ids of images, which have to be numbers then; texts are numbered here.

    Args:
        content: as :func:`balanced_d2.data.datasets.coco_json.read_coco` returns it; without
            annotations, nothing can be evaluated.
    """

    def __init__(self, content: Dict):
        super().__init__()
        images, annotations = content["images"], content.get("annotations")
        ids = [image["id"] for image in images]
        are_numbers = all(type(i) is int and abs(i) < 2**53 for i in ids)
        self.numbers = {i: i if are_numbers else number for number, i in enumerate(ids, 1)}
        self.dataset = {
            "images": [{**image, "id": self.numbers[image["id"]]} for image in images],
            "categories": content["categories"],
        }
        if annotations is not None:
            self.dataset["annotations"] = _annotations(annotations, self.numbers)
        with redirect_stdout(StringIO()):
            self.createIndex()

    def loadRes(self, results: List[Dict]) -> COCO:
        """Detections, with the ids of images as in the file, as another such object."""
        return super().loadRes(
            [{**result, "image_id": self.numbers[result["image_id"]]} for result in results]
        )


def _annotations(annotations: List[Dict], image_numbers: Mapping) -> List[Dict]:
    keys = ("category_id", "bbox", "area", "iscrowd", "segmentation")
    length = max((len(a.get("keypoints") or ()) for a in annotations), default=0)
    copies = []
    for number, annotation in enumerate(annotations, 1):
        copy = {key: annotation[key] for key in keys if key in annotation}
        copy["id"], copy["image_id"] = number, image_numbers[annotation["image_id"]]
        if copy["iscrowd"] and "segmentation" not in copy:
            x, y, width, height = copy["bbox"]
            copy["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        if length:
            keypoints = list(annotation.get("keypoints") or [0] * length)
            copy["keypoints"] = keypoints
            copy["num_keypoints"] = sum(visibility > 0 for visibility in keypoints[2::3])
        copies.append(copy)
    return copies
