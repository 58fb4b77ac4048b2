"""The forms of an exported detector: what writes each, and how its file is named."""

from balanced_d2.export.aoti import export_aoti
from balanced_d2.export.onnx import export_onnx, export_onnx_batch
from balanced_d2.export.program import export_pt2
from balanced_d2.export.torchscript import export_torchscript

EXPORTERS = {
    "torchscript": export_torchscript,
    "pt2": export_pt2,
    "aoti": export_aoti,
    "onnx": export_onnx,
    "onnx-batch": export_onnx_batch,
}
"""Functions of a model, an example image, a path and metadata."""
EXTENSIONS = {
    "torchscript": "ts",
    "pt2": "pt2",
    "aoti": "aoti.pt2",
    "onnx": "onnx",
    "onnx-batch": "batch.onnx",
}
