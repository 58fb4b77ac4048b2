"""Measure this project against plain Detectron2 and straightforward code.

All variants of a comparison take turns (A B A B ...) in one process; a table shows the median, the
range and the median of the ratios turn by turn, so that a slow moment of the machine falls on all.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import platform
import re
import runpy
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler says when it starts and stops

# First, so that importing Detectron2 is quiet.
from balanced_d2.config import load_config
from balanced_d2.config.zoo import get_config_file
from balanced_d2.engine.speed import autocast, has_fast_bfloat16, speed_up, use_available_device
from balanced_d2.layers.feature_balancer import REFINEMENTS
from balanced_d2.modeling import (
    CLS_LOSSES,
    FeatureBalancer,
    NonLocal2d,
    balanced_l1_loss,
    sample_iou_balanced,
)
from balanced_d2.utils.errors import UserError

# isort: split
import detectron2
import numpy as np
import torch
from detectron2.layers import ROIAlignRotated
from detectron2.layers.rotated_boxes import pairwise_iou_rotated
from detectron2.modeling import build_model
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import smooth_l1_loss
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from tqdm import tqdm

PACKAGE = Path(__file__).resolve().parent.parent
WHOLE = {
    "plain": "faster_rcnn_R_50_FPN_1x.yaml",
    "all balances": "balanced_faster_rcnn_R_50_FPN_1x.yaml",
    "sampling": "faster_rcnn_R_50_FPN_1x_iou_balanced_sampling.yaml",
    "feature balance": "faster_rcnn_R_50_FPN_1x_balanced_fpn.yaml",
    "Balanced L1": "faster_rcnn_R_50_FPN_1x_balanced_l1.yaml",
}


# Baselines, written in the straightforward way.


class ExplicitNonLocal(nn.Module):
    """The non-local block with the positions x positions matrix in memory."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("theta", "phi", "g", "conv_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        theta, phi, g = (conv(x).flatten(2) for conv in (self.theta, self.phi, self.g))
        attention = torch.softmax(theta.transpose(1, 2) @ phi, dim=-1)
        y = (attention @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        return x + self.conv_out(y)


class ExplicitBalancer(nn.Module):
    """Gather, refine and scatter with PyTorch's general operators."""

    def __init__(self, channels: int, refine_level: int = 2):
        super().__init__()
        self.refine_level = refine_level
        self.refine = ExplicitNonLocal(channels)

    def forward(self, features):
        size = features[self.refine_level].shape[-2:]
        gathered = [
            F.adaptive_max_pool2d(x, size) if i < self.refine_level else F.interpolate(x, size)
            for i, x in enumerate(features)
        ]
        balanced = self.refine(sum(gathered) / len(gathered))
        return [
            x
            + (
                F.interpolate(balanced, x.shape[-2:])
                if i < self.refine_level
                else F.adaptive_max_pool2d(balanced, x.shape[-2:])
            )
            for i, x in enumerate(features)
        ]


def sample_with_sets(ious: torch.Tensor, num_samples: int, num_bins: int = 3) -> torch.Tensor:
    """IoU-balanced sampling with NumPy and sets."""
    values = ious.cpu().numpy()
    chosen = []
    for k in range(num_bins):
        low, high = 0.5 * k / num_bins, 0.5 * (k + 1) / num_bins
        members = set(np.flatnonzero((values >= low) & (values < high)))
        if len(members) > num_samples // num_bins:
            chosen.append(np.random.choice(list(members), num_samples // num_bins, replace=False))
        else:
            chosen.append(np.array(list(members), dtype=int))
    chosen = np.concatenate(chosen)
    rest = np.array(list(set(range(len(values))) - set(chosen)))
    missing = num_samples - len(chosen)
    if missing > 0:
        chosen = np.concatenate([chosen, np.random.choice(rest, missing, replace=False)])
    return torch.from_numpy(chosen).to(ious.device)


# Measuring.


class Bench:
    """Runs comparisons on a device and keeps their results.

    Args:
        device: "cpu" or "cuda".
        turns: how often each variant is run.
    """

    def __init__(self, device: str, turns: int):
        self.device = torch.device(device)
        self.turns = turns
        self.results = {}

    def compare(self, title: str, variants: dict, calls: int = 1, memory: bool = True) -> dict:
        """Time functions in turns, print the table and keep the figures.

        Args:
            variants: functions by name; ratios are to the first.
            calls: how often a function is called in each measurement.
            memory: whether to measure the peak of the memory that each allocates.
        """
        seconds = {name: [] for name in variants}
        for run in variants.values():  # warm-up
            run()
        for _ in tqdm(range(self.turns), desc=title, unit="turn", disable=None, leave=False):
            for name, run in variants.items():
                seconds[name].append(self._seconds(run, calls))
        first = next(iter(variants))
        rows = {}
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds[first])]
            rows[name] = {
                "median_ms": 1e3 * statistics.median(times),
                "min_ms": 1e3 * min(times),
                "max_ms": 1e3 * max(times),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
            if memory:
                rows[name]["peak_mib"] = self.peak(variants[name]) / 2**20
        self.results[title] = rows
        print(f"\n{title}\n{self._table(rows, first, memory)}", flush=True)
        return rows

    def _table(self, rows: dict, first: str, memory: bool) -> str:
        columns = ["", "median (ms)", "range (ms)", f"/ {first}", "range of it"]
        columns += ["peak (MiB)"] * memory
        lines = []
        for name, row in rows.items():
            lines.append(
                [
                    name,
                    f"{row['median_ms']:.4g}",
                    f"{row['min_ms']:.4g} - {row['max_ms']:.4g}",
                    f"{row['ratio']:.3f}",
                    f"{min(row['ratios']):.2f} - {max(row['ratios']):.2f}",
                    *([f"{row['peak_mib']:.0f}"] if memory else []),
                ]
            )
        return tabulate(lines, columns, disable_numparse=True, stralign="right")

    def _seconds(self, run, calls: int) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / calls
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def peak(self, run) -> float:
        """The most bytes that a function has allocated at one time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def growth(self, title: str, runs: dict) -> None:
        """Fit how time and memory grow with a size: runs by size."""
        rows = {}
        for size, run in runs.items():
            run()
            times = [self._seconds(run, 1) for _ in range(self.turns)]
            rows[size] = {
                "median_ms": 1e3 * statistics.median(times),
                "peak_mib": self.peak(run) / 2**20,
            }
        log_size = np.log(list(rows))
        exponents = {
            key: float(np.polyfit(log_size, [math.log(row[key]) for row in rows.values()], 1)[0])
            for key in ("median_ms", "peak_mib")
        }
        self.results[title] = {"sizes": rows, "exponents": exponents}
        lines = [
            (f"x {size}", f"{row['median_ms']:.4g}", f"{row['peak_mib']:.1f}")
            for size, row in rows.items()
        ]
        lines.append(("exponent", f"{exponents['median_ms']:.2f}", f"{exponents['peak_mib']:.2f}"))
        columns = ("", "median (ms)", "peak (MiB)")
        print(f"\n{title}\n{tabulate(lines, columns, disable_numparse=True, stralign='right')}")


# What is measured.


class WholeModel:
    """A model with random weights and its optimizer.

    Args:
        config: in ``configs/``.
        options: of the config.
        fast: whether it is prepared as ``train_net.py`` does by the keys of the config.
    """

    def __init__(self, bench: Bench, config: str, options: tuple = (), fast: bool = False):
        torch.manual_seed(0)
        options = ["MODEL.DEVICE", bench.device.type, *options]
        cfg = load_config(get_config_file(config), options)
        use_available_device(cfg)
        self.model = build_model(cfg)
        calibrate(self.model)
        if fast:
            speed_up(cfg, self.model)
            if cfg.SOLVER.AMP.ENABLED:
                autocast(self.model, cfg.MODEL.DEVICE, training=True)
        # The weights are random, and a rate above zero would let them diverge.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-14, momentum=0.9)

    def train(self, batch: list) -> None:
        with EventStorage():
            losses = self.model.train()(batch)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def detect(self, batch: list) -> None:
        self.model.eval()(batch)


@torch.no_grad()
def calibrate(model: nn.Module) -> None:
    """Give frozen norms the statistics of what they see, as trained ones have, or else random
    weights make such large values that no proposals are left."""

    def measure(norm, inputs):
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    norms = [m for m in model.modules() if "FrozenBatchNorm" in type(m).__name__]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    model.eval()([labelled_image(0, 320, 480)])
    for hook in hooks:
        hook.remove()


def measure_whole(bench: Bench, scale: float) -> None:
    """What each balance adds to a training iteration and to inference of whole models."""
    models = {name: WholeModel(bench, f"COCO-Detection/{file}") for name, file in WHOLE.items()}
    image = [{"image": 255 * torch.rand(3, round(800 * scale), round(1333 * scale))}]
    batch = [labelled_image(seed, round(320 * scale), round(480 * scale)) for seed in (0, 1)]
    for title, method, inputs in (
        ("training iteration, batch 2", "train", batch),
        ("inference", "detect", image),
    ):
        _, height, width = inputs[0]["image"].shape
        bench.compare(
            f"{title}, {height} x {width}, Faster R-CNN R-50-FPN",
            {name: functools.partial(getattr(m, method), inputs) for name, m in models.items()},
        )


PLAIN = (
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
)
FAST = ("MODEL.CHANNELS_LAST", "MODEL.SPARSE_ROI_ALIGN", "MODEL.FOLD_NORM")
MIXED = ("SOLVER.AMP.ENABLED", "TEST.AMP.ENABLED")
LITE0 = "Aquarium/balanced_faster_rcnn_lite0_FPN_1x.yaml"


def switched(keys: tuple, on: bool) -> tuple:
    return tuple(word for key in keys for word in (key, str(on)))


def measure_fast(bench: Bench, scale: float) -> None:
    """Whole models with all that makes them faster, against plain Detectron2, and where their time
    goes."""
    side = round(4096 * scale)
    ceilings = {t: product_flops(bench, t, side) for t in (torch.float32, torch.bfloat16)}
    rates = ", ".join(f"{f / 1e9:,.0f} in {str(t)[6:]}" for t, f in ceilings.items())
    print(f"\nGFLOP/s of a product of {side} x {side} matrices: {rates}", flush=True)

    single = switched(FAST, True) + switched(MIXED, False)
    mixed = switched(FAST + MIXED, True)
    balanced = "COCO-Detection/" + WHOLE["all balances"]
    resnet = {
        "plain": WholeModel(bench, "COCO-Detection/" + WHOLE["plain"], PLAIN),
        "all balances": WholeModel(bench, balanced),
        "fast, float32": WholeModel(bench, balanced, single, fast=True),
        "fast, bfloat16": WholeModel(bench, balanced, mixed, fast=True),
    }
    random = ("MODEL.TIMM.PRETRAINED", "False")
    lite0 = {
        "nothing on": WholeModel(bench, LITE0, switched(FAST + MIXED, False) + random),
        "fast, float32": WholeModel(bench, LITE0, single + random, fast=True),
        "fast, bfloat16": WholeModel(bench, LITE0, mixed + random, fast=True),
    }
    for title, models, method, size, number in (
        ("Faster R-CNN R-50-FPN", resnet, "train", (320, 480), 2),
        ("Faster R-CNN R-50-FPN", resnet, "train", (480, 640), 1),
        ("Faster R-CNN R-50-FPN", resnet, "detect", (800, 1333), 1),
        ("Faster R-CNN Lite0-FPN", lite0, "train", (360, 480), 4),
        ("Faster R-CNN Lite0-FPN", lite0, "detect", (360, 480), 1),
    ):
        height, width = (round(side * scale) for side in size)
        batch = [labelled_image(seed, height, width, classes=7) for seed in range(number)]
        what = "training iteration" if method == "train" else "inference"
        title = f"{title}, {what}, batch {number}, {height} x {width}"
        runs = {name: functools.partial(getattr(m, method), batch) for name, m in models.items()}
        rows = bench.compare(title, runs, memory=False)
        for name, run in runs.items():
            dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
            rows[name].update(where_time_goes(models[name].model, run), ceiling=ceilings[dtype])
        print(describe_operations(rows), flush=True)


def product_flops(bench: Bench, dtype: torch.dtype, side: int) -> float:
    """The most floating-point operations per second that one product of two matrices reaches."""
    a = torch.ones(side, side, dtype=dtype, device=bench.device)
    a @ a
    return 2 * side**3 / min(bench._seconds(lambda: a @ a, 1) for _ in range(bench.turns))


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


def labelled_image(seed: int, height: int, width: int, classes: int = 80) -> dict:
    """A random image with 10 boxes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    corner = 0.6 * size * torch.rand(10, 2, generator=generator)
    other = corner + size * (0.05 + 0.3 * torch.rand(10, 2, generator=generator))
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corner, other], dim=1))
    instances.gt_classes = torch.randint(classes, (10,), generator=generator)
    return {
        "image": 255 * torch.rand(3, height, width, generator=generator),
        "instances": instances,
    }


