"""Comparison of an exported file, run in a process of its own, with the model it came from."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from tabulate import tabulate
from tqdm import tqdm

from balanced_d2.export.deployable import BATCH_FORMATS, Deployable
from balanced_d2.export.run_exported import ENGINES
from balanced_d2.export.tracing import no_export_warnings

# Largest differences (box in pixels, score) that an exported model may have. ONNX Runtime computes
# with kernels of its own, PyTorch with the same ones.
TOLERANCES = {
    **dict.fromkeys(("torchscript", "pt2", "aoti"), (1e-3, 1e-5)),
    **dict.fromkeys(("onnx", "onnx-batch"), (1e-2, 1e-4)),
}
# The same for outputs that only some models have: a mask is a probability, a keypoint is x, y in
# pixels and a score. Keypoints go to files of PyTorch only.
ADDITIONAL_TOLERANCES: Dict[str, Dict[str, Tuple[float, ...]]] = {
    **dict.fromkeys(
        ("torchscript", "pt2", "aoti"), {"masks": (1e-4,), "keypoints": (0.01, 0.01, 1e-4)}
    ),
    **dict.fromkeys(("onnx", "onnx-batch"), {"masks": (1e-2,)}),
}

_ADDITIONAL_HEADERS = {"masks": "of masks", "keypoints": "of keypoints (px, px, score)"}

# The median latency is of so many runs, or fewer that fill so many seconds.
MAX_RUNS = 10
MAX_SECONDS = 3.0
# Numbers of images that latencies are measured for.
BATCHES = (1, 4, 8)


@dataclass
class Detections:
    """Of one image: boxes (N, 4), classes (N,), scores (N,), image size, latency in seconds, and
    what only some models predict: masks (N, M, M), keypoints (N, K, 3)."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    image_size: Tuple[int, int]
    latency: float
    additional: Dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Comparison:
    """The eager and the exported model's detections on one image, and whether they agree."""

    eager: Detections
    exported: Detections
    tolerance: Tuple[float, float]
    additional_tolerance: Dict[str, Tuple[float, ...]] = field(default_factory=dict)

    @property
    def difference(self) -> Tuple[float, float]:
        """The largest differences of boxes, in pixels, and of scores; infinite if not the same
        classes are detected in the same order."""
        order = self._order()
        if order is None:
            return np.inf, np.inf
        boxes = _largest(self.eager.boxes - self.exported.boxes[order])
        scores = _largest(self.eager.scores - self.exported.scores[order])
        return boxes, scores

    @property
    def additional_difference(self) -> Dict[str, Tuple[float, ...]]:
        """By output, the largest differences in the parts that have a tolerance of their own."""
        order, differences = self._order(), {}
        for name, eager in self.eager.additional.items():
            exported = self.exported.additional.get(name)
            parts = len(self.additional_tolerance[name])
            if order is None or exported is None or exported.shape != eager.shape:
                differences[name] = (np.inf,) * parts
            else:
                difference = (eager - exported[order]).reshape(-1, parts)
                differences[name] = tuple(_largest(part) for part in difference.T)
        return differences

    @property
    def agrees(self) -> bool:
        pairs = list(zip(self.difference, self.tolerance))
        for name, difference in self.additional_difference.items():
            pairs += zip(difference, self.additional_tolerance[name])
        return (
            all(d <= t for d, t in pairs)
            and self.eager.additional.keys() == self.exported.additional.keys()
        )

    def _order(self):
        if self.eager.image_size != self.exported.image_size:
            return None
        return _matching_order(self.eager, self.exported, self.tolerance[1])


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max(initial=0.0))


def installed_engines(format: str) -> List[Optional[str]]:
    """What can run files of a format here: ``"onnxruntime"`` and ``"openvino"``, or ``None`` for
    PyTorch, which needs no choice."""
    if not format.startswith("onnx"):
        return [None]
    return [engine for engine in ENGINES if importlib.util.find_spec(engine)]


