"""The operators of the pure-Python Detectron2: against plain loops in float64, finite differences
and torchvision; and models that are built on them."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from detectron2.layers import (
    DeformConv,
    ModulatedDeformConv,
    ROIAlignRotated,
    batched_nms_rotated,
    nms_rotated,
)
from detectron2.layers import rotated_boxes as rotated_boxes_module
from detectron2.layers.rotated_boxes import pairwise_iou_rotated
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, nms, roi_align

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("detectron2._C") is not None,
    reason="this Detectron2 has its compiled operators, which do less on the CPU",
)


def random_boxes(number, generator=None, size=100.0):
    uniform = torch.rand(number, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([size, size, size / 2, size / 2, 720.0], dtype=torch.float64)
    shift = torch.tensor([0, 0, 1, 1, -360.0], dtype=torch.float64)
    return uniform * scale + shift


# --- IoU ---------------------------------------------------------------------------------------


def corners(box):
    """The corners of a box, by the definition of Detectron2's angle (counter-clockwise, y down)."""
    x, y, width, height, angle = map(float, box)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    signs = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    return [
        np.array([x + cos * u + sin * v, y - sin * u + cos * v])
        for u, v in ((a * width / 2, b * height / 2) for a, b in signs)
    ]


def clipped(polygon, start, end, inner):
    """The part of a polygon on the side of a line on which ``inner`` lies."""
    normal = np.array([end[1] - start[1], start[0] - end[0]])
    normal = normal * (1 if normal @ (inner - start) > 0 else -1)
    result = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1]):
        a, b = normal @ (p - start), normal @ (q - start)
        if a >= 0:
            result.append(p)
        if (a < 0) != (b < 0):
            result.append(p + (q - p) * a / (a - b))
    return result


def area(polygon):
    return (
        abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, polygon[1:] + polygon[:1]))) / 2
    )


def reference_iou(box1, box2):
    polygon, other = corners(box1), corners(box2)
    inner = np.array([float(box2[0]), float(box2[1])])
    for start, end in zip(other, other[1:] + other[:1]):
        polygon = clipped(polygon, start, end, inner)
    shared = area(polygon) if len(polygon) > 2 else 0.0
    return shared / (float(box1[2] * box1[3] + box2[2] * box2[3]) - shared)


def test_iou_of_random_boxes():
    boxes1, boxes2 = random_boxes(40), random_boxes(60)
    expected = torch.tensor([[reference_iou(a, b) for b in boxes2] for a in boxes1])
    assert 0.2 < (expected > 0).float().mean() < 0.9
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 2e-5)):
        ious = pairwise_iou_rotated(boxes1.to(dtype), boxes2.to(dtype))
        assert ious.dtype == torch.float32
        torch.testing.assert_close(ious, expected, atol=tolerance, rtol=0, check_dtype=False)


# Coordinates that coincide: shared corners, edges and centers, which random boxes never have.
coordinate = st.integers(-4, 4).map(float)
side = st.integers(1, 6).map(float)
angle = st.sampled_from([0.0, 30.0, 45.0, 90.0, -90.0, 180.0, 270.0, 450.0])
box = st.tuples(coordinate, coordinate, side, side, angle)


@settings(max_examples=300, deadline=None)
@given(box, box)
def test_iou_where_edges_and_corners_meet(box1, box2):
    expected = reference_iou(box1, box2)
    for a, b in ((box1, box2), (box2, box1)):
        iou = pairwise_iou_rotated(torch.tensor([a]), torch.tensor([b])).item()
        assert abs(iou - expected) < 1e-5


def test_iou_of_upright_boxes_is_that_of_torchvision():
    boxes = random_boxes(50).float()
    boxes[:, 4] = 0
    half = boxes[:, 2:4] / 2
    upright = torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), dim=1)
    torch.testing.assert_close(
        pairwise_iou_rotated(boxes, boxes), box_iou(upright, upright), atol=2e-6, rtol=0
    )


