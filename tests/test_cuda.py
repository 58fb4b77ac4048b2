"""What a first GPU has to show. What can be, runs on the CPU as well, so that these tests are right
when a GPU comes; what is skipped without one says so. See also test_fake_cuda.py."""

import copy
import math
import warnings

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from balanced_d2 import load_config
from balanced_d2.export import Deployable, trace
from balanced_d2.modeling import (
    BalancedSamplingMixin,
    FeatureBalancer,
    NonLocal2d,
    balanced_l1_loss,
    sample_instance_balanced,
    sample_iou_balanced,
)

from .conftest import TINY_MODEL, logged, train_net
from .test_architectures import ARCHITECTURES, R_18
from .test_version_0_1_0 import CONFIG, WEIGHTS

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_precision = pytest.mark.skipif(
    "PRECISION" not in get_cfg().SOLVER.AMP, reason="this Detectron2 has no SOLVER.AMP.PRECISION"
)
# bfloat16 is emulated, slowly and not by all kernels, before Ampere.
has_bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_bf16 = pytest.mark.skipif(not has_bf16, reason="needs CUDA with bfloat16")

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
# Device and dtype of autocast.
PRECISIONS = [
    pytest.param("cpu", None),
    pytest.param("cpu", torch.bfloat16),
    pytest.param("cuda", None, marks=needs_cuda),
    pytest.param("cuda", torch.float16, marks=needs_cuda),
    pytest.param("cuda", torch.bfloat16, marks=needs_bf16),
]


def autocast(device, dtype):
    return torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)


