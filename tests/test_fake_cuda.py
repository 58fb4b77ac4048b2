"""What CUDA does with this code, as far as it is seen without a GPU.

PyTorch's fake tensors say that they are on ``cuda`` and have a shape and a dtype, but no values.
Mixing devices is an error with them, as on a GPU. Backward needs a real device; it is run on
``meta``, whose tensors have no values either. That the numbers are right is tested on the CPU, and
on a GPU by test_cuda.py.
"""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_resnet_backbone, poolers
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import retinanet
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, ROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_d2 import load_config
from balanced_d2.modeling import (
    REFINEMENTS,
    BalancedFastRCNNOutputLayers,
    BalancedFPN,
    BalancedL1,
    BalancedSamplingMixin,
    FeatureBalancer,
    IoUBalancedSampler,
    NonLocal2d,
    balanced_l1_loss,
    sample_instance_balanced,
    sample_iou_balanced,
    sample_random,
)

from .conftest import TINY_MODEL
from .test_architectures import ARCHITECTURES, R_18

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
PRECISIONS = [None, torch.float16, torch.bfloat16]  # of autocast


class HostReads(TorchDispatchMode):
    """Records where the host has to wait for a value of the GPU, and makes one up.

    A number is 1. Of a mask, the first third is true: how many are is what the host asks for. Left
    to themselves fake tensors raise there, or have sizes that are symbols, by which no branch such
    as "fewer candidates than wanted" can be decided.
    """

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        x, kwargs = args[0] if args else None, kwargs or {}
        if not isinstance(x, torch.Tensor) or x.device.type != "cuda":
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            one = {torch.bool: True}.get(x.dtype, 1.0 if x.is_floating_point() else 1)
            return self._read(func, one)
        if func is aten.nonzero.default:
            return self._read(func, _some(x))
        if func is aten.index.Tensor and any(map(_is_mask, args[1])):
            columns = [_some(i).unbind(1) if _is_mask(i) else (i,) for i in args[1]]
            return self._read(func, func(x, sum(columns, start=())))
        if func is aten._unique2.default:
            return self._read(func, (x.new_empty(2), torch.empty_like(x), x.new_empty(0)))
        if func is torch.ops.torchvision.nms.default:
            return self._read(func, x.new_empty(math.ceil(len(x) / 3), dtype=torch.long))
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or CUDA) != CUDA:
            return self._read(func, func(*args, **kwargs))
        if func is aten.index_put_.default:  # which fake tensors do not look at
            assert x.dtype == args[2].dtype, "Index put requires the same dtype"
        return func(*args, **kwargs)

    def _read(self, func, value):
        self.reads.append(func.__name__)
        return value


def _is_mask(index):
    return index is not None and index.dtype == torch.bool


def _some(mask):
    """As ``mask.nonzero()``."""
    return mask.new_empty(math.ceil(mask.numel() / 3), mask.dim(), dtype=torch.long)


@pytest.fixture
def reads(monkeypatch):
    """Everything in the test is fake; gives what the host has read so far."""
    # autocast asks whether there is a GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(), HostReads() as mode:
        yield mode.reads


def autocast(dtype):
    return torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None)


def on_cuda(build, *args, **kwargs):
    """Modules of fake tensors cannot be moved. What they make later has no such default device."""
    with CUDA:
        return build(*args, **kwargs)


def assert_cuda(x, dtype, shape):
    assert (x.device, x.dtype, tuple(x.shape)) == (CUDA, dtype, tuple(shape))


def test_the_fake_gpu_itself(reads):
    """What the tests below rely on: reads and mixed devices are seen."""
    x = torch.rand(9, device=CUDA)
    for read in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: x.unique(),
    ):
        reads.clear()
        read()
        assert len(reads) == 1
    with pytest.raises(RuntimeError, match="found at least two devices"):
        x + torch.zeros(9)
    with pytest.raises(DataDependentOutputException):  # of the CPU nothing is made up
        torch.rand(1).item()
    with autocast(torch.bfloat16):
        assert (x[:, None] @ x[None]).dtype == torch.bfloat16


# Sampling


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("num_samples", [0, 512, 4000])
@pytest.mark.parametrize("sample", [sample_random, sample_iou_balanced, IoUBalancedSampler()])
def test_negative_samplers(reads, sample, num_samples, dtype):
    with autocast(dtype):
        chosen = sample(torch.rand(2000, device=CUDA, dtype=dtype), num_samples)
    assert_cuda(chosen, torch.int64, [min(num_samples, 2000)])
    assert reads == []


def test_instance_balanced_sampling_reads_the_number_of_instances(reads):
    """Nothing else: the share of each follows from how many there are."""
    chosen = sample_instance_balanced(torch.zeros(2000, device=CUDA, dtype=torch.long), 512)
    assert_cuda(chosen, torch.int64, [512])
    assert reads == ["_unique2.default"]


