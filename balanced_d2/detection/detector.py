"""A detector for use from Python."""

import logging
import os
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, TypeVar, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_first_n
from PIL import Image
from torch import nn
from tqdm import tqdm

from balanced_d2.data.image import read_image, take_image
from balanced_d2.detection.formats import as_coco, as_supervision
from balanced_d2.detection.networks import ExportedModel, Network, TrainedModel
from balanced_d2.detection.sources import config_and_weights, is_exported
from balanced_d2.detection.tiles import Tile, check_tiling, fits_in_none, is_cut, merge, tiles_of
from balanced_d2.engine import build_predictor
from balanced_d2.engine.defaults import trained_config
from balanced_d2.utils.errors import UserError

ImageLike = str | os.PathLike | np.ndarray | Image.Image
Item = TypeVar("Item")


class Detector:
    """Finds objects in images.

    ::

        from balanced_d2 import Detector

        detector = Detector.load("output/mine")
        detections = detector("photo.jpg")

    Args:
        network: the model.
        batch_size: how many images, or tiles of one, the model is given at once. Only images of the
            same size are put together, so that none is padded because of another.

    Attributes:
        metadata: of Detectron2, for its ``Visualizer``.
        model: the model in PyTorch; None for an exported file.
    """

    def __init__(self, network: Network, batch_size: int = 4):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but has to be at least 1")
        self._network = network
        self.batch_size = batch_size
        self.metadata: Metadata = network.metadata
        self.model: Optional[nn.Module] = network.model

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        weights: str | os.PathLike = "",
        *,
        options: Sequence[Any] = (),
        threshold: Optional[float] = None,
        device: str = "",
        batch_size: int = 4,
    ) -> "Detector":
        """Load a trained or exported model.

        Args:
            source: the folder of a training, whose config, class names and last checkpoint are
                taken; a checkpoint in such a folder; a YAML config, or its name in the model zoo;
                or an exported file.
            weights: a checkpoint, if not the last one of the training or that of the config; in the
                folder of the training its name is enough, such as ``"model_best.pth"``.
            options: ``KEY, VALUE, ...`` of the config.
            threshold: the score that a detection has to exceed, in [0, 1]; by default that of the
                config or of the export.
            device: as PyTorch names it; by default that of the config, or the CPU where there is no
                CUDA and for exported files.
            batch_size: as for the class.

        Raises:
            UserError: if anything in them cannot be used, with the reason.
        """
        source, weights = os.fspath(source), os.fspath(weights)
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"the threshold is {threshold:g}, not in [0, 1]")
        if is_exported(source):
            if weights or options:
                raise UserError(f"{source} is an exported model: it has its weights and no config")
            return cls(ExportedModel(source, device or "cpu", threshold), batch_size)
        config_file, weights = config_and_weights(source, weights)
        given = [*(("MODEL.WEIGHTS", weights) if weights else ()), *options]
        if device:
            given += ["MODEL.DEVICE", device]
        cfg = trained_config(config_file, given)
        return cls.from_config(cfg, threshold=threshold, batch_size=batch_size)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        purpose: str = "detect",
        threshold: Optional[float] = None,
        batch_size: int = 4,
    ) -> "Detector":
        """The trained model of a config.

        Args:
            cfg: as :func:`balanced_d2.engine.config_from` returns it. It is not changed.
            purpose: as for :func:`balanced_d2.engine.build_predictor`.
            threshold, batch_size: as for :meth:`load`.

        Raises:
            UserError: if there are no weights, or they do not fit the model.
        """
        cfg = cfg.clone()
        cfg.defrost()
        if threshold is not None:
            for part in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
                part.SCORE_THRESH_TEST = float(threshold)
        return cls(TrainedModel(build_predictor(cfg, purpose)), batch_size)

    @property
    def class_names(self) -> List[str]:
        """The names of the classes, by number."""
        return list(self.metadata.thing_classes)

    @overload
    def __call__(self, images: ImageLike, *, tile: int = 0, overlap: float = 0.2) -> Instances: ...

    @overload
    def __call__(
        self, images: Iterable[ImageLike], *, tile: int = 0, overlap: float = 0.2
    ) -> List[Instances]: ...

    def __call__(self, images, *, tile=0, overlap=0.2):
        """Find objects.

        Args:
            images: a path, an image of Pillow or an array (see
                :func:`balanced_d2.data.image.take_image`); or several of these.
            tile: the side in pixels of tiles in which an image is looked through, for objects that
                are small in it; as a whole, only for those that fit in no tile. 0: no tiles.
                Detections in tiles have no masks.
            overlap: the part of a tile's side that neighbours have in common, about the size of the
                objects.

        Returns:
            For each image its detections, in its pixels and on the CPU, from the highest score
            down: ``pred_boxes``, ``pred_classes`` and ``scores``, and ``pred_masks`` and
            ``pred_keypoints`` if the model predicts them. For several images, a list.

        Raises:
            UserError: naming an image that cannot be read.
        """
        if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)):
            (detections,) = self.stream([images], tile=tile, overlap=overlap)
            return detections
        return list(self.stream(images, tile=tile, overlap=overlap))

    def stream(
        self, images: Iterable[ImageLike], *, tile: int = 0, overlap: float = 0.2
    ) -> Iterator[Instances]:
        """Like a call with several images, but one after the other: no more images are in memory
        than are given to the model at once."""
        if tile:
            check_tiling(tile, overlap)
        opened = (self.read(image, f"image {i}") for i, image in enumerate(images, start=1))
        if tile:
            for image in opened:
                yield self._in_tiles(image, tile, overlap)
            return
        for batch in _batches(opened, self.batch_size):
            yield from self._network(batch)

    def read(self, image: ImageLike, what: str = "the image") -> np.ndarray:
        """The pixels of an image as the model is given it: uint8, shape (H, W, 3), BGR.

        Args:
            what: what the message calls an image that has no path.

        Raises:
            ImageError: naming the image, if it cannot be read.
        """
        gray_range = self._network.gray_range
        if isinstance(image, (str, os.PathLike)):
            return read_image(os.fspath(image), gray_range=gray_range)
        if isinstance(image, (np.ndarray, Image.Image)):
            return take_image(image, what, gray_range)
        raise UserError(
            f"{what} is of type {type(image).__name__}; give a path, an array or an image of Pillow"
        )

    def as_coco(
        self,
        detections: Instances,
        image_id: int | str,
        category_ids: Optional[Sequence[int]] = None,
    ) -> List[Dict[str, Any]]:
        """See :func:`balanced_d2.detection.as_coco`."""
        return as_coco(detections, image_id, category_ids)

    def as_supervision(self, detections: Instances) -> Any:
        """See :func:`balanced_d2.detection.as_supervision`."""
        return as_supervision(detections, self.class_names)

    def _in_tiles(self, image: np.ndarray, size: int, overlap: float) -> Instances:
        """The detections in the tiles of an image, and those in the image as a whole that fit in no
        tile, as one; only a batch of tiles at a time is in memory."""
        height, width = image.shape[:2]
        tiles = tiles_of(height, width, size, overlap)
        if len(tiles) == 1:
            (whole,) = self._network([image])
            return whole
        if self._network.has_masks:
            log_first_n(logging.WARNING, "detections in tiles have no masks", name=__name__)
        (whole,) = self._network([image], masks=False)
        # A tile sees better what it holds, at the scale that the model knows.
        boxes = whole.pred_boxes.tensor.numpy()
        whole = whole[torch.from_numpy(fits_in_none(boxes, tiles, height, width))]
        found = [_moved(whole, Tile(0, 0, width, height), height, width)]
        cut = [np.zeros(len(whole), bool)]
        with tqdm(total=len(tiles), desc="tiles", unit="tile", disable=None, leave=False) as bar:
            for start in range(0, len(tiles), self.batch_size):
                batch = tiles[start : start + self.batch_size]
                images = [image[t.y1 : t.y2, t.x1 : t.x2] for t in batch]
                parts = self._network(images, masks=False)
                for tile, part in zip(batch, parts):
                    moved = _moved(part, tile, height, width)
                    found.append(moved)
                    cut.append(is_cut(moved.pred_boxes.tensor.numpy(), tile, height, width))
                bar.update(len(batch))
        every = Instances.cat(found)
        kept = merge(
            every.pred_boxes.tensor.numpy(),
            every.scores.numpy(),
            every.pred_classes.numpy(),
            np.concatenate(cut),
        )
        return every[torch.from_numpy(kept)]


def _moved(detections: Instances, tile: Tile, height: int, width: int) -> Instances:
    """Detections of a tile in pixels of its image, without masks."""
    moved = Instances((height, width))
    offset = torch.tensor([tile.x1, tile.y1], dtype=torch.float32)
    moved.pred_boxes = Boxes(detections.pred_boxes.tensor + offset.repeat(2))
    moved.scores, moved.pred_classes = detections.scores, detections.pred_classes
    if detections.has("pred_keypoints"):
        keypoints = detections.pred_keypoints.clone()
        keypoints[:, :, :2] += offset
        moved.pred_keypoints = keypoints
    return moved


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[List[np.ndarray]]:
    """Successive images of the same shape, at most ``size`` of them together."""
    batch: List[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == size or image.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
