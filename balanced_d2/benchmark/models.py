"""Whole models with random weights: what each balance adds, and what makes them fast."""

import functools

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from balanced_d2.benchmark.bench import Bench
from balanced_d2.benchmark.operations import describe_operations, product_flops, where_time_goes
from balanced_d2.config import load_config
from balanced_d2.config.zoo import get_config_file
from balanced_d2.engine.speed import autocast, speed_up, use_available_device

WHOLE = {
    "plain": "faster_rcnn_R_50_FPN_1x.yaml",
    "all balances": "balanced_faster_rcnn_R_50_FPN_1x.yaml",
    "sampling": "faster_rcnn_R_50_FPN_1x_iou_balanced_sampling.yaml",
    "feature balance": "faster_rcnn_R_50_FPN_1x_balanced_fpn.yaml",
    "Balanced L1": "faster_rcnn_R_50_FPN_1x_balanced_l1.yaml",
}
PLAIN = (
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
)
FAST = ("MODEL.CHANNELS_LAST", "MODEL.SPARSE_ROI_ALIGN", "MODEL.FOLD_NORM")
MIXED = ("SOLVER.AMP.ENABLED", "TEST.AMP.ENABLED")
LITE0 = "Aquarium/balanced_faster_rcnn_lite0_FPN_1x.yaml"


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


def switched(keys: tuple, on: bool) -> tuple:
    return tuple(word for key in keys for word in (key, str(on)))


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