def pyramid(batch: int, channels: int, height: int, width: int, device) -> list:
    """P2 to P6 of an image of a size that is a multiple of 32."""
    sizes = [(height // stride, width // stride) for stride in (4, 8, 16, 32)]
    sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return [torch.randn(batch, channels, *s, device=device, requires_grad=True) for s in sizes]


def forward_and_backward(module: nn.Module, features):
    """A function that runs both, of a module that takes and returns a tensor or a list of them."""
    is_one = isinstance(features, torch.Tensor)
    leaves = [features] if is_one else features
    gradients = [torch.ones_like(x) for x in leaves]

    def run():
        torch.autograd.backward(module(features), gradients[0] if is_one else gradients)
        for x in leaves:
            x.grad = None
        module.zero_grad()

    return run


def measure_parts(bench: Bench, scale: float) -> None:
    """Balancing, sampling and loss by themselves."""
    height, width = (32 * round(side * scale / 32) for side in (800, 1344))
    channels = 256
    features = pyramid(2, channels, height, width, bench.device)
    explicit = ExplicitBalancer(channels).to(bench.device)
    balancers = {
        name: FeatureBalancer(channels, 2, name).to(bench.device) for name in REFINEMENTS.names()
    }

    @torch.no_grad()
    def forward(balancer):
        balancer(features)

    where = f"batch 2, {height} x {width}, {channels} channels"
    bench.compare(
        f"feature balancing, forward, {where}",
        {
            "explicit N x N": lambda: forward(explicit),
            **{name: (lambda b=b: forward(b)) for name, b in balancers.items()},
        },
    )
    bench.compare(
        f"feature balancing, forward and backward, {where}",
        {
            "explicit N x N": forward_and_backward(explicit, features),
            **{name: forward_and_backward(b, features) for name, b in balancers.items()},
        },
    )

    refined = pyramid(2, channels, height, width, bench.device)[2]
    bench.compare(
        f"refinement alone, forward and backward, {where}",
        {
            name: forward_and_backward(block.to(bench.device), refined)
            for name, block in (
                ("non_local", NonLocal2d(channels)),
                ("non_local_pooled", NonLocal2d(channels, pool_keys=True)),
            )
        },
    )

    # Many easy candidates and few hard ones, as proposals have them.
    ious = 0.5 * torch.rand(2000, device=bench.device) ** 3
    labels = torch.full((2000,), 80, device=bench.device)
    bench.compare(
        "sampling 512 of 2,000 candidates",
        {
            "Detectron2, random": lambda: subsample_labels(labels, 512, 0.25, 80),
            "IoU-balanced": lambda: sample_iou_balanced(ious, 512),
            "NumPy and sets": lambda: sample_with_sets(ious, 512),
        },
        calls=20,
        memory=False,
    )

    deltas = torch.randn(512, 4, device=bench.device, requires_grad=True)
    targets = torch.randn(512, 4, device=bench.device)
    bench.compare(
        "box loss of 512 boxes, forward and backward",
        {
            "fvcore's smooth L1": lambda: smooth_l1_loss(deltas, targets, 1.0, "sum").backward(),
            "Balanced L1": lambda: balanced_l1_loss(deltas, targets, reduction="sum").backward(),
        },
        calls=20,
        memory=False,
    )


HARD = {
    "random": (),
    "IoU-balanced": ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced"),
    "OHEM": ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem"),
    "OHEM, no suppression": (
        *("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem", "MODEL.ROI_HEADS.OHEM_NMS_THRESH", "1.0"),
    ),
}


def measure_classes(bench: Bench, scale: float) -> None:
    """What hard examples and class losses cost."""
    config = f"COCO-Detection/{WHOLE['plain']}"
    models = {name: WholeModel(bench, config, options) for name, options in HARD.items()}
    batch = [labelled_image(seed, round(320 * scale), round(480 * scale)) for seed in (0, 1)]
    _, height, width = batch[0]["image"].shape
    bench.compare(
        f"training iteration, batch 2, {height} x {width}, by the sampler of proposals",
        {name: functools.partial(model.train, batch) for name, model in models.items()},
    )

    for number in (80, 1203):
        logits = torch.randn(1024, number + 2, device=bench.device, requires_grad=True)
        classes = torch.randint(number + 1, (1024,), device=bench.device)
        node = load_config("").MODEL.ROI_BOX_HEAD
        counts = [1 + k * k for k in range(number)]

        def runs(loss, num_logits, logits=logits, classes=classes):
            def run():
                logits.grad = None
                loss(logits[:, :num_logits], classes).mean().backward()

            return run

        losses = {
            name: CLS_LOSSES.build(name, node, num_classes=number, class_counts=counts)
            for name in CLS_LOSSES.names()
        }
        bench.compare(
            f"class loss of 1,024 proposals of {number:,} classes, forward and backward",
            {
                "cross_entropy": runs(F.cross_entropy, number + 1),
                **{
                    name: runs(loss.to(bench.device).loss, loss.num_logits)
                    for name, loss in losses.items()
                },
            },
            calls=20,
            memory=False,
        )


def measure_growth(bench: Bench, scale: float) -> None:
    """How the cost of balancing grows with the image and the batch."""
    side = max(64, 32 * round(256 * scale / 32))
    balancer = FeatureBalancer(256).to(bench.device)
    # height and width in turn: area x 1, 2, 4, 8
    areas = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}
    bench.growth(
        f"balancing, forward and backward, with the area of {side} x {side}",
        {
            area: forward_and_backward(balancer, pyramid(1, 256, h * side, w * side, bench.device))
            for area, (h, w) in areas.items()
        },
    )
    bench.growth(
        f"balancing, forward and backward, with the batch, {side} x {side}",
        {
            batch: forward_and_backward(balancer, pyramid(batch, 256, side, side, bench.device))
            for batch in (1, 2, 4, 8)
        },
    )


def pure_operators(name: str) -> dict:
    """What a module of ours has that stands in Detectron2's pure-Python wheel, by name."""
    folder = PACKAGE / "installation" / "wheel" / "detectron2"
    return runpy.run_path(str(folder / f"{name}.py"))


def measure_operators(bench: Bench, scale: float) -> None:
    """The operators of the pure-Python Detectron2, beside compiled ones if they are there."""

    def boxes(number: int, extent: float) -> torch.Tensor:
        uniform = torch.rand(number, 5, device=bench.device)
        shift = uniform.new_tensor([0, 0, 4, 4, -90])
        return uniform * uniform.new_tensor([extent, extent, 100, 100, 180]) + shift

    def pooled(pool):
        def run():
            features.grad = None
            pool(features, rois).sum().backward()

        return run

    rotated, pooling = (
        pure_operators("layers/rotated_boxes"),
        pure_operators("layers/roi_align_rotated"),
    )
    truth, anchors = boxes(20, 800), boxes(round(50000 * scale), 800)
    proposals = boxes(round(2000 * scale), 800)
    scores = torch.rand(len(proposals), device=bench.device)
    features = torch.randn(1, 256, 100, 168, device=bench.device, requires_grad=True)
    rois = boxes(round(512 * scale), 640)
    rois = torch.cat((torch.zeros_like(rois[:, :1]), rois), dim=1)
    variants = {
        f"IoU of {len(truth)} and {len(anchors):,} rotated boxes": {
            "compiled": lambda: pairwise_iou_rotated(truth, anchors),
            "pure": lambda: rotated["pairwise_iou_rotated"](truth, anchors),
        },
        f"suppression of {len(proposals):,} rotated boxes": {
            "compiled": lambda: torch.ops.detectron2.nms_rotated(proposals, scores, 0.5),
            "pure": lambda: rotated["nms_rotated"](proposals, scores, 0.5),
        },
        f"RoIAlignRotated of {len(rois)} boxes, 256 channels, forward and backward": {
            "compiled": pooled(ROIAlignRotated((7, 7), 0.125, 0)),
            "pure": pooled(pooling["ROIAlignRotated"]((7, 7), 0.125, 0)),
        },
    }
    for title, runs in variants.items():
        if importlib.util.find_spec("detectron2._C") is None:
            del runs["compiled"]
        bench.compare(title, runs, memory=False)

    truth, detections = coco_annotations(num_images=round(5000 * scale))
    evaluators = {"pycocotools": COCOeval}
    evaluators["faster-coco-eval"] = pure_operators("evaluation/fast_eval_api")["COCOeval_opt"]
    bench.compare(
        f"COCO evaluation of {len(detections.anns):,} boxes in {len(truth.imgs):,} images",
        {
            name: lambda cls=cls: evaluate(cls, truth, detections)
            for name, cls in evaluators.items()
        },
        memory=False,
    )


def coco_annotations(num_images: int) -> tuple:
    """Random ground truth of 80 classes, and detections about as good as those of a detector."""
    random = np.random.default_rng(0)
    truth, found = [], []
    for image in range(1, num_images + 1):
        for _ in range(random.integers(1, 14)):
            category = int(random.integers(1, 81))
            box = random.uniform((0, 0, 4, 4), (500, 400, 100, 100))
            area = float(box[2] * box[3])
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": category})
            truth[-1].update(bbox=box.tolist(), area=area, iscrowd=0)
            for _ in range(3):
                moved = (box + random.normal(0, 8, 4)).clip(1).tolist()
                found.append({"image_id": image, "category_id": category, "bbox": moved})
                found[-1]["score"] = float(random.random())
    with contextlib.redirect_stdout(None):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": 600, "width": 600} for i in range(1, num_images + 1)],
            "annotations": truth,
            "categories": [{"id": i, "name": str(i)} for i in range(1, 81)],
        }
        coco.createIndex()
        return coco, coco.loadRes(found)


