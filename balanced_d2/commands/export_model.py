"""Write a trained detector as one file (TorchScript, torch.export, ONNX), and verify it.

The file is DIR/model.ts (torchscript), .pt2 (pt2), .aoti.pt2 (aoti), .onnx (onnx) or .batch.onnx
(onnx-batch), and with --quantize also .int8.onnx or .batch.int8.onnx.
balanced-d2 run-exported runs any of them, without Detectron2.
"""

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
from typing import Iterator, Optional

# First, so that importing Detectron2 is quiet.
import balanced_d2.export as export
from balanced_d2.checkpoint import load_weights, read_contents
from balanced_d2.config.checks import check_weights
from balanced_d2.engine import add_model_arguments, config_from, trainer_for
from balanced_d2.engine.start import prepare_datasets
from balanced_d2.export import run_exported
from balanced_d2.utils.errors import UserError

# isort: split
import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import build_model

# AP in percent that int8 may lose.
MAX_LOST_AP = 0.5


def main(args: argparse.Namespace) -> None:
    if args.method == "scripting":
        raise UserError(
            "--method scripting was retired, since PyTorch has deprecated scripting; leave it out: "
            "every model can be exported by tracing"
        )
    if args.quantize and not args.format.startswith("onnx"):
        raise UserError(f"--quantize is for --format onnx and onnx-batch, not {args.format}")
    if args.verify and not export.installed_engines(args.format):
        raise UserError(
            f"--verify runs the file, and no engine for {args.format} is installed: "
            f"pip install {run_exported.default_engine()}, or give --no-verify"
        )
    cfg = config_from(args)
    cfg.MODEL.DEVICE = "cpu"  # the exported model runs on any device
    check_weights(cfg, "export")
    if args.format == "aoti":
        export.check_compiler()
    path = os.path.join(args.output, f"model.{export.EXTENSIONS[args.format]}")
    export.check_writable(path)
    class_names = read_contents(cfg.MODEL.WEIGHTS).class_names
    metadata = export.describe(cfg, class_names, args.format)
    if args.quantize and args.verify and cfg.DATASETS.TEST:
        prepare_datasets(cfg, train=False)
    calibration = images_to_quantize_by(cfg, args.quantize) if args.quantize else None
    example, *images = export.sample_images(cfg, args.sample_image)
    model = build_model(cfg).eval()
    export.check_exportable(model, args.format)
    load_weights(model, cfg.MODEL.WEIGHTS, averaged=cfg.SOLVER.EMA.ENABLED)

    if args.format == "torchscript":
        print(
            "note: PyTorch has deprecated TorchScript in favour of torch.export (--format pt2); "
            "see docs/export.md"
        )
    export.EXPORTERS[args.format](model, example, path, metadata)
    how = "torch.export" if args.format in export.BATCH_FORMATS else "tracing"
    print(f"written by {how}: {path} ({os.path.getsize(path) / 1e6:.1f} MB)", flush=True)
    if args.verify:
        verify(model, path, images, args.format)
    files = [(path, args.format)]
    int8 = ""
    if calibration is not None:
        int8 = path.removesuffix("onnx") + "int8.onnx"
        export.quantize_onnx(path, int8, calibration)
        print(f"written in int8: {int8} ({os.path.getsize(int8) / 1e6:.1f} MB)", flush=True)
        files.append((int8, args.format))
    if args.verify:
        with file_is_kept():
            print(export.latencies(model, files, images[0], run_exported.__file__), flush=True)
        if int8:
            compare_accuracy(cfg, path, int8, args.format)


def images_to_quantize_by(cfg: CfgNode, folder: str) -> Iterator[np.ndarray]:
    export.check_quantization()
    return export.calibration_images(cfg, folder)


def compare_accuracy(cfg: CfgNode, path: str, int8: str, format: str) -> None:
    """Say what quantisation has cost on the data sets of the config; too much is an error."""
    lost = []
    trainer = trainer_for(cfg)
    engines = export.installed_engines(format)
    for dataset, engine in itertools.product(cfg.DATASETS.TEST, engines):
        with tempfile.TemporaryDirectory() as folder:
            before, after = (
                export.average_precision(
                    file,
                    trainer.build_test_loader(cfg, dataset),
                    trainer.build_evaluator(cfg, dataset, folder),
                    engine,
                )
                for file in (path, int8)
            )
        print(f"AP on {dataset}, {engine}: {before:.2f} before, {after:.2f} in int8", flush=True)
        lost.append(before - after)
    if not lost or np.isnan(lost).any():
        print("note: without objects in DATASETS.TEST, it is not known how much AP int8 costs")
    elif max(lost) > MAX_LOST_AP:
        sys.exit(
            f"error: int8 loses {max(lost):.2f} AP, more than {MAX_LOST_AP}; the file is kept, but "
            f"deploy {os.path.basename(path)}, or quantise by images like those it is for"
        )


def verify(model, path, images, format):
    for engine in export.installed_engines(format):
        verify_on(engine, model, path, images, format)


@contextlib.contextmanager
def file_is_kept():
    try:
        yield
    except RuntimeError as error:  # the runner's
        sys.exit(f"error: {error} (the file is kept)")


def verify_on(engine: Optional[str], model, path, images, format):
    with file_is_kept():
        comparisons = export.verify(model, path, images, format, run_exported.__file__, engine)
    if engine:
        print(f"on {engine}:")
    print(export.table(comparisons))
    if not all(comparison.agrees for comparison in comparisons):
        sys.exit(f"error: {path} is not equal to the model; the file is kept")
    if not any(len(comparison.eager.boxes) for comparison in comparisons):
        print("note: nothing was detected, so little was compared; choose another --sample-image")
    boxes, scores = export.TOLERANCES[format]
    parts = [f"boxes within {boxes:g} px", f"scores within {scores:g}"]
    for name in comparisons[0].eager.additional:
        tolerance = export.ADDITIONAL_TOLERANCES[format][name]
        if name == "masks":
            parts.append(f"masks within {tolerance[0]:g}")
        else:
            parts.append(f"keypoints within {tolerance[0]:g} px and scores of {tolerance[-1]:g}")
    print(f"equal: {', '.join(parts)}, classes in the same order")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--format", choices=export.EXTENSIONS, default="torchscript")
    parser.add_argument(
        "--quantize",
        metavar="FOLDER",
        help="ONNX also in int8, with the ranges of activations on FOLDER's images",
    )
    # From the time when there was a choice: commands of then still run.
    parser.add_argument(
        "--method", choices=("tracing", "scripting"), default="tracing", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--sample-image",
        default="",
        metavar="FILE",
        help="to trace and verify with (default: the first image of DATASETS.TEST)",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the file in a fresh process and compare it with the model",
    )
    add_model_arguments(parser)
    return parser.parse_args()
