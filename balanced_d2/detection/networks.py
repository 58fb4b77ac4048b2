"""What a detector runs: a model of Detectron2 or an exported file."""

import logging
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, List, Optional, Protocol, Sequence

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from balanced_d2.export import run_exported
from balanced_d2.export.deployable import predicts
from balanced_d2.export.sample import scaled
from balanced_d2.utils.errors import UserError

logger = logging.getLogger(__name__)


class Network(Protocol):
    """Finds objects in images of one size.

    Attributes:
        metadata: with ``thing_classes``, the names of the classes.
        gray_range: for :func:`balanced_d2.data.image.read_image`.
        model: in PyTorch; None if the network is not one.
        has_masks: whether it predicts masks.
    """

    metadata: Metadata
    gray_range: Optional[float]
    model: Optional[nn.Module]
    has_masks: bool

    def __call__(self, images: Sequence[np.ndarray], masks: bool = True) -> List[Instances]:
        """
        Args:
            images: uint8, each of the same shape (H, W, 3), BGR.
            masks: whether those that it predicts are wanted, which have the size of the images.

        Returns:
            The detections in each, in its pixels, on the CPU, from the highest score down.
        """


class TrainedModel:
    """A model of Detectron2; see :class:`Network`.

    Args:
        predictor: of :func:`balanced_d2.engine.build_predictor`.
    """

    def __init__(self, predictor: DefaultPredictor):
        self._predictor = predictor
        self.model: Optional[nn.Module] = predictor.model
        self.metadata: Metadata = predictor.metadata
        self.gray_range: Optional[float] = predictor.cfg.INPUT.GRAY_RANGE or None
        self.has_masks: bool = predicts(predictor.model)["masks"]
        # Other models with masks, such as panoptic ones, need them for the rest of their outputs.
        self._masks_are_optional = getattr(type(predictor.model), "inference", None) is (
            GeneralizedRCNN.inference
        )

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], masks: bool = True) -> List[Instances]:
        inputs = [self._input(image) for image in images]
        with ExitStack() as stack:
            if self.has_masks and self._masks_are_optional and not masks:
                stack.enter_context(_without_masks(self._predictor.model.roi_heads))
            outputs = self._predictor.model(inputs)
        return [output["instances"].to("cpu") for output in outputs]

    def _input(self, image: np.ndarray) -> dict:
        """As the predictor makes it, which takes a single image."""
        height, width = image.shape[:2]
        if self._predictor.input_format == "RGB":
            image = image[:, :, ::-1]
        image = scaled(image, self._predictor.cfg)
        tensor = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}


@contextmanager
def _without_masks(heads: Any) -> Iterator[None]:
    """As Detectron2 does for test-time augmentation."""
    heads.mask_on = False
    try:
        yield
    finally:
        heads.mask_on = True


class ExportedModel:
    """A file of ``balanced-d2 export``; see :class:`Network`.

    The formats are those of :class:`balanced_d2.export.run_exported.ExportedDetector`.

    Args:
        path: the file.
        device: as PyTorch names it, for formats that run on others than the CPU.
        threshold: the score that a detection has to exceed; None: that of the export.

    Raises:
        UserError: if the file cannot be loaded.
    """

    def __init__(self, path: str, device: str = "cpu", threshold: Optional[float] = None):
        with _user_errors():
            self._file = run_exported.ExportedDetector(path, device)
        self.model: Optional[nn.Module] = None
        described = self._file.metadata
        self.metadata = Metadata(thing_classes=described["class_names"])
        self.gray_range: Optional[float] = described.get("gray_range") or None
        self.has_masks: bool = "masks" in self._file.outputs
        self._threshold = -np.inf if threshold is None else threshold
        if threshold is not None and threshold < self._file.score_threshold:
            logger.warning(
                f"the threshold {threshold:g} has no effect below "
                f"{self._file.score_threshold:g}, the SCORE_THRESH_TEST of the export"
            )

    def __call__(self, images: Sequence[np.ndarray], masks: bool = True) -> List[Instances]:
        pictures = [Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])) for image in images]
        arrays = [self._file.preprocess(picture) for picture in pictures]
        with _user_errors():
            found = self._file.detect(arrays)
        return [
            self._instances(*of_one, with_masks=masks) for of_one in zip(pictures, arrays, found)
        ]

    def _instances(
        self, picture: Image.Image, array: np.ndarray, found: dict, with_masks: bool
    ) -> Instances:
        outputs, size = run_exported.in_pixels_of(picture, array, found)
        chosen = outputs["scores"] > self._threshold
        outputs = {name: value[chosen] for name, value in outputs.items()}
        image_size = (size["height"], size["width"])
        detections = Instances(image_size)
        detections.pred_boxes = Boxes(torch.from_numpy(outputs["boxes"]))
        detections.scores = torch.from_numpy(outputs["scores"])
        detections.pred_classes = torch.from_numpy(outputs["classes"])
        if with_masks and "masks" in outputs:
            detections.pred_masks = _pasted(outputs["masks"], outputs["boxes"], image_size)
        if "keypoints" in outputs:
            detections.pred_keypoints = torch.from_numpy(outputs["keypoints"])
        return detections


def _pasted(masks: np.ndarray, boxes: np.ndarray, size: Sequence[int]) -> torch.Tensor:
    """Masks of probabilities in their boxes as bool of shape (N, H, W)."""
    pasted = np.zeros((len(masks), *size), bool)
    for whole, mask, box in zip(pasted, masks, boxes):
        part, (x, y) = run_exported.paste(mask, box)
        place = whole[y : y + part.shape[0], x : x + part.shape[1]]
        place[:] = part[: place.shape[0], : place.shape[1]]
    return torch.from_numpy(pasted)


@contextmanager
def _user_errors() -> Iterator[None]:
    # The file that also runs alone has an error of its own.
    try:
        yield
    except run_exported.UserError as error:
        raise UserError(str(error)) from error
