"""What hard examples and class losses cost."""

import functools

import torch
from torch.nn import functional as F

from balanced_d2.benchmark.bench import Bench
from balanced_d2.benchmark.models import WHOLE, WholeModel, labelled_image
from balanced_d2.config import load_config
from balanced_d2.modeling import CLS_LOSSES

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
