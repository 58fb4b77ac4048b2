"""The names of Detectron2's export through Caffe2, which is no longer part of PyTorch.

Part of the pure-Python build of Detectron2 0.6. Programs that import these names but do not use
them, such as Detectron2's own ``tools/deploy/export_model.py``, still run; using them raises an
error that says what to use instead.
"""

from typing import NoReturn

__all__ = [
    "Caffe2Model",
    "Caffe2Tracer",
    "add_export_config",
    "export_caffe2_model",
    "export_onnx_model",
]


def add_export_config(cfg):
    """Return the config unchanged: its options were for Caffe2."""
    return cfg


def _gone(*args, **kwargs) -> NoReturn:
    raise RuntimeError(
        "PyTorch no longer has Caffe2, so Detectron2's export through it is not available. Use "
        "detectron2.export.TracingAdapter or scripting_with_instances (export_model.py: "
        "--export-method tracing or scripting)"
    )


class Caffe2Tracer:
    """Raises RuntimeError when it is made."""

    __init__ = _gone


class Caffe2Model:
    """Raises RuntimeError when it is made or loaded."""

    __init__ = _gone
    load_protobuf = staticmethod(_gone)


export_caffe2_model = _gone
export_onnx_model = _gone