def verify(
    model: GeneralizedRCNN | RetinaNet,
    path: str,
    images: Sequence[torch.Tensor],
    format: str,
    runner: str,
    engine: Optional[str] = None,
) -> List[Comparison]:
    """Compare an exported file with the model it came from.

    Args:
        model: the eager model, in evaluation mode.
        path: the exported file.
        images: each of shape (C, H, W), given to both models as they are.
        format: of the file, a key of ``TOLERANCES``, which says how much they may differ.
        runner: the program ``tools/run_exported.py``, which is run once for each image.
        engine: of :func:`installed_engines`; ``None`` for the runner's choice.

    Raises:
        RuntimeError: if the runner fails, with what it says.
    """
    comparisons = []
    for image in tqdm(images, desc="verifying", unit="image", disable=None):
        eager, runs = _run_eager(model, image)
        exported = _run_exported(runner, path, image, runs, engine)
        comparisons.append(
            Comparison(eager, exported, TOLERANCES[format], ADDITIONAL_TOLERANCES[format])
        )
    return comparisons


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a table for people."""
    additional = list(dict.fromkeys(name for c in comparisons for name in c.eager.additional))
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
                *(
                    ", ".join(f"{part:.1e}" for part in comparison.additional_difference[name])
                    for name in additional
                ),
                f"{1000 * eager.latency:.1f}, {1000 * exported.latency:.1f}",
                "equal" if comparison.agrees else "DIFFERENT",
            )
        )
    headers = [
        "height x width",
        "detections\neager, exported",
        "largest difference\nof boxes (px)",
        "\nof scores",
        *("\n" + _ADDITIONAL_HEADERS[name] for name in additional),
        "latency (ms)\neager, exported",
        "",
    ]
    alignment = ["right"] * (len(headers) - 1) + ["left"]
    return tabulate(rows, headers, disable_numparse=True, colalign=alignment)


def latencies(
    model: GeneralizedRCNN | RetinaNet,
    files: Sequence[Tuple[str, str]],
    image: torch.Tensor,
    runner: str,
) -> str:
    """A table of the median latencies of a model and of its exported files on every engine that is
    installed, for ``BATCHES`` images at once, or one, if the format takes no more.

    Args:
        model: the eager model, in evaluation mode.
        files: paths and formats.
        image: shape (C, H, W).
        runner: as for :func:`verify`.
    """

    def eager(number):
        return lambda: model([{"image": image}] * number)

    with torch.no_grad(), no_export_warnings():
        rows = [["eager", *(_milliseconds(_median(eager(number))[0]) for number in BATCHES)]]
    for path, format in files:
        for engine in installed_engines(format):
            row = [f"{os.path.basename(path)}, {engine or 'PyTorch'}"]
            for number in BATCHES:
                if number > 1 and format not in BATCH_FORMATS:
                    row.append("-")
                    continue
                record, _ = _run(runner, path, image, MAX_RUNS, engine, number)
                row.append(_milliseconds(number * record["seconds"]))
            rows.append(row)
    headers = ["latency (ms)", *(f"{number} image{'s' * (number > 1)}" for number in BATCHES)]
    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] + 3 * ["right"])


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.{1 if seconds >= 0.001 else 3}f}"


def _median(run: Callable) -> Tuple[float, int]:
    """The median time of a function in seconds, and how many times it was run."""
    seconds: List[float] = []
    while len(seconds) < MAX_RUNS and sum(seconds) < MAX_SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), len(seconds)


def _run_eager(model: GeneralizedRCNN | RetinaNet, image: torch.Tensor) -> Tuple[Detections, int]:
    """The detections, and how many times the model was run to measure its latency."""
    deployable = Deployable(model)  # whose latency is without the pasting of masks
    with torch.no_grad(), no_export_warnings():
        instances = model([{"image": image}])[0]["instances"]
        additional = {}
        if instances.has("pred_masks"):
            (raw,) = model.inference([{"image": image}], do_postprocess=False)
            additional["masks"] = raw.pred_masks[raw.pred_boxes.nonempty(), 0].numpy()
        if instances.has("pred_keypoints"):
            additional["keypoints"] = instances.pred_keypoints.numpy()
        seconds, runs = _median(lambda: deployable(image))
    detections = Detections(
        instances.pred_boxes.tensor.numpy(),
        instances.pred_classes.numpy(),
        instances.scores.numpy(),
        instances.image_size,
        seconds,
        additional,
    )
    return detections, runs


def _run_exported(
    runner: str, path: str, image: torch.Tensor, runs: int, engine: Optional[str]
) -> Detections:
    record, arrays = _run(runner, path, image, runs, engine)
    return Detections(
        arrays.pop("boxes"),
        arrays.pop("classes"),
        arrays.pop("scores"),
        tuple(arrays.pop("image_size").tolist()),
        record["seconds"],
        arrays,
    )


def _run(
    runner: str,
    path: str,
    image: torch.Tensor,
    runs: int,
    engine: Optional[str],
    number: int = 1,
) -> Tuple[dict, Dict[str, np.ndarray]]:
    """What the runner prints for an image, several times in a batch, and its arrays for one."""
    with tempfile.TemporaryDirectory() as folder:
        file, arrays_file = (os.path.join(folder, name) for name in ("image.npy", "arrays.npz"))
        np.save(file, image.numpy())
        result = subprocess.run(
            [
                *(sys.executable, runner, path, *(number * [file]), "--batch-size", str(number)),
                *("--repeat", str(runs)),
                *(("--engine", engine) if engine else ()),
                *(("--arrays", arrays_file) if number == 1 else ()),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"{path} does not run: {result.stderr.strip()}")
        record = json.loads(result.stdout.splitlines()[0])
        if number > 1:
            return record, {}
        with np.load(arrays_file) as file:
            return record, dict(file)


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
