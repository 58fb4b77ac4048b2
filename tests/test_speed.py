"""What makes models faster: memory format and mixed precision on CPUs."""

import copy
import logging
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from balanced_d2 import load_config
from balanced_d2.engine import BalancedTrainer, speed
from balanced_d2.engine.speed import autocast, has_fast_bfloat16, speed_up, use_available_device
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, logged, run_program
from .test_architectures import labelled_image

needs_bfloat16 = pytest.mark.skipif(
    not has_fast_bfloat16(), reason="this CPU has no instructions for bfloat16"
)


def config(*options):
    model = [*TINY_MODEL, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu"]
    return load_config(str(ROOT / TINY_CONFIG), [*model, *options])


def losses_and_detections(model):
    torch.manual_seed(3)
    image = labelled_image()
    with EventStorage():
        losses = model.train()([image])
    return losses, model.eval()([image])[0]["instances"]


def test_channels_last_changes_nothing_but_the_layout():
    results = []
    for channels_last in ("False", "True"):
        cfg = config("MODEL.CHANNELS_LAST", channels_last)
        torch.manual_seed(0)
        model = speed_up(cfg, build_model(cfg))
        weight = model.backbone.fpn_output2.weight
        is_last = weight.is_contiguous(memory_format=torch.channels_last)
        assert is_last == (channels_last == "True")
        results.append(losses_and_detections(model))
    (plain, found), (other, also_found) = results
    for name, value in plain.items():
        assert torch.allclose(other[name], value, rtol=1e-4), name
    assert torch.allclose(also_found.scores, found.scores, atol=1e-4)


class Linear(nn.Linear):
    """Remembers the dtype that it computes in."""

    def forward(self, x):
        output = super().forward(x)
        self.dtype = output.dtype
        return output


@pytest.mark.parametrize("training", [True, False])
def test_each_mode_has_its_own_precision(training):
    model = nn.Sequential(Linear(2, 2))
    autocast(model, "cpu", training)
    for mode in (True, False):
        model.train(mode)(torch.ones(1, 2))
        assert model[0].dtype == (torch.bfloat16 if mode == training else torch.float32)


@pytest.mark.parametrize("enabled", [True, False])
def test_augmented_evaluation_in_mixed_precision(enabled, monkeypatch):
    """Detectron2's test-time augmentation does not call the model's forward."""
    cfg = config("TEST.AMP.ENABLED", str(enabled), "DATASETS.TEST", "()")
    seen = []

    def evaluate(cfg, model, evaluators):
        seen.append(model.model.backbone(torch.zeros(1, 3, 32, 32))["p3"].dtype)
        return {}

    monkeypatch.setattr(BalancedTrainer, "test", evaluate)
    BalancedTrainer.test_with_TTA(cfg, speed_up(cfg, build_model(cfg)).eval())
    assert seen == [torch.bfloat16 if enabled else torch.float32]


@pytest.mark.parametrize(
    "conv, gains",
    [
        (nn.Conv2d(64, 64, 3, padding=1), True),  # 64 * 64 * 9 / 128 = 288 products per value
        (nn.Conv2d(64, 64, 1), True),  # 32
        (nn.Conv2d(24, 144, 1), False),  # 20.6
        (nn.Conv2d(240, 240, 5, padding=2, groups=240), False),  # 12.5
        (nn.Conv2d(256, 256, 3, padding=1, groups=4), True),  # 288
        (nn.Conv2d(3, 64, 7, padding=3), True),  # 140
    ],
)
def test_convolutions_in_the_precision_that_is_faster(conv, gains):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(conv))
    for _ in range(2):  # the second time changes nothing
        autocast(model, "cpu", training=True)
    x = torch.randn(2, conv.in_channels, 9, 11)
    for dtype in (torch.float32, torch.bfloat16):
        output = model(x.to(dtype))
        assert output.dtype == (torch.bfloat16 if gains else torch.float32)
        assert torch.allclose(output.float(), conv(x), atol=0.1)
    assert model.eval()(x).dtype == torch.float32
    autocast(model, "cpu", training=False)
    output = model(x)  # without gradients, all are faster in bfloat16
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.float(), conv(x), atol=0.1)


