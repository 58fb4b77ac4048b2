"""The AP of an exported file on a data set."""

import contextlib
from typing import Dict, Iterable, List, Optional

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from balanced_d2.export.run_exported import ExportedDetector, to_size


def average_precision(
    path: str,
    loader: Iterable[List[dict]],
    evaluator: DatasetEvaluator,
    engine: Optional[str] = None,
) -> float:
    """The AP of boxes, in percent, of an exported file: as ``train_net.py --eval-only`` computes it
    for the model.

    Args:
        path: the file.
        loader: of a data set, Detectron2's test loader: images preprocessed as the model's.
        evaluator: of the same.
        engine: of an ONNX file, ``"onnxruntime"`` or ``"openvino"``.
    """
    detector = ExportedDetector(path, engine=engine)
    evaluator.reset()
    for inputs in loader:
        evaluator.process(inputs, [_detect(detector, one) for one in inputs])
    with contextlib.redirect_stdout(None):  # tables
        results = evaluator.evaluate()
    return float(results["bbox"]["AP"])


def _detect(detector: ExportedDetector, one: dict) -> Dict[str, Instances]:
    image = one["image"].numpy()
    outputs = detector(image)
    boxes = {name: outputs[name] for name in ("boxes", "classes", "scores")}
    scaled = to_size(boxes, image.shape[:0:-1], (one["width"], one["height"]))
    instances = Instances((one["height"], one["width"]))
    instances.pred_boxes = Boxes(torch.from_numpy(scaled["boxes"]))
    instances.pred_classes = torch.from_numpy(scaled["classes"])
    instances.scores = torch.from_numpy(scaled["scores"])
    return {"instances": instances}