def test_iou_within_a_larger_box_ties():
    """The matcher takes all anchors with the highest IoU: rounding must not choose among them."""
    truth = torch.tensor([[10.0, 12, 4, 2, 0]])
    anchors = torch.tensor(
        [[10 + x, 12 + y, 64, 32, 0] for x in range(-9, 9) for y in range(-9, 9)]
    )
    assert len(pairwise_iou_rotated(truth, anchors.float()).unique()) == 1


def test_iou_of_strange_boxes():
    strange = torch.tensor(
        [
            [0, 0, 0, 10, 20],  # without an area
            [float("nan"), 0, 10, 10, 0],
            [float("inf"), 0, 10, 10, 0],
            [-1e17, 1e18, 1000, 1000, 1612],
            [0, 0, 1e-4, 1e-4, 30],
        ]
    )
    ious = pairwise_iou_rotated(strange, torch.cat((strange, torch.tensor([[0, 0, 5.0, 5, 3]]))))
    assert ious.isfinite().all() and ious.min() >= 0 and ious.max() <= 1
    assert (ious[:3] == 0).all() and ious[3, 3] == pytest.approx(1, abs=1e-5)
    assert ious[4, 4] == pytest.approx(1, abs=1e-5)
    assert pairwise_iou_rotated(strange[:0], strange).shape == (0, 5)
    assert pairwise_iou_rotated(strange, strange[:0]).shape == (5, 0)


def test_iou_in_blocks(monkeypatch):
    boxes1, boxes2 = random_boxes(23), random_boxes(17)
    whole = pairwise_iou_rotated(boxes1, boxes2)
    monkeypatch.setattr(rotated_boxes_module, "_PAIRS_COMPARED", 50)
    monkeypatch.setattr(rotated_boxes_module, "_PAIRS_INTERSECTED", 7)
    assert torch.equal(pairwise_iou_rotated(boxes1, boxes2), whole)


# --- Non-maximum suppression -------------------------------------------------------------------


def reference_nms(boxes, scores, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(reference_iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.9])
def test_nms(threshold):
    boxes, scores = random_boxes(80), torch.rand(80, dtype=torch.float64)
    expected = reference_nms(boxes, scores.tolist(), threshold)
    assert 1 < len(expected) < 81
    assert nms_rotated(boxes, scores, threshold).tolist() == expected


def test_nms_of_a_long_chain():
    """Each box suppresses only the next: every second one is kept, which takes that many steps."""
    boxes = torch.tensor([[10.0 * i, 0, 15, 10, 0] for i in range(60)])
    scores = torch.linspace(1, 0.1, 60)
    assert nms_rotated(boxes, scores, 0.15).tolist() == list(range(0, 60, 2))


def test_nms_of_upright_boxes_is_that_of_torchvision():
    boxes, scores = random_boxes(300).float(), torch.rand(300)
    boxes[:, 4] = 0
    half = boxes[:, 2:4] / 2
    upright = torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), dim=1)
    assert nms_rotated(boxes, scores, 0.3).tolist() == nms(upright, scores, 0.3).tolist()


def test_nms_of_nothing_and_by_class():
    nothing = torch.zeros(0, 5)
    assert nms_rotated(nothing, torch.zeros(0), 0.5).shape == (0,)
    boxes = torch.tensor([[5.0, 5, 4, 2, 30]]).repeat(4, 1)
    kept = batched_nms_rotated(
        boxes, torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([0, 0, 1, 1]), 0.5
    )
    assert kept.tolist() == [1, 2]


# --- RoIAlign ----------------------------------------------------------------------------------


