"""Whether a model is being exported, for layers that are then computed in another form."""

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