def evaluate(evaluator: type, truth: COCO, detections: COCO) -> None:
    with contextlib.redirect_stdout(None):
        evaluation = evaluator(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()


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
    # Not needed by the other parts, and the exporters take long to import.
    from balanced_d2 import export
    from balanced_d2.commands.export_model import EXPORTERS, EXTENSIONS
    from balanced_d2.export.run_exported import ExportedDetector

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
    described = {"class_names": [], "input_format": "BGR", "min_size": 0, "max_size": 0}
    for format in formats or EXPORTERS:
        path = os.path.join(folder, f"model.{EXTENSIONS[format]}")
        outputs = export.output_names(is_batch=format in export.BATCH_FORMATS)
        metadata = {**described, "format": format, "outputs": outputs}
        try:
            EXPORTERS[format](model, image, path, metadata)
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
    return bench.compare(title, runs, memory=False)


PARTS = {
    "whole": measure_whole,
    "fast": measure_fast,
    "parts": measure_parts,
    "classes": measure_classes,
    "growth": measure_growth,
    "operators": measure_operators,
    "export": measure_export,
}
# Export takes minutes, and packages that not everyone has.
DEFAULT_PARTS = [part for part in PARTS if part != "export"]


def processor() -> str:
    """The name of the CPU, and whether it has instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    name = names[0] if names else platform.machine()
    return f"{name}, {'with' if has_fast_bfloat16() else 'without'} bfloat16"


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs CUDA, which this machine has not")
    if args.turns < 1 or not 0 < args.scale <= 1:
        raise UserError("--turns has to be 1 or more, and --scale above 0 and at most 1")
    machine = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "python": platform.python_version(),
        "turns": args.turns,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    torch.manual_seed(0)
    bench = Bench(args.device, args.turns)
    for name in args.only or DEFAULT_PARTS:
        PARTS[name](bench, args.scale)
    if args.output:
        try:
            Path(args.output).write_text(
                json.dumps({"machine": machine, "results": bench.results}, indent=1) + "\n"
            )
        except OSError as error:
            raise UserError(f"cannot write {args.output}: {error.strerror}") from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, help="what to measure (default: all but export)"
    )
    parser.add_argument("--turns", type=int, default=9, help="runs of each variant (default: 9)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="scale of all images, for a quick look"
    )
    parser.add_argument("--output", metavar="FILE.json", help="also write all figures there")
    return parser.parse_args()