def interpolated(image, y, x):
    """Interpolate one channel at one point; 0 more than one pixel outside."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
    return float(upper * (1 - dy) + lower * dy)


def reference_roi_align(images, roi, size, scale, ratio):
    index, *numbers = map(float, roi)
    x, y, width, height = (value * scale for value in numbers[:4])
    cos, sin = math.cos(math.radians(numbers[4])), math.sin(math.radians(numbers[4]))
    rows, columns = ratio or math.ceil(height / size[0]), ratio or math.ceil(width / size[1])
    output = torch.zeros(images.shape[1], *size, dtype=torch.float64)
    for channel, i, j in np.ndindex(*output.shape):
        total = 0.0
        for a, b in np.ndindex(rows, columns):
            v = ((i + (a + 0.5) / rows) / size[0] - 0.5) * height
            u = ((j + (b + 0.5) / columns) / size[1] - 0.5) * width
            at = (y - 0.5 + v * cos - u * sin, x - 0.5 + v * sin + u * cos)
            total += interpolated(images[int(index), channel], *at)
        output[channel, i, j] = total / max(rows * columns, 1)
    return output


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_roi_align(ratio):
    images = torch.randn(2, 2, 11, 14, dtype=torch.float64)
    rois = torch.cat(
        (torch.tensor([[0.0], [1], [1], [0], [0]]).double(), random_boxes(5, size=50)), 1
    )
    rois[3, 3:5] = 0  # without an area
    rois[4, 1] = 500  # far outside
    size, scale = (3, 2), 0.25
    expected = torch.stack([reference_roi_align(images, roi, size, scale, ratio) for roi in rois])
    assert (expected[4] == 0).all() and (expected[:3] != 0).any()
    output = ROIAlignRotated(size, scale, ratio)(images, rois)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)
    single = ROIAlignRotated(size, scale, ratio)(images.float(), rois.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), atol=1e-4, rtol=0)
    assert ROIAlignRotated(size, scale, ratio)(images.half(), rois.half()).dtype == torch.float16


def test_roi_align_of_upright_boxes_is_that_of_torchvision():
    images, rois = torch.randn(2, 3, 20, 30), torch.zeros(40, 6)
    rois[:, 0] = torch.arange(40) % 2
    rois[:, 1:] = random_boxes(40).float()
    rois[:, 5] = 0
    half = rois[:, 3:5] / 2
    upright = torch.cat((rois[:, :1], rois[:, 1:3] - half, rois[:, 1:3] + half), dim=1)
    for ratio in (0, 2):
        expected = roi_align(images, upright, (7, 5), 0.3, ratio, aligned=True)
        output = ROIAlignRotated((7, 5), 0.3, ratio)(images, rois)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


def test_roi_align_gradient():
    images = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3, 2, 4, 3, 25.0], [1, 2, 2, 9, 2, -70]], dtype=torch.float64)
    for ratio in (0, 2):
        pool = ROIAlignRotated((2, 3), 0.9, ratio)
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool(x, rois), images)


def test_roi_align_without_boxes_has_a_gradient():
    images = torch.randn(1, 2, 5, 6, requires_grad=True)
    output = ROIAlignRotated((2, 3), 1.0, 0)(images, torch.zeros(0, 6))
    assert output.shape == (0, 2, 2, 3)
    output.sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_roi_align_refuses_negative_sizes():
    with pytest.raises((ValueError, RuntimeError), match="negative"):
        ROIAlignRotated((2, 2), 1.0, 2)(
            torch.zeros(1, 1, 4, 4), torch.tensor([[0, 2, 2, -1.0, 1, 0]])
        )


# --- Deformable convolution --------------------------------------------------------------------


def reference_deform_conv(
    image, offset, mask, weight, stride, padding, dilation, groups, offset_groups
):
    """One image in plain loops: each kernel sample is taken at the position given by its offset."""
    out_channels, in_per_group, kernel_height, kernel_width = weight.shape
    _, height, width = image.shape
    out_height, out_width = offset.shape[1:]
    padded = torch.zeros(image.shape[0], height + 2, width + 2, dtype=torch.float64)
    padded[:, 1:-1, 1:-1] = (
        image  # zeros around, one pixel wide, are all that interpolation reaches
    )
    output = torch.zeros(out_channels, out_height, out_width, dtype=torch.float64)
    per_offset_group = image.shape[0] // offset_groups
    for o, i, j, c, a, b in np.ndindex(*output.shape, in_per_group, kernel_height, kernel_width):
        channel = o // (out_channels // groups) * in_per_group + c
        sample = (channel // per_offset_group * kernel_height + a) * kernel_width + b
        y = i * stride - padding + a * dilation + float(offset[2 * sample, i, j])
        x = j * stride - padding + b * dilation + float(offset[2 * sample + 1, i, j])
        if not (-1 < y < height and -1 < x < width):
            continue
        value = interpolated(padded[channel], y + 1, x + 1)
        output[o, i, j] += float(weight.detach()[o, c, a, b]) * value * float(mask[sample, i, j])
    return output


@pytest.mark.parametrize("groups, offset_groups", [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_deform_conv(groups, offset_groups):
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": groups}
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    offset = torch.randn(2, 2 * 9 * offset_groups, 3, 3, dtype=torch.float64) * 2
    mask = torch.rand(2, 9 * offset_groups, 3, 3, dtype=torch.float64)
    for convolution, inputs in (
        (DeformConv, (x, offset)),
        (ModulatedDeformConv, (x, offset, mask)),
    ):
        layer = convolution(4, 6, 3, deformable_groups=offset_groups, **options).double()
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
        masks = mask if len(inputs) == 3 else torch.ones_like(mask)
        expected = [
            reference_deform_conv(*one, layer.weight, 2, 1, 2, groups, offset_groups)
            for one in zip(x, offset, masks)
        ]
        expected = torch.stack(expected)
        if layer.bias is not None:
            expected += layer.bias.detach()[:, None, None]
        torch.testing.assert_close(layer(*inputs).detach(), expected, atol=1e-9, rtol=0)


def test_deform_conv_gradient():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    offset = (torch.randn(1, 18, 4, 4, dtype=torch.float64) * 0.3 + 0.1).requires_grad_()
    mask = torch.rand(1, 9, 4, 4, dtype=torch.float64, requires_grad=True)
    layer = ModulatedDeformConv(2, 2, 3, padding=1).double()
    assert torch.autograd.gradcheck(layer, (x, offset, mask))
    layer(x, offset, mask).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_deform_conv_of_an_empty_batch_and_of_wrong_shapes():
    layer = DeformConv(2, 3, 3, padding=1)
    assert layer(torch.zeros(0, 2, 6, 5), torch.zeros(0, 18, 6, 5)).shape == (0, 3, 6, 5)
    with pytest.raises(RuntimeError, match="offset"):
        layer(torch.zeros(1, 2, 6, 5), torch.zeros(1, 9, 6, 5))
    with pytest.raises(RuntimeError, match="mask"):
        ModulatedDeformConv(2, 3, 3, padding=1)(
            torch.zeros(1, 2, 6, 5), torch.zeros(1, 18, 6, 5), torch.zeros(1, 18, 6, 5)
        )


# --- Models ------------------------------------------------------------------------------------


def zoo_config():
    from detectron2 import model_zoo  # on main, this import needs pkg_resources

    return model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")


def train_and_detect(cfg, boxes):
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    model = build_model(cfg)
    instances = Instances((64, 96), gt_boxes=boxes, gt_classes=torch.tensor([0, 1]))
    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    with EventStorage():
        losses = model([{"image": image, "instances": instances}])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        detected = model.eval()([{"image": image, "height": 64, "width": 96}])[0]["instances"]
    return model, detected


@pytest.mark.parametrize("modulated", [False, True])
def test_training_with_deformable_convolution(modulated):
    cfg = zoo_config()
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = 2
    model, _ = train_and_detect(cfg, Boxes(torch.tensor([[4.0, 4, 40, 40], [50, 10, 90, 60]])))
    offsets = [p.grad for name, p in model.named_parameters() if "conv2_offset.weight" in name]
    assert len(offsets) == 13 and all(grad.abs().sum() > 0 for grad in offsets)


def test_training_with_rotated_boxes():
    cfg = zoo_config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [[-60, 0, 30]]
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1, 1, 1, 1, 1)
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignRotated"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10, 10, 5, 5, 1)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    truth = torch.tensor([[24.0, 24, 40, 20, 30], [70, 30, 30, 40, -50]])
    model, detected = train_and_detect(cfg, RotatedBoxes(truth))
    assert detected.pred_boxes.tensor.shape[1] == 5 and len(detected) > 0
    assert model.roi_heads.box_head.fc1.weight.grad.abs().sum() > 0
