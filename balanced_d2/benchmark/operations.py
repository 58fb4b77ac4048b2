"""Where the time of a model goes: floating-point operations, and seconds by kind of operation."""

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from balanced_d2.benchmark.bench import Bench


def product_flops(bench: Bench, dtype: torch.dtype, side: int) -> float:
    """The most floating-point operations per second that one product of two matrices reaches."""
    a = torch.ones(side, side, dtype=dtype, device=bench.device)
    a @ a
    return 2 * side**3 / min(bench.seconds(lambda: a @ a, 1) for _ in range(bench.turns))


# The kinds of operation that a profile is summed by: how the names of PyTorch's operators begin.
KINDS = {
    "convolution": ("mkldnn_conv", "_convolution", "convolution", "cudnn_conv", "_slow_conv"),
    "matrix product": ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_scaled_dot"),
    "RoIAlign": ("roi_align", "_roi_align", "_sparse", "sparse", "SparseROIAlign"),
    "copy": ("copy_", "_to_copy", "clone", "cat", "index", "gather", "stack", "contiguous"),
    "fill": ("fill_", "zero_", "zeros", "full", "ones"),
    "suppression, sorting": ("nms", "sort", "topk", "unique"),
    "arithmetic": (
        *(
            "add",
            "sub",
            "mul",
            "div",
            "relu",
            "clamp",
            "threshold",
            "hardtanh",
            "native_batch_norm",
        ),
        *("batch_norm", "sum", "exp", "where", "minimum", "maximum", "max_pool2d", "upsample"),
    ),
}


def where_time_goes(model: nn.Module, run) -> dict:
    """FLOPs of convolutions and products, and seconds by kind of operation.

    The FLOPs are 0 for models with grouped convolutions, for which PyTorch counts too many.
    """
    flops = 0
    if all(m.groups == 1 for m in model.modules() if isinstance(m, nn.Conv2d)):
        counts = {
            torch.ops.aten.mm: flops_of_product,
            torch.ops.mkldnn._convolution_pointwise: flops_of_fused_conv,
        }
        with FlopCounterMode(display=False, custom_mapping=counts) as counter:
            run()
        flops = counter.get_total_flops()
    with torch.profiler.profile() as profile:
        run()
    seconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        name = event.key.partition("::")[2] or event.key
        kind = next((k for k, begins in KINDS.items() if name.startswith(begins)), "other")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return {"flops": flops, "seconds": seconds}


def flops_of_product(a: torch.Tensor, b: torch.Tensor, *args, **kwargs) -> int:
    """Of a matrix product whose first matrix may be sparse, unlike PyTorch's counter."""
    values = a.numel() if a.layout is torch.strided else a._nnz()
    return 2 * values * b.shape[1]


flops_of_product._get_raw = True  # the counter gives it tensors, not their shapes


def flops_of_fused_conv(*args, out_shape: torch.Size, **kwargs) -> int:
    """Of the convolution in :func:`balanced_d2.layers.fused_conv.fused_conv`, whose tensors are
    given by their shapes: the image, what is added, if anything, and the weights."""
    image, *_, weight = (a for a in args if isinstance(a, torch.Size) and len(a) == 4)
    return conv_flop_count(image, weight, out_shape)


def describe_operations(rows: dict) -> str:
    """A table: the share of the ceiling that each variant reaches, and of its time by kind."""
    lines = []
    for name, row in rows.items():
        reached = 1e3 * row["flops"] / row["median_ms"] / row["ceiling"]
        total = sum(row["seconds"].values())
        shares = [f"{value / total:.0%}" for value in row["seconds"].values()]
        known = (f"{row['flops'] / 1e9:.0f}", f"{reached:.0%}") if row["flops"] else ("", "")
        lines.append([name, *known, *shares])
    columns = ["", "GFLOP", "of the ceiling", *next(iter(rows.values()))["seconds"]]
    return tabulate(lines, columns, disable_numparse=True, stralign="right")