@needs_bfloat16
@pytest.mark.parametrize("training", [True, False])
def test_scores_and_boxes_are_predicted_in_float32(training):
    cfg = config()
    torch.manual_seed(0)
    model, outputs = build_model(cfg), {}
    autocast(model, "cpu", training=training)
    for name, module in model.roi_heads.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: outputs.update({name: y.dtype}))
    model.train(training)
    with EventStorage():
        model([labelled_image()])
    assert outputs["box_head.fc1"] == torch.bfloat16
    assert outputs["box_predictor.cls_score"] == outputs["box_predictor.bbox_pred"] == torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_mixed_precision_only_where_it_is_faster(fast, monkeypatch, caplog):
    monkeypatch.setattr(speed, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = config("SOLVER.AMP.ENABLED", "True", "TEST.AMP.ENABLED", "True", "MODEL.DEVICE", "cuda")
    with caplog.at_level(logging.INFO, "balanced_d2"):
        use_available_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"
    assert cfg.SOLVER.AMP.ENABLED == cfg.TEST.AMP.ENABLED == fast
    assert len(caplog.records) == 2 - fast


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "mps" if sys.platform == "linux" else "x"])
def test_devices_that_cannot_be_used(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but there are no 100
    with pytest.raises(UserError, match=f"MODEL.DEVICE .*'{name}', which cannot be used here: "):
        use_available_device(config("MODEL.DEVICE", name))


@needs_bfloat16
@pytest.mark.parametrize("architecture", ["R-CNN", "RetinaNet"])
def test_losses_in_mixed_precision(architecture):
    """Within rounding of bfloat16, finite, and in float32 where they are summed."""
    options = []
    if architecture == "RetinaNet":
        options = [
            *("MODEL.META_ARCHITECTURE", "BalancedRetinaNet", "MODEL.RETINANET.NUM_CLASSES", "3"),
            *("MODEL.BACKBONE.NAME", "build_balanced_retinanet_fpn_backbone"),
            *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
            *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
            *("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random"),
        ]
    cfg = config(*options)
    torch.manual_seed(0)
    model = build_model(cfg)
    expected, _ = losses_and_detections(model)
    autocast(model, "cpu", training=True)
    losses, _ = losses_and_detections(model)
    for name, value in losses.items():
        assert value.dtype == torch.float32 and torch.isfinite(value)
        assert torch.allclose(value, expected[name], rtol=0.1, atol=0.02), name
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@needs_bfloat16
@pytest.mark.slow
def test_training_in_mixed_precision_resumes_exactly(tiny_coco, tmp_path, train_net_here):
    def arguments(output):
        return [
            *("--register", "tiny", tiny_coco, tiny_coco.parent / "images", *TINY_MODEL),
            *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)", "OUTPUT_DIR", output),
            *("SEED", "1", "DATALOADER.NUM_WORKERS", "0", "SOLVER.CHECKPOINT_PERIOD", "2"),
            *("SOLVER.AMP.ENABLED", "True", "TEST.AMP.ENABLED", "True"),
            *("MODEL.CHANNELS_LAST", "True", "MODEL.SPARSE_ROI_ALIGN", "True"),
            *("SOLVER.MAX_ITER", "4"),
        ]

    result = train_net_here(*arguments(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "bbox/AP" in logged(tmp_path)[-1]
    expected = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    for name in ("model_final.pth", "model_0000003.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    result = train_net_here("--resume", *arguments(tmp_path))
    assert "Starting training from iteration 2" in result.stdout
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


PAGE_FAULTS = """
import resource, torch
from balanced_d2.engine.speed import keep_heap
if {keep}:
    keep_heap()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(40):  # until the heap has blocks that fit with their alignment
    faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_freed_memory_is_used_again():
    counts = {}
    for keep in (True, False):
        result = run_program("-W", "ignore", "-c", PAGE_FAULTS.format(keep=keep))
        counts[keep] = int(result.stdout)
    if counts[False] < 1000:
        pytest.skip("this C library, or huge pages, need no help")
    assert counts[True] < counts[False] / 10
