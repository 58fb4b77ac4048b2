"""Export of trained detectors to files for use without Detectron2."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.export.accuracy import average_precision
from balanced_d2.export.aoti import check_compiler, export_aoti
from balanced_d2.export.batched import BatchDeployable
from balanced_d2.export.deployable import (
    BATCH_FORMATS,
    Deployable,
    check_exportable,
    output_names,
)
from balanced_d2.export.formats import EXPORTERS, EXTENSIONS
from balanced_d2.export.metadata import describe
from balanced_d2.export.onnx import export_onnx, export_onnx_batch
from balanced_d2.export.program import export_program, export_pt2
from balanced_d2.export.quantize import check_quantization, quantize_onnx
from balanced_d2.export.sample import calibration_images, sample_images
from balanced_d2.export.torchscript import export_torchscript, trace
from balanced_d2.export.verify import (
    ADDITIONAL_TOLERANCES,
    TOLERANCES,
    Comparison,
    installed_engines,
    latencies,
    table,
    verify,
)
from balanced_d2.utils.files import check_writable

__all__ = [
    "ADDITIONAL_TOLERANCES",
    "BATCH_FORMATS",
    "EXPORTERS",
    "EXTENSIONS",
    "TOLERANCES",
    "BatchDeployable",
    "Comparison",
    "Deployable",
    "check_compiler",
    "average_precision",
    "calibration_images",
    "check_exportable",
    "check_quantization",
    "check_writable",
    "describe",
    "export_aoti",
    "export_onnx",
    "export_onnx_batch",
    "export_program",
    "export_pt2",
    "export_torchscript",
    "installed_engines",
    "latencies",
    "output_names",
    "quantize_onnx",
    "sample_images",
    "table",
    "trace",
    "verify",
]
