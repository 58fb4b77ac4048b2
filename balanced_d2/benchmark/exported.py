"""Eager models against all that they can be exported to."""

import functools
import os
import tempfile
from pathlib import Path

from balanced_d2 import export
from balanced_d2.benchmark.bench import Bench
from balanced_d2.benchmark.models import (
    FAST,
    LITE0,
    MIXED,
    WholeModel,
    labelled_image,
    switched,
)
from balanced_d2.engine.speed import autocast
from balanced_d2.export.run_exported import FORMAT_VERSION, ExportedDetector
from balanced_d2.utils.errors import UserError

DEPLOYED = ("BCCD/balanced_faster_rcnn_R_18_FPN.yaml", LITE0)


def measure_export(bench: Bench, scale: float) -> None:
    """Eager models against all that they can be exported to, on all engines that are installed."""
    if bench.device.type != "cpu":
        raise UserError("--only export measures on CPUs; leave out --device")
    for config in DEPLOYED:
        height, width = (round(side * scale) for side in (240, 320))
        if config == LITE0:
            height, width = (round(side * scale) for side in (427, 320))
        with tempfile.TemporaryDirectory() as folder:
            compare_exported(bench, config, height, width, folder)


def compare_exported(
    bench: Bench, config: str, height: int, width: int, folder: str, formats: tuple = ()
) -> dict:
    """
    Args:
        folder: the files are written there.
        formats: of ``tools/export_model.py``; by default all.
    """
    random = switched(("MODEL.TIMM.PRETRAINED",), False)
    image = labelled_image(0, height, width)["image"]
    runs = {}
    for name, on in (("eager, float32", False), ("eager, bfloat16", True)):
        model = WholeModel(bench, config, random + switched(("TEST.AMP.ENABLED",), on), fast=True)
        if on:
            autocast(model.model, "cpu", training=False)
        runs[name] = functools.partial(model.detect, [{"image": image}])
    # As it is exported: without what makes eager models fast.
    model = WholeModel(bench, config, random + switched(FAST + MIXED, False)).model.eval()
    described = {
        **{"format_version": FORMAT_VERSION, "class_names": []},
        **{"input_format": "BGR", "min_size": 0, "max_size": 0},
    }
    for format in formats or export.EXPORTERS:
        path = os.path.join(folder, f"model.{export.EXTENSIONS[format]}")
        outputs = export.output_names(is_batch=format in export.BATCH_FORMATS)
        metadata = {**described, "format": format, "outputs": outputs}
        try:
            export.EXPORTERS[format](model, image, path, metadata)
        except UserError as error:
            print(f"{format} is left out: {error}", flush=True)
            continue
        files = {format: path}
        if format == "onnx-batch":
            files[f"{format}, int8"] = f"{path}.int8"
            noise = (labelled_image(seed, height, width)["image"].numpy() for seed in range(4))
            export.quantize_onnx(path, f"{path}.int8", noise)
        for name, file in files.items():
            for engine in export.installed_engines(format):
                detector = ExportedDetector(file, engine=engine)
                where = f" in {engine}" if engine else ""
                runs[name + where] = functools.partial(detector, image.numpy())
    title = f"exported, {Path(config).stem}, {height} x {width}"
    return bench.compare(title, runs, calls=3, settle=3, memory=False)
