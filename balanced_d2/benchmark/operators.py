"""The operators of the pure-Python Detectron2 that the project installs."""

import contextlib
import importlib.util
import runpy
from pathlib import Path

import numpy as np
import torch
from detectron2.layers import ROIAlignRotated
from detectron2.layers.rotated_boxes import pairwise_iou_rotated
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from balanced_d2.benchmark.bench import Bench

PACKAGE = Path(__file__).resolve().parent.parent


def pure_operators(name: str) -> dict:
    """What a module of ours has that stands in Detectron2's pure-Python wheel, by name."""
    folder = PACKAGE / "installation" / "wheel" / "detectron2"
    return runpy.run_path(str(folder / f"{name}.py"))


def measure_operators(bench: Bench, scale: float) -> None:
    """The operators of the pure-Python Detectron2, beside compiled ones if they are there."""

    def boxes(number: int, extent: float) -> torch.Tensor:
        uniform = torch.rand(number, 5, device=bench.device)
        shift = uniform.new_tensor([0, 0, 4, 4, -90])
        return uniform * uniform.new_tensor([extent, extent, 100, 100, 180]) + shift

    def pooled(pool):
        def run():
            features.grad = None
            pool(features, rois).sum().backward()

        return run

    rotated, pooling = (
        pure_operators("layers/rotated_boxes"),
        pure_operators("layers/roi_align_rotated"),
    )
    truth, anchors = boxes(20, 800), boxes(round(50000 * scale), 800)
    proposals = boxes(round(2000 * scale), 800)
    scores = torch.rand(len(proposals), device=bench.device)
    features = torch.randn(1, 256, 100, 168, device=bench.device, requires_grad=True)
    rois = boxes(round(512 * scale), 640)
    rois = torch.cat((torch.zeros_like(rois[:, :1]), rois), dim=1)
    variants = {
        f"IoU of {len(truth)} and {len(anchors):,} rotated boxes": {
            "compiled": lambda: pairwise_iou_rotated(truth, anchors),
            "pure": lambda: rotated["pairwise_iou_rotated"](truth, anchors),
        },
        f"suppression of {len(proposals):,} rotated boxes": {
            "compiled": lambda: torch.ops.detectron2.nms_rotated(proposals, scores, 0.5),
            "pure": lambda: rotated["nms_rotated"](proposals, scores, 0.5),
        },
        f"RoIAlignRotated of {len(rois)} boxes, 256 channels, forward and backward": {
            "compiled": pooled(ROIAlignRotated((7, 7), 0.125, 0)),
            "pure": pooled(pooling["ROIAlignRotated"]((7, 7), 0.125, 0)),
        },
    }
    for title, runs in variants.items():
        if importlib.util.find_spec("detectron2._C") is None:
            del runs["compiled"]
        bench.compare(title, runs, memory=False)

    truth, detections = coco_annotations(num_images=round(5000 * scale))
    evaluators = {"pycocotools": COCOeval}
    evaluators["faster-coco-eval"] = pure_operators("evaluation/fast_eval_api")["COCOeval_opt"]
    bench.compare(
        f"COCO evaluation of {len(detections.anns):,} boxes in {len(truth.imgs):,} images",
        {
            name: lambda cls=cls: evaluate(cls, truth, detections)
            for name, cls in evaluators.items()
        },
        memory=False,
    )


def coco_annotations(num_images: int) -> tuple:
    """Random ground truth of 80 classes, and detections about as good as those of a detector."""
    random = np.random.default_rng(0)
    truth, found = [], []
    for image in range(1, num_images + 1):
        for _ in range(random.integers(1, 14)):
            category = int(random.integers(1, 81))
            box = random.uniform((0, 0, 4, 4), (500, 400, 100, 100))
            area = float(box[2] * box[3])
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": category})
            truth[-1].update(bbox=box.tolist(), area=area, iscrowd=0)
            for _ in range(3):
                moved = (box + random.normal(0, 8, 4)).clip(1).tolist()
                found.append({"image_id": image, "category_id": category, "bbox": moved})
                found[-1]["score"] = float(random.random())
    with contextlib.redirect_stdout(None):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": 600, "width": 600} for i in range(1, num_images + 1)],
            "annotations": truth,
            "categories": [{"id": i, "name": str(i)} for i in range(1, 81)],
        }
        coco.createIndex()
        return coco, coco.loadRes(found)


def evaluate(evaluator: type, truth: COCO, detections: COCO) -> None:
    with contextlib.redirect_stdout(None):
        evaluation = evaluator(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