class Balanced(BalancedSamplingMixin, ROIHeads):
    pass


@pytest.mark.parametrize("positive_sampler", [sample_random, sample_instance_balanced])
@pytest.mark.parametrize("negative_sampler", [sample_random, IoUBalancedSampler()])
@pytest.mark.parametrize("num_targets", [0, 3])
def test_sampling_in_the_heads(reads, num_targets, negative_sampler, positive_sampler):
    def sample(cls, iteration, **arguments):
        heads = cls(
            num_classes=4,
            batch_size_per_image=64,
            positive_fraction=0.25,
            proposal_matcher=Matcher([0.5], [0, 1]),
            **arguments,
        )
        proposals, targets = Instances((99, 99)), Instances((99, 99))
        proposals.proposal_boxes = Boxes(torch.rand(400, 4, device=CUDA))
        proposals.objectness_logits = torch.zeros(400, device=CUDA)
        targets.gt_boxes = Boxes(torch.rand(num_targets, 4, device=CUDA))
        targets.gt_classes = torch.zeros(num_targets, device=CUDA, dtype=torch.long)
        reads.clear()
        with EventStorage(iteration):
            return heads.label_and_sample_proposals([proposals] * 2, [targets] * 2)

    samplers = {"negative_sampler": negative_sampler, "positive_sampler": positive_sampler}
    for image in sample(Balanced, iteration=0, **samplers):
        assert_cuda(image.proposal_boxes.tensor, torch.float32, [64, 4])
        assert_cuda(image.gt_classes, torch.int64, [64])
        assert image.has("gt_boxes") == (num_targets > 0)
    ours = list(reads)
    sample(ROIHeads, iteration=0)
    assert len(ours) <= len(reads)
    sample(Balanced, iteration=19, **samplers)  # which is logged: two numbers for each bin
    assert reads[: len(ours)] == ours and len(reads) == len(ours) + 6


# Features


LEVELS = [(2, 16, size, size + 4) for size in (64, 32, 16, 8, 4)]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("refine_type", REFINEMENTS.names())
def test_balancer(reads, refine_type, dtype, grad):
    balancer = on_cuda(FeatureBalancer, 16, refine_type=refine_type)
    for given in {torch.float32, dtype or torch.float32}:  # the levels keep theirs
        features = [torch.randn(shape, device=CUDA, dtype=given) for shape in LEVELS]
        with autocast(dtype), torch.set_grad_enabled(grad):
            balanced = balancer(features)
        for feature, shape in zip(balanced, LEVELS, strict=True):
            assert_cuda(feature, given, shape)
    assert reads == []


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("pool_keys", [True, False])
def test_non_local(reads, pool_keys, dtype):
    block = on_cuda(NonLocal2d, 16, pool_keys)
    seen = []
    block.conv_out.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    with autocast(dtype):
        result = block(torch.randn(LEVELS[2], device=CUDA))
    assert_cuda(result, torch.float32, LEVELS[2])  # the residual's
    assert seen == [dtype or torch.float32] and reads == []


