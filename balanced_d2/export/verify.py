"""Comparison of an exported file, run in a process of its own, with the model it came from."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from balanced_d2.compat import no_export_warnings

# Largest differences (box in pixels, score) that an exported model may have. ONNX Runtime computes
# with kernels of its own, TorchScript with the same ones.
TOLERANCES = {"torchscript": (1e-3, 1e-5), "onnx": (1e-2, 1e-4)}

# The median latency is of so many runs, or fewer that fill so many seconds.
MAX_RUNS = 10
MAX_SECONDS = 3.0


@dataclass
class Detections:
    """Of one image: boxes (N, 4), classes (N,), scores (N,), image size and latency in seconds."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    image_size: Tuple[int, int]
    latency: float


@dataclass
class Comparison:
    """The eager and the exported model's detections on one image, and whether they agree."""

    eager: Detections
    exported: Detections
    tolerance: Tuple[float, float]

    @property
    def difference(self) -> Tuple[float, float]:
        """The largest differences of boxes, in pixels, and of scores; infinite if not the same
        classes are detected in the same order."""
        order = _matching_order(self.eager, self.exported, self.tolerance[1])
        if self.eager.image_size != self.exported.image_size or order is None:
            return np.inf, np.inf
        if len(order) == 0:
            return 0.0, 0.0
        boxes = np.abs(self.eager.boxes - self.exported.boxes[order]).max()
        scores = np.abs(self.eager.scores - self.exported.scores[order]).max()
        return float(boxes), float(scores)

    @property
    def agrees(self) -> bool:
        return all(d <= t for d, t in zip(self.difference, self.tolerance))


def verify(
    model: nn.Module, path: str, images: Sequence[torch.Tensor], format: str, runner: str
) -> List[Comparison]:
    """Compare an exported file with the model it came from.

    Args:
        model: the eager model, in evaluation mode.
        path: the exported file.
        images: each of shape (C, H, W), given to both models as they are.
        format: ``"torchscript"`` or ``"onnx"``, which says how much they may differ.
        runner: the program ``tools/run_exported.py``, which is run once for each image.

    Raises:
        RuntimeError: if the runner fails, with what it says.
    """
    comparisons = []
    for image in tqdm(images, desc="verifying", unit="image", disable=None):
        eager, runs = _run_eager(model, image)
        exported = _run_exported(runner, path, image, runs)
        comparisons.append(Comparison(eager, exported, TOLERANCES[format]))
    return comparisons


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a table for people."""
    rows = []
    for comparison in comparisons:
        eager, exported = comparison.eager, comparison.exported
        boxes, scores = comparison.difference
        rows.append(
            (
                "{} x {}".format(*eager.image_size),
                f"{len(eager.boxes)}, {len(exported.boxes)}",
                f"{boxes:.1e}",
                f"{scores:.1e}",
                f"{1000 * eager.latency:.1f}, {1000 * exported.latency:.1f}",
                "equal" if comparison.agrees else "DIFFERENT",
            )
        )
    headers = [
        "height x width",
        "detections\neager, exported",
        "largest difference\nof boxes (px)",
        "\nof scores",
        "latency (ms)\neager, exported",
        "",
    ]
    return tabulate(rows, headers, disable_numparse=True, colalign=("right",) * 5 + ("left",))


def _run_eager(model: nn.Module, image: torch.Tensor) -> Tuple[Detections, int]:
    """The detections, and how many times the model was run to measure its latency."""
    seconds = []
    with torch.no_grad(), no_export_warnings():
        model([{"image": image}])
        while len(seconds) < MAX_RUNS and sum(seconds) < MAX_SECONDS:
            start = time.perf_counter()
            (result,) = model([{"image": image}])
            seconds.append(time.perf_counter() - start)
    instances = result["instances"]
    detections = Detections(
        instances.pred_boxes.tensor.numpy(),
        instances.pred_classes.numpy(),
        instances.scores.numpy(),
        instances.image_size,
        statistics.median(seconds),
    )
    return detections, len(seconds)


def _run_exported(runner: str, path: str, image: torch.Tensor, runs: int) -> Detections:
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "image.npy")
        np.save(file, image.numpy())
        result = subprocess.run(
            [sys.executable, runner, path, file, "--threshold", "0", "--repeat", str(runs)],
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode != 0:
        raise RuntimeError(f"{path} does not run: {result.stderr.strip()}")
    record = json.loads(result.stdout)
    detections = record["detections"]
    return Detections(
        np.array([d["bbox"] for d in detections], dtype=np.float32).reshape(-1, 4),
        np.array([d["class_id"] for d in detections], dtype=np.int64),
        np.array([d["score"] for d in detections], dtype=np.float32),
        (record["height"], record["width"]),
        record["seconds"],
    )


def _matching_order(eager: Detections, exported: Detections, tolerance: float):
    """For each eager detection the index of the exported one that it is, None if there are others.

    The order is the same, but for detections whose scores are nearer to each other than the
    tolerance: which of them comes first is then a matter of rounding.
    """
    if len(eager.boxes) != len(exported.boxes) or (np.diff(exported.scores) > tolerance).any():
        return None
    order, free = [], list(range(len(exported.boxes)))
    for box, label, score in zip(eager.boxes, eager.classes, eager.scores):
        candidates = [
            i
            for i in free
            if exported.classes[i] == label and abs(exported.scores[i] - score) <= tolerance
        ]
        if not candidates:
            return None
        nearest = min(candidates, key=lambda i: np.abs(exported.boxes[i] - box).max())
        order.append(nearest)
        free.remove(nearest)
    return np.array(order, dtype=int)
