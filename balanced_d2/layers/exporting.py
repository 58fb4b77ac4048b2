"""Whether a model is being exported, for layers that are then computed in another form."""

import torch


@torch.jit.unused  # TorchScript cannot compile it, and in TorchScript the answer is no
def is_exporting() -> bool:
    """Whether the code that calls runs for ``torch.onnx.export`` or ``torch.export``.

    From code that is also scripted: ``not torch.jit.is_scripting() and is_exporting()``.
    """
    if torch.onnx.is_in_onnx_export():
        return True
    # torch.compiler.is_exporting is new in PyTorch 2.7
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


@torch.jit.unused
def is_plain_eager() -> bool:
    """Whether the code that calls runs as it stands, not for a compiler, a trace or an exporter."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting())
