"""Exported detectors on images of random sizes: each form on each engine is the eager model.

``EXPORT_IMAGES`` sets the number of batches, and lets all forms take part; without it, there are a
few small images and the forms that are exported fast. ``EXPORT_MAX_SIDE`` is the longest side.
"""

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from balanced_d2 import export
from balanced_d2.export import EXPORTERS, EXTENSIONS, Comparison, installed_engines
from balanced_d2.export.run_exported import ExportedDetector
from balanced_d2.export.verify import Detections
from balanced_d2.utils.errors import UserError

from .conftest import SHARED_DATA
from .test_export import METADATA, small_model, smooth_image

NUM_BATCHES = int(os.environ.get("EXPORT_IMAGES", 0))
MAX_SIDE = int(os.environ.get("EXPORT_MAX_SIDE", 1333 if NUM_BATCHES else 160))
FAST = ("torchscript", "onnx")
KINDS = ("smooth", "noise", "constant", "photo")
PHOTOS = sorted((SHARED_DATA / "bccd" / "images").glob("*.jpg"))[:40]


def batch_of(generator, kind):
    """A batch (N, 3, H, W), float32; sides are small as often as large."""
    height, width = (round(MAX_SIDE ** generator.random()) for _ in range(2))
    if height * width > 400_000:
        number = 1
    else:
        number = generator.randint(1, 8 if height * width < 40_000 else 3)
    images = []
    for _ in range(number):
        seed = generator.randrange(10**6)
        if kind == "photo" and PHOTOS:
            with Image.open(generator.choice(PHOTOS)) as photo:
                pixels = np.asarray(photo.convert("RGB").resize((width, height)))
            images.append(torch.from_numpy(pixels[:, :, ::-1].transpose(2, 0, 1).copy()))
        elif kind == "noise":
            source = torch.Generator().manual_seed(seed)
            images.append(torch.randint(256, (3, height, width), generator=source))
        elif kind == "constant":
            images.append(torch.full((3, height, width), seed % 256))
        else:
            images.append(smooth_image(height, width, seed))
    return torch.stack(images).float()


def detections(outputs, size):
    order = ("boxes", "classes", "scores")
    return Detections(*(np.asarray(outputs[name]) for name in order), size, latency=0.0)


def eager(model, image):
    with torch.no_grad():
        found = model([{"image": image}])[0]["instances"]
    outputs = {"boxes": found.pred_boxes.tensor, "classes": found.pred_classes}
    return detections({**outputs, "scores": found.scores}, tuple(image.shape[1:]))


def rounding_decides(model, image, found, kind, tolerance):
    """Whether the eager model finds something else itself if the image changes by 1/10,000 of a
    gray level, which is about what float32 rounds, or ten times that in ONNX, whose tolerance is as
    much larger: scores, or an overlap and its threshold, are then so near that rounding decides. In
    a constant image, all positions have the same scores."""
    if kind == "constant":
        return True
    change = 0.1 * tolerance[0]
    for seed in range(20):
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        if not Comparison(found, eager(model, image + change * noise), tolerance).agrees:
            return True
    return False


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The model, and all exported forms on all engines that are installed, by name and format."""
    folder = tmp_path_factory.mktemp("exported")
    model = small_model()
    runs = {}
    for format in EXPORTERS if NUM_BATCHES else FAST:
        path = str(folder / f"model.{EXTENSIONS[format]}")
        outputs = export.output_names(is_batch=format in export.BATCH_FORMATS)
        described = {**METADATA, "format": format, "outputs": outputs}
        try:
            EXPORTERS[format](model, smooth_image(120, 140, seed=1), path, described)
        except UserError as error:  # a package or a compiler is not there
            print(f"{format} is left out: {error}")
            continue
        for engine in installed_engines(format):
            runs[format, engine] = ExportedDetector(path, engine=engine)
    return model, runs


@pytest.mark.slow
def test_random_sizes_and_batches(engines):
    model, runs = engines
    generator = random.Random(0)
    compared, ties, wrong = 0, 0, []
    for i in range(NUM_BATCHES or 8):
        kind = KINDS[i % len(KINDS)]
        images = batch_of(generator, kind)
        expected = [eager(model, image) for image in images]
        for (format, engine), detector in runs.items():
            found = detector.detect(list(images.numpy()))
            for image, before, outputs in zip(images, expected, found):
                after = detections(outputs, before.image_size)
                compared += 1
                tolerance = export.TOLERANCES[format]
                if Comparison(before, after, tolerance).agrees:
                    continue
                # Other kernels, also PyTorch's own for a batch, round otherwise.
                if format != "torchscript" and rounding_decides(
                    model, image, before, kind, tolerance
                ):
                    ties += 1
                    continue
                wrong.append((format, engine, kind, tuple(images.shape)))
    print(f"{NUM_BATCHES or 8} batches, {compared} comparisons, {ties} decided by rounding")
    assert not wrong, "\n".join(map(str, wrong))
    assert ties < 0.25 * compared
