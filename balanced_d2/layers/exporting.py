"""Whether a model is being exported, for layers that are then computed in another form."""

from contextlib import nullcontext
from typing import ContextManager

import torch


def is_exporting() -> bool:
    """Whether the code that calls runs for ``torch.onnx.export`` or ``torch.export``."""
    if torch.onnx.is_in_onnx_export():
        return True
    # torch.compiler.is_exporting is new in PyTorch 2.7
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes that are symbols is true of all sizes, for ``torch.export``."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def not_compiled() -> ContextManager:
    """Within it, code is marked for AOTInductor to call PyTorch's operators as they are: where it
    gains nothing by being compiled, and takes minutes. Other exporters do not look at it."""
    annotate = getattr(torch.fx.traceback, "annotate", None)  # new in PyTorch 2.9
    if annotate is None or torch.onnx.is_in_onnx_export():
        return nullcontext()
    return annotate({"fallback_to_eager": True})
