"""RoIAlign by sparse products against plain loops in float64 and against torchvision."""

import math
import os

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import build_model
from detectron2.structures import Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torchvision.ops import roi_align as torchvisions

from balanced_d2 import load_config
from balanced_d2.layers.sparse_roi_align import roi_align
from balanced_d2.modeling.roi_align import SparseROIAlign, use_sparse_roi_align

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL
from .test_architectures import labelled_image

NUM_EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "300"))

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="sparse products need MKL"
)


def loops(features, rois, output_size, spatial_scale, sampling_ratio, aligned):
    """Sample by sample (Mask R-CNN, section 3; bins and samples as torchvision documents them)."""
    _, channels, height, width = features.shape
    offset = 0.5 if aligned else 0.0
    output = torch.zeros(len(rois), channels, *output_size, dtype=torch.float64)
    for k, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * spatial_scale - offset for value in box)
        box_width, box_height = x2 - x1, y2 - y1
        if not aligned:
            box_width, box_height = max(box_width, 1.0), max(box_height, 1.0)
        bin_height, bin_width = box_height / output_size[0], box_width / output_size[1]
        samples_y = sampling_ratio or math.ceil(bin_height)
        samples_x = sampling_ratio or math.ceil(bin_width)
        for i in range(output_size[0]):
            for j in range(output_size[1]):
                for m in range(samples_y):
                    for n in range(samples_x):
                        y = y1 + (i + (m + 0.5) / samples_y) * bin_height
                        x = x1 + (j + (n + 0.5) / samples_x) * bin_width
                        if -1 <= y <= height and -1 <= x <= width:
                            value = bilinear(features[int(image)], y, x)
                            output[k, :, i, j] += value / (samples_y * samples_x)
    return output


def bilinear(image, y, x):
    _, height, width = image.shape
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    return (1 - v) * ((1 - u) * image[:, top, left] + u * image[:, top, right]) + v * (
        (1 - u) * image[:, bottom, left] + u * image[:, bottom, right]
    )


def example(seed, dtype=torch.float64, size=20):
    """Features, boxes and arguments: boxes far outside, empty, of one point and huge."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    shape = number(1, 4), number(1, 5), number(1, size), number(1, size)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    num_boxes = number(0, 12)
    corners = (torch.rand(num_boxes, 2, generator=generator) - 0.3) * 3 * size
    sizes = torch.rand(num_boxes, 2, generator=generator) * size * (5 if seed % 7 == 0 else 1.5)
    sizes[::5] = 0
    images = torch.randint(shape[0], (num_boxes, 1), generator=generator)
    rois = torch.cat([images, corners, corners + sizes], dim=1).to(dtype)
    arguments = {
        "output_size": (number(1, 8), number(1, 8)),
        # A power of two: torchvision rounds others to float32.
        "spatial_scale": 0.5 ** number(0, 4),
        "sampling_ratio": number(0, 4),
        "aligned": seed % 2 == 0,
    }
    return features, rois, arguments


def test_plain_loops():
    for seed in range(NUM_EXAMPLES // 6):
        features, rois, arguments = example(seed, size=8)
        expected = loops(features, rois, **arguments)
        assert torch.allclose(roi_align(features, rois, **arguments), expected, atol=1e-12), seed


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_torchvision_both_ways(dtype, tolerance):
    for seed in range(NUM_EXAMPLES):
        features, rois, arguments = example(seed, dtype)
        features.requires_grad_()
        ours, theirs = (f(features, rois, **arguments) for f in (roi_align, torchvisions))
        gradient = torch.randn_like(theirs)
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert torch.allclose(ours, theirs, atol=tolerance), seed
        gradients = [torch.autograd.grad(y, features, gradient)[0] for y in (ours, theirs)]
        assert torch.allclose(*gradients, atol=20 * tolerance), seed


def test_gradients_by_finite_differences():
    for seed in range(8):
        features, rois, arguments = example(seed, size=6)
        features.requires_grad_()

        def function(x, rois=rois, arguments=arguments):
            return roi_align(x, rois, **arguments).square()

        assert torch.autograd.gradcheck(function, features)
        assert torch.autograd.gradgradcheck(function, features)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_layouts_and_bfloat16(memory_format, autocast):
    features, rois, arguments = example(4, torch.float32)
    expected = roi_align(features, rois, **arguments)
    given = features.to(torch.bfloat16 if autocast else torch.float32)
    given = given.contiguous(memory_format=memory_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = roi_align(given, rois, **arguments)
    assert output.dtype == given.dtype
    output.float().sum().backward()
    assert given.grad.dtype == given.dtype
    # Sums are in float32: the error is that of rounding the features and the result once.
    tolerance = 2 * 2**-8 * features.abs().max() if autocast else 1e-6
    assert torch.allclose(output.float(), expected, atol=float(tolerance))


def test_no_boxes():
    features = torch.rand(2, 3, 5, 6, requires_grad=True)
    output = roi_align(features, torch.zeros(0, 5), (7, 7))
    assert output.shape == (0, 3, 7, 7)
    output.sum().backward()
    assert not features.grad.any()


MODELS = {
    "faster": (TINY_CONFIG, []),
    "masks and keypoints": (
        TINY_CONFIG,
        ["MODEL.MASK_ON", "True", "MODEL.KEYPOINT_ON", "True"],
    ),
    "cascade": (
        TINY_CONFIG,
        [
            *("MODEL.ROI_HEADS.NAME", "BalancedCascadeROIHeads"),
            *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
        ],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_roi_head(name):
    """The same losses, gradients and detections, with every pooler replaced."""
    config, options = MODELS[name]
    options = [*TINY_MODEL, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu"]
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = build_model(load_config(str(ROOT / config), options))
        if sparse:
            use_sparse_roi_align(model)
            assert not any(type(module) is ROIAlign for module in model.modules())
            assert any(isinstance(module, SparseROIAlign) for module in model.modules())
        image = labelled_image()
        if "masks" in name:
            image["instances"] = with_masks_and_keypoints(image["instances"])
        torch.manual_seed(3)
        with EventStorage():
            losses = model.train()([image])
        sum(losses.values()).backward()
        gradient = model.backbone.fpn_output2.weight.grad
        detections = model.eval()([{"image": image["image"]}])[0]["instances"]
        results.append((losses, gradient, detections))
    (plain, plain_gradient, plain_found), (fast, fast_gradient, fast_found) = results
    for key, value in plain.items():
        assert torch.allclose(fast[key], value, rtol=1e-5, atol=1e-6), key
    assert torch.allclose(fast_gradient, plain_gradient, rtol=1e-3, atol=1e-5)
    assert torch.allclose(fast_found.scores, plain_found.scores, atol=1e-5)


def with_masks_and_keypoints(instances):
    boxes = instances.gt_boxes.tensor
    instances.gt_masks = PolygonMasks(
        [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    )
    points = torch.stack([boxes[:, :2].add(4)] * 17, dim=1)
    instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 17, 1), 2.0)], dim=2))
    return instances


def test_a_trace_keeps_torchvisions_operator():
    pooler = SparseROIAlign((7, 7), 0.25, 0)
    features, rois = torch.rand(1, 2, 9, 9), torch.tensor([[0.0, 1, 2, 30, 28]])
    traced = torch.jit.trace(pooler, (features, rois))
    assert "torchvision::roi_align" in str(traced.inlined_graph)
    assert torch.allclose(traced(features, rois), pooler(features, rois), atol=1e-6)
