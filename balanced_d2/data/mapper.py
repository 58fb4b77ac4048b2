"""From records to the input of models."""

from copy import copy
from typing import Dict
from unittest import mock

from detectron2.config import configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T

from balanced_d2.data.image import read_image


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, which rounds the shorter side of a very long image to 0."""

    def get_transform(self, image):
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


def _kept(augmentation: T.Augmentation) -> T.Augmentation:
    if type(augmentation) is T.ResizeShortestEdge:
        augmentation = copy(augmentation)
        augmentation.__class__ = ResizeShortestEdge
    return augmentation


class ImageMapper(DatasetMapper):
    """Detectron2's mapper, which reads gray images of more than 8 bits in their full range, and
    scales no side of an image to nothing.

    Args: as for ``DatasetMapper``, and:
        gray_range: ``INPUT.GRAY_RANGE``; 0 refuses such images.
    """

    @configurable
    def __init__(self, *args, gray_range: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.augmentations.augs[:] = map(_kept, self.augmentations.augs)
        self.gray_range = gray_range

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        return {**super().from_config(cfg, is_train), "gray_range": cfg.INPUT.GRAY_RANGE}

    def __call__(self, dataset_dict: Dict):
        def read(file_name: str, format=None):
            if format == "L":  # numbers of classes, not gray values
                return detectron2_read_image(file_name, format)
            return read_image(file_name, format, gray_range=self.gray_range)

        detectron2_read_image = detection_utils.read_image
        # Detectron2's mapper calls this and cannot be given another.
        with mock.patch.object(detection_utils, "read_image", read):
            return super().__call__(dataset_dict)