@pytest.fixture
def exact():
    """Convolutions in float32 as it is, without the 13 bits fewer of TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# Training


# With everything sampled that there is, the losses do not depend on chance.
ALL_SAMPLED = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
]


def build(name):
    file, opts, *_ = ARCHITECTURES[name]
    options = [*TINY_MODEL, *R_18, *opts, *ALL_SAMPLED, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    return build_model(load_config(f"configs/{file}", options)).train()


def batch():
    generator = torch.Generator().manual_seed(7)
    inputs = []
    for height, width in ((96, 128), (83, 111)):
        instances = Instances((height, width))
        boxes = torch.tensor([[5.0, 8, 60, 50], [40.0, 30, 72, 66]])
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([0, 1])
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        instances.gt_masks = PolygonMasks([[corner.numpy()] for corner in corners])
        points = boxes.unflatten(1, (2, 2)) * 0.9 + 2
        instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 2, 1), 2.0)], dim=2))
        image = torch.randint(256, (3, height, width), generator=generator).float()
        inputs.append({"image": image, "instances": instances})
    return inputs


def training_step(model, device, dtype):
    """The losses and gradients of one step as Detectron2's trainer does it; the weights change."""
    module = getattr(model, "module", model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    # Its first scale, 65536, lets some gradients overflow, and then the step is left out.
    scaler = torch.amp.GradScaler(device, init_scale=64.0, enabled=dtype == torch.float16)
    torch.manual_seed(3)
    with EventStorage():
        with autocast(device, dtype):
            losses = model(batch())
        scaler.scale(sum(losses.values())).backward()
    scaler.unscale_(optimizer)
    gradients = {name: p.grad.cpu() for name, p in module.named_parameters() if p.requires_grad}
    scaler.step(optimizer)
    scaler.update()
    return {name: loss.item() for name, loss in losses.items()}, gradients


STEPS = [
    pytest.param(name, *precision.values, marks=precision.marks)
    for name in ARCHITECTURES
    for precision in PRECISIONS[1:]  # without what they are compared with
]


@pytest.mark.slow
@pytest.mark.parametrize("name, device, dtype", [*STEPS, ("Faster R-CNN", "cpu", torch.float16)])
def test_a_training_step(name, device, dtype, exact):
    """Losses are those of the CPU in float32, gradients finite, and the balances are trained."""
    model = build(name)
    expected, _ = training_step(copy.deepcopy(model), "cpu", None)
    before = copy.deepcopy(model.state_dict())
    losses, gradients = training_step(model.to(device), device, dtype)
    assert losses == pytest.approx(expected, rel=0.01 if dtype is None else 0.03)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    after = {key: x.cpu() for key, x in model.state_dict().items()}
    changed = {key for key in gradients if not torch.equal(after[key], before[key])}
    weights = {key for key, x in before.items() if x.dim() > 1 and key in gradients}
    # Of the non-local block only the last weights, from which the others get their gradient later.
    untouched = {f"backbone.balancer.refine.{name}.weight" for name in ("theta", "phi", "g")}
    assert changed >= weights - untouched


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Faster R-CNN", "RetinaNet"])
def test_distributed_data_parallel(name, device, tmp_path, exact):
    """In one process, with the communication of several: the same gradients, and no parameter is
    left without one, at which the next step would fail."""
    model = build(name).to(device)
    _, expected = training_step(copy.deepcopy(model), device, None)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        rank=0,
        world_size=1,
    )
    try:
        parallel = DistributedDataParallel(model, device_ids=[0] if device == "cuda" else None)
        _, gradients = training_step(parallel, device, None)
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)
        losses, _ = training_step(parallel, device, None)
        assert all(map(math.isfinite, losses.values()))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, num_gpus, amp",
    [
        ("cpu", 1, []),
        pytest.param("cuda", 1, [], marks=needs_cuda),
        pytest.param("cuda", 1, ["float16"], marks=needs_cuda),
        pytest.param("cuda", 1, ["bfloat16"], marks=[needs_bf16, needs_precision]),
        pytest.param("cuda", 2, [], marks=needs_two_gpus),
        pytest.param("cuda", 2, ["float16"], marks=needs_two_gpus),
    ],
)
def test_train_net(device, num_gpus, amp, tiny_coco, tmp_path):
    """Two iterations with evaluation, and two more with --resume."""
    precision = ["SOLVER.AMP.ENABLED", "True"] if amp else []
    if "PRECISION" in get_cfg().SOLVER.AMP:
        precision += [word for dtype in amp for word in ("SOLVER.AMP.PRECISION", dtype)]
    for max_iter, resume in ((2, []), (4, ["--resume"])):
        result = train_net(
            *("--register", "tiny", tiny_coco, tiny_coco.parent / "images"),
            *("--num-gpus", num_gpus, *resume, *TINY_MODEL, *precision),
            *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"),
            *("MODEL.DEVICE", device, "OUTPUT_DIR", tmp_path, "DATALOADER.NUM_WORKERS", "0"),
            *("SOLVER.MAX_ITER", max_iter, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "-1.0"),
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "running on the CPU" not in result.stdout + result.stderr
        metrics = {key: value for line in logged(tmp_path) for key, value in line.items()}
        assert metrics["iteration"] == max_iter and "bbox/AP" in metrics
        assert math.isfinite(metrics["total_loss"])
        saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
        assert all(torch.isfinite(value).all() for value in saved["model"].values())
        assert ("grad_scaler" in saved["trainer"]["_trainer"]) == bool(amp)
    assert "Starting training from iteration 2" in result.stdout + result.stderr


# Attention


@pytest.mark.parametrize("device, dtype", PRECISIONS)
@pytest.mark.parametrize("pool_keys", [False, True])
def test_attention_is_a_fused_kernel(pool_keys, device, dtype):
    """Flash or memory-efficient, at the paper's 256 channels, and no matrix of all positions."""
    block = NonLocal2d(256, pool_keys).to(device)
    height, width = (160, 256) if device == "cuda" else (20, 24)
    x = torch.randn(1, 256, height, width, device=device, requires_grad=True)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with autocast(device, dtype):
            y = block(x)
        y.sum().backward()
    names = {event.name for event in profile.events() if "scaled_dot_product" in event.name}
    fused = {name for name in names if any(k in name for k in ("flash", "efficient", "cudnn"))}
    assert any("backward" in name for name in fused) and len(fused) >= 2, names
    assert not any("math" in name for name in names), names
    if device == "cuda":
        num_values = (height * width) ** 2 // (4 if pool_keys else 1)
        matrix = num_values * (dtype or torch.float32).itemsize
        assert torch.cuda.max_memory_allocated() - before < matrix


# Inference


@pytest.fixture(scope="module")
def trained():
    """A small detector that 0.1.0 has trained, and an image on which it detects something."""
    model = build_model(load_config(str(CONFIG), [])).eval()
    DetectionCheckpointer(model).load(str(WEIGHTS))
    image = torch.full((3, 64, 80), 120.0)
    image[:, 8:26, 10:28], image[:, 30:52, 40:62] = 230, 20
    return model, image


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exported", [False, True])
def test_detections_are_those_of_the_cpu(exported, device, trained, tmp_path, exact):
    """Of the model, and of a file that was traced on the CPU."""
    model, image = trained
    with torch.no_grad():
        expected = Deployable(model)(image)
        assert len(expected[0]) > 1
        if exported:
            trace(model, image[:, :50, :60]).save(str(tmp_path / "model.ts"))
            module = torch.jit.load(tmp_path / "model.ts", map_location=device)
        else:
            module = Deployable(copy.deepcopy(model).to(device))
        detections = module(image.to(device))
    for got, wanted in zip(detections[:-1], expected[:-1], strict=True):
        assert got.device.type == device
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-3)
    assert detections[-1].tolist() == [64, 80]