def build_fpn(refine_type="non_local"):
    bottom_up = build_resnet_backbone(
        load_config("configs/Base-RCNN-FPN.yaml", R_18), ShapeSpec(channels=3)
    )
    levels = ["res2", "res3", "res4", "res5"]
    return BalancedFPN(bottom_up, levels, 16, refine_type=refine_type)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_balanced_fpn(reads, dtype, grad):
    fpn = on_cuda(build_fpn)
    with autocast(dtype), torch.set_grad_enabled(grad):
        features = fpn(torch.randn(2, 3, 64, 96, device=CUDA))
    for feature, stride in zip(features.values(), (4, 8, 16, 32), strict=True):
        assert_cuda(feature, dtype or torch.float32, [2, 16, 64 // stride, 96 // stride])
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refine_type", REFINEMENTS.names())
def test_backward_of_the_features(refine_type, dtype):
    with torch.device("meta"):
        fpn = build_fpn(refine_type).to(dtype)
        image = torch.randn(2, 3, 64, 96, dtype=dtype)
    sum(feature.sum() for feature in fpn(image).values()).backward()
    for parameter in fpn.parameters():
        assert parameter.grad.is_meta and parameter.grad.dtype == dtype


# Losses


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_balanced_l1(reads, reduction, rows, dtype):
    """Computed in float32 under autocast."""
    deltas = torch.randn(rows, 4, device=CUDA, dtype=dtype)
    with autocast(dtype):
        loss = balanced_l1_loss(deltas, torch.zeros_like(deltas), reduction=reduction)
        assert_cuda(loss, torch.float32, [rows, 4] if reduction == "none" else [])
        assert_cuda(BalancedL1()(deltas, torch.zeros_like(deltas)), torch.float32, [rows, 4])
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_of_balanced_l1(dtype):
    deltas = torch.randn(9, 4, device="meta", dtype=dtype, requires_grad=True)
    balanced_l1_loss(deltas, torch.zeros_like(deltas), reduction="sum").backward()
    assert deltas.grad.is_meta and deltas.grad.dtype == dtype


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("agnostic", [True, False])
def test_box_reg_loss(reads, agnostic, dtype):
    def loss(cls, **arguments):
        predictor = on_cuda(
            cls,
            ShapeSpec(channels=8, height=1, width=1),
            box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
            num_classes=3,
            cls_agnostic_bbox_reg=agnostic,
            **arguments,
        )
        boxes, deltas = torch.rand(30, 4, device=CUDA), 4 if agnostic else 12
        reads.clear()
        with autocast(dtype):
            return predictor.box_reg_loss(
                boxes,
                boxes,
                torch.randn(30, deltas, device=CUDA, dtype=dtype),
                torch.zeros(30, device=CUDA, dtype=torch.long),
            )

    assert_cuda(loss(BalancedFastRCNNOutputLayers, box_reg_loss=BalancedL1()), torch.float32, [])
    ours = list(reads)
    loss(FastRCNNOutputLayers)
    assert ours == reads  # which boxes are foreground, and a check of Detectron2's


# Whole models


DETECTRON2S = {
    "build_balanced_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_balanced_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    "BalancedROIHeads": "StandardROIHeads",
    "BalancedCascadeROIHeads": "CascadeROIHeads",
    "BalancedRetinaNet": "RetinaNet",
    "balanced_l1": "smooth_l1",
}


def convert_boxes_to_pooler_format(box_lists):
    """As Detectron2's, which makes a tensor of their numbers, and reads it."""
    numbered = [
        torch.cat([torch.full((len(boxes), 1), float(i), device=CUDA), boxes.tensor], dim=1)
        for i, boxes in enumerate(box_lists)
    ]
    return torch.cat(numbered)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_of_every_architecture(reads, name, monkeypatch):
    """The host reads no more than with Detectron2's own classes."""
    monkeypatch.setattr(poolers, "convert_boxes_to_pooler_format", convert_boxes_to_pooler_format)
    # PyTorch would compile the script for the GPU.
    monkeypatch.setattr(retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)
    monkeypatch.setattr(
        ImageList,
        "from_tensors",
        lambda images, *args, **kwargs: ImageList(torch.stack(images), [(64, 96)] * len(images)),
    )
    file, opts, *_ = ARCHITECTURES[name]

    def build(names):
        cfg = load_config(f"configs/{file}", [*TINY_MODEL, *R_18, *opts, "MODEL.DEVICE", "cuda"])
        for node, key in (
            (cfg.MODEL, "META_ARCHITECTURE"),
            (cfg.MODEL.BACKBONE, "NAME"),
            (cfg.MODEL.ROI_HEADS, "NAME"),
            (cfg.MODEL.ROI_BOX_HEAD, "BBOX_REG_LOSS_TYPE"),
            (cfg.MODEL.RETINANET, "BBOX_REG_LOSS_TYPE"),
        ):
            node[key] = names.get(node[key], node[key])
        return on_cuda(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), cfg).train()

    def losses(model, dtype):
        instances = Instances((64, 96))
        instances.gt_boxes = Boxes(torch.rand(3, 4, device=CUDA))
        instances.gt_classes = torch.zeros(3, device=CUDA, dtype=torch.long)
        if "Mask" in name:
            instances.gt_masks = BitMasks(torch.ones(3, 64, 96, device=CUDA, dtype=torch.bool))
        if "Keypoint" in name:
            instances.gt_keypoints = Keypoints(torch.rand(3, 2, 3, device=CUDA))
        image = torch.zeros(3, 64, 96, dtype=torch.uint8)
        reads.clear()
        with EventStorage(), autocast(dtype):
            return model([{"image": image, "instances": instances}] * 2)

    expected = losses(build(DETECTRON2S), dtype=None)
    detectron2s = list(reads)
    model = build({})
    for dtype in PRECISIONS:
        balanced = losses(model, dtype)
        assert balanced.keys() == expected.keys()
        for loss in balanced.values():
            assert_cuda(loss, torch.float32, [])
        # RetinaNet's box loss is computed twice, since Detectron2's is part of one function: which
        # anchors are foreground, and the check of their deltas, are read once more.
        assert len(reads) <= len(detectron2s) + 2 * (name == "RetinaNet")
