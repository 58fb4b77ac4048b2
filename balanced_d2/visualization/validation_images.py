"""A few images of a dataset with detections and ground truth, for TensorBoard."""

from typing import Dict, List, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from balanced_d2.visualization.pair import choose_evenly, draw_pair


class ValidationImages(DatasetEvaluator):
    """Draws images of a dataset, with ground truth on the left and detections on the right.

    It returns no results, but puts the pictures into Detectron2's event storage, from where the
    TensorBoard writer takes them, as ``DATASET/IMAGE_ID``. Outside training there is no storage,
    and it does nothing.

    Args:
        dataset_name: a registered dataset.
        num_images: number of images, spread evenly over the dataset: always the same ones.
        threshold: minimum score of the detections that are drawn.
        gray_range: ``INPUT.GRAY_RANGE``, None if it is not known.
    """

    def __init__(
        self,
        dataset_name: str,
        num_images: int = 4,
        threshold: float = 0.5,
        gray_range: Optional[float] = None,
    ):
        self.dataset_name = dataset_name
        self.num_images = num_images
        self.threshold = threshold
        self.gray_range = gray_range
        self.reset()

    def reset(self) -> None:
        self._detections: Dict[object, Instances] = {}
        self._records: List[Dict] = []
        if _has_event_storage():
            records = DatasetCatalog.get(self.dataset_name)
            self._records = choose_evenly(records, self.num_images)
        self._wanted = {record.get("image_id") for record in self._records}

    def process(self, inputs: List[Dict], outputs: List[Dict]) -> None:
        for image, output in zip(inputs, outputs):
            if image.get("image_id") in self._wanted and "instances" in output:
                detections = output["instances"].to("cpu")
                shown = detections[detections.scores >= self.threshold]
                self._detections[image["image_id"]] = shown

    def evaluate(self) -> None:
        gathered = comm.gather(self._detections, dst=0)
        detections = {image_id: d for part in gathered for image_id, d in part.items()}
        metadata = MetadataCatalog.get(self.dataset_name)
        for record in self._records:
            image_id = record.get("image_id")
            if image_id in detections:
                picture = draw_pair(
                    record, detections[image_id], metadata, gray_range=self.gray_range
                )
                get_event_storage().put_image(
                    f"{self.dataset_name}/{image_id}", picture.transpose(2, 0, 1)
                )


def _has_event_storage() -> bool:
    try:
        get_event_storage()
    except AssertionError:
        return False
    return True
