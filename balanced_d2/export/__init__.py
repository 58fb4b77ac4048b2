"""Export of trained detectors to TorchScript and ONNX, for use without Detectron2."""

from balanced_d2.export.deployable import Deployable, check_exportable
from balanced_d2.export.metadata import describe
from balanced_d2.export.onnx import export_onnx
from balanced_d2.export.sample import sample_images
from balanced_d2.export.torchscript import export_torchscript, trace
from balanced_d2.export.verify import ADDITIONAL_TOLERANCES, TOLERANCES, Comparison, table, verify
from balanced_d2.utils.files import check_writable

__all__ = [
    "ADDITIONAL_TOLERANCES",
    "TOLERANCES",
    "Comparison",
    "Deployable",
    "check_exportable",
    "check_writable",
    "describe",
    "export_onnx",
    "export_torchscript",
    "sample_images",
    "table",
    "trace",
    "verify",
]