# Balances


def pyramid(dtype):
    sizes = [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]
    return [torch.randn(2, 32, *size, device="cuda", dtype=dtype) for size in sizes]


@pytest.fixture
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_iou_balanced_sampling_does_not_synchronise(no_synchronisation):
    sample_iou_balanced(0.5 * torch.rand(2000, device="cuda"), 512)


@needs_cuda
def test_balancing_and_loss_do_not_synchronise(no_synchronisation):
    balancer = FeatureBalancer(32).cuda()
    loss = sum(x.sum() for x in balancer(pyramid(torch.float32)))
    loss = loss + balanced_l1_loss(
        torch.randn(9, 4, device="cuda"), torch.zeros(9, 4, device="cuda"), reduction="sum"
    )
    loss.backward()


@needs_cuda
def test_heads_synchronise_no_more_than_detectron2s():
    def synchronisations(cls, **arguments):
        heads = cls(
            num_classes=4,
            batch_size_per_image=64,
            positive_fraction=0.25,
            proposal_matcher=Matcher([0.5], [0, 1]),
            **arguments,
        )
        proposals, targets = Instances((99, 99)), Instances((99, 99))
        corners = torch.rand(400, 2, device="cuda") * 50
        proposals.proposal_boxes = Boxes(torch.cat([corners, corners + 30], dim=1))
        proposals.objectness_logits = torch.zeros(400, device="cuda")
        targets.gt_boxes = Boxes(torch.tensor([[20.0, 20, 50, 50]], device="cuda"))
        targets.gt_classes = torch.tensor([1], device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with EventStorage(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                heads.label_and_sample_proposals([proposals], [targets])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    class Balanced(BalancedSamplingMixin, ROIHeads):
        pass

    assert synchronisations(Balanced) <= synchronisations(ROIHeads)


@needs_cuda
def test_instance_balanced_sampling():
    groups = torch.randint(9, (2000,), device="cuda")
    assert len(set(sample_instance_balanced(groups, 512).tolist())) == 512


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balancing_equals_the_cpu(dtype):
    torch.manual_seed(0)
    balancer = FeatureBalancer(32).cuda()
    torch.nn.init.normal_(balancer.refine.conv_out.weight, std=0.1)
    features = pyramid(torch.float32)
    with torch.no_grad():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            got = balancer(features)
        expected = balancer.cpu()([x.cpu() for x in features])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.float().cpu(), b, rtol=tolerance, atol=tolerance)
