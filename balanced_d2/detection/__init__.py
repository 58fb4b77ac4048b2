"""Detection from Python: trained and exported models with one interface, also in tiles."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.detection.detector import Detector
from balanced_d2.detection.formats import as_coco, as_supervision

__all__ = ["Detector", "as_coco", "as_supervision"]
