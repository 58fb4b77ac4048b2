"""BalancedROIHeads: sampling of proposals, logged counts, box loss, equality with Detectron2."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from balanced_d2 import load_config
from balanced_d2.modeling import (
    BalancedFastRCNNOutputLayers,
    BalancedL1,
    BalancedSamplingMixin,
    IoUBalancedSampler,
    sample_instance_balanced,
    sample_random,
)
from balanced_d2.modeling.balanced_sampling import negative_iou_range
from balanced_d2.utils.errors import UserError


class SamplingOnly(BalancedSamplingMixin, ROIHeads):
    """Only the sampling of proposals, which works from explicit arguments."""


def heads(cls=SamplingOnly, thresholds=(0.5,), labels=(0, 1), **arguments):
    arguments = {"batch_size_per_image": 60, "proposal_append_gt": True, **arguments}
    matcher = Matcher(list(thresholds), list(labels), allow_low_quality_matches=False)
    if issubclass(cls, BalancedSamplingMixin):
        iou_range = negative_iou_range(matcher)
        balanced = IoUBalancedSampler(max(1, arguments.get("num_bins", 3)), iou_range)
        arguments.setdefault("negative_sampler", balanced)
    return cls(num_classes=4, positive_fraction=0.25, proposal_matcher=matcher, **arguments)


def instances(**fields):
    result = Instances((200, 200))
    for name, value in fields.items():
        result.set(name, Boxes(value) if value.ndim == 2 else value)
    return result


def ground_truth():
    boxes = torch.tensor([[10.0, 10, 60, 60], [100.0, 100, 180, 160]])
    return instances(gt_boxes=boxes, gt_classes=torch.tensor([2, 0]))


def shifted_proposals(num=400):
    """Boxes of the first object's size, shifted by up to its width, so that every IoU occurs."""
    shift = torch.rand(num, 1) * 55
    boxes = torch.tensor([[10.0, 10, 60, 60]]) + torch.cat([shift, shift * 0] * 2, dim=1)
    return instances(proposal_boxes=boxes, objectness_logits=torch.zeros(num))


def iou_loops(box, others):
    best, best_index = 0.0, 0
    for index, other in enumerate(others):
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        overlap = max(width, 0) * max(height, 0)
        area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
        if overlap / (area - overlap) > best:
            best, best_index = overlap / (area - overlap), index
    return best, best_index


def sample(roi_heads, proposals, targets):
    with EventStorage() as storage:
        sampled = roi_heads.label_and_sample_proposals(proposals, targets)
        return sampled, {name: value for name, (value, _) in storage.latest().items()}


def test_samples_are_balanced_labelled_and_counted():
    targets, proposals = ground_truth(), shifted_proposals()
    (sampled,), logged = sample(heads(num_bins=3), [proposals], [targets])

    gt = targets.gt_boxes.tensor.tolist()
    counts, num_fg = [0, 0, 0], 0
    for box, label, gt_box in zip(
        sampled.proposal_boxes.tensor.tolist(),
        sampled.gt_classes.tolist(),
        sampled.gt_boxes.tensor.tolist(),
    ):
        iou, index = iou_loops(box, gt)
        if iou >= 0.5:
            num_fg += 1
            assert label == targets.gt_classes[index] and gt_box == gt[index]
        else:
            counts[int(iou * 6)] += 1
            assert label == 4
    assert num_fg == 15 and counts == [15, 15, 15]

    available = [0, 0, 0]
    for box in proposals.proposal_boxes.tensor.tolist():
        iou, _ = iou_loops(box, gt)
        if iou < 0.5:
            available[int(iou * 6)] += 1
    assert logged["roi_head/num_fg_samples"] == 15
    assert logged["roi_head/num_bg_samples"] == 45
    assert [logged[f"roi_head/num_neg_bin{k}"] for k in range(3)] == counts
    assert [logged[f"roi_head/num_neg_bin{k}_available"] for k in range(3)] == available


def test_logged_counts_are_means_over_images():
    proposals, empty = (
        shifted_proposals(),
        instances(
            proposal_boxes=torch.tensor([[0.0, 0, 5, 5]] * 30), objectness_logits=torch.zeros(30)
        ),
    )
    no_objects = instances(gt_boxes=torch.zeros(0, 4), gt_classes=torch.zeros(0).long())
    _, logged = sample(heads(), [proposals, empty], [ground_truth(), no_objects])
    assert logged["roi_head/num_neg_bin0"] == (15 + 30) / 2
    assert logged["roi_head/num_neg_bin1"] == 15 / 2
    assert logged["roi_head/num_bg_samples"] == (45 + 30) / 2


@pytest.mark.parametrize("negative_sampler", [sample_random, IoUBalancedSampler()])
@pytest.mark.parametrize("positive_sampler", [sample_random, sample_instance_balanced])
@pytest.mark.parametrize("labels", [(0, 1), (-1, 0, 1)])
def test_degenerate_images(negative_sampler, positive_sampler, labels):
    """No objects, no proposals, neither, or only positives: all available are sampled, no error."""
    thresholds = (0.5,) if len(labels) == 2 else (0.1, 0.5)
    roi_heads = heads(
        thresholds=thresholds,
        labels=labels,
        negative_sampler=negative_sampler,
        positive_sampler=positive_sampler,
    )
    none = instances(gt_boxes=torch.zeros(0, 4), gt_classes=torch.zeros(0).long())
    no_proposals = instances(proposal_boxes=torch.zeros(0, 4), objectness_logits=torch.zeros(0))
    on_object = instances(
        proposal_boxes=torch.tensor([[10.0, 10, 60, 60]] * 40), objectness_logits=torch.zeros(40)
    )
    sampled, _ = sample(
        roi_heads,
        [shifted_proposals(50), no_proposals, no_proposals, on_object],
        [none, ground_truth(), none, ground_truth()],
    )
    assert [len(x) for x in sampled] == [50, 2, 0, 15]
    assert (sampled[0].gt_classes == 4).all() and not sampled[0].has("gt_boxes")
    assert sampled[1].gt_classes.tolist() in ([2, 0], [0, 2])


def test_ignored_proposals_are_not_sampled():
    roi_heads = heads(
        thresholds=(0.3, 0.7),
        labels=(0, -1, 1),
        proposal_append_gt=False,
        negative_sampler=sample_random,  # ignores the IoU
    )
    targets = ground_truth()
    (sampled,), _ = sample(roi_heads, [shifted_proposals()], [targets])
    for box in sampled.proposal_boxes.tensor.tolist():
        iou, _ = iou_loops(box, targets.gt_boxes.tensor.tolist())
        assert not 0.3 <= iou < 0.7


def test_instance_balanced_positives():
    targets = ground_truth()
    boxes = torch.cat(
        [targets.gt_boxes.tensor[:1].repeat(90, 1), targets.gt_boxes.tensor[1:].repeat(10, 1)]
    )
    proposals = instances(proposal_boxes=boxes, objectness_logits=torch.zeros(100))
    roi_heads = heads(
        positive_sampler=sample_instance_balanced, proposal_append_gt=False, batch_size_per_image=64
    )
    (sampled,), _ = sample(roi_heads, [proposals], [targets])
    assert sorted(sampled.gt_classes.tolist()) == [0] * 8 + [2] * 8


@pytest.mark.parametrize(
    "thresholds, labels, expected",
    [
        ((0.5,), (0, 1), (0.0, 0.5)),
        ((0.3, 0.7), (0, -1, 1), (0.0, 0.3)),
        ((0.1, 0.5), (-1, 0, 1), (0.1, 0.5)),
    ],
)
def test_bins_span_what_the_matcher_calls_negative(thresholds, labels, expected):
    assert negative_iou_range(Matcher(list(thresholds), list(labels))) == expected


@pytest.mark.parametrize("fields", [{}, {"gt_extra": torch.tensor([5, 6])}])
def test_random_samplers_draw_as_detectron2(fields):
    targets = ground_truth()
    for name, value in fields.items():
        targets.set(name, value)
    results = []
    for roi_heads in (heads(ROIHeads), heads(negative_sampler=sample_random)):
        torch.manual_seed(3)
        proposals = [shifted_proposals(), shifted_proposals(20)]
        results.append(sample(roi_heads, proposals, [targets, targets]))
    (theirs, their_log), (ours, our_log) = results
    for a, b in zip(theirs, ours):
        assert a.get_fields().keys() == b.get_fields().keys()
        for name, value in a.get_fields().items():
            other = b.get(name)
            if isinstance(value, Boxes):
                value, other = value.tensor, other.tensor
            assert torch.equal(value, other), name
    assert their_log.items() <= our_log.items()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"negative_sampler": "iou_balanced"}, "'iou_balanced' is no sampler.*IoUBalancedSampler"),
        ({"positive_sampler": "class_balanced"}, "'class_balanced' is no sampler"),
        ({"num_bins": 0}, "NUM_BINS"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        heads(**arguments)


# Box loss


def predictor(cls=BalancedFastRCNNOutputLayers, **arguments):
    return cls(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=3,
        **arguments,
    )


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_box_loss_equals_plain_loops(class_agnostic):
    alpha, gamma, beta = 0.4, 1.2, 0.8
    layers = predictor(
        box_reg_loss=BalancedL1(alpha, gamma, beta),
        cls_agnostic_bbox_reg=class_agnostic,
    )
    classes = torch.tensor([0, 3, 2, -1, 1, 3, 3])
    start = torch.rand(7, 2) * 50
    proposals = torch.cat([start, start + 10 + torch.rand(7, 2) * 40], dim=1)
    gt = proposals + torch.randn(7, 4)
    deltas = torch.randn(7, 4 if class_agnostic else 12)

    loss = layers.box_reg_loss(proposals, gt, deltas, classes)

    b, total = math.exp(gamma / alpha) - 1, 0.0
    for row, label in enumerate(classes.tolist()):
        if label not in (0, 1, 2):
            continue
        (px0, py0, px1, py1), (gx0, gy0, gx1, gy1) = proposals[row].tolist(), gt[row].tolist()
        pw, ph, gw, gh = px1 - px0, py1 - py0, gx1 - gx0, gy1 - gy0
        target = [
            10 * ((gx0 + gx1) / 2 - (px0 + px1) / 2) / pw,
            10 * ((gy0 + gy1) / 2 - (py0 + py1) / 2) / ph,
            5 * math.log(gw / pw),
            5 * math.log(gh / ph),
        ]
        first = 0 if class_agnostic else 4 * label
        for predicted, wanted in zip(deltas[row, first : first + 4].tolist(), target):
            x = abs(predicted - wanted)
            if x < beta:
                total += alpha / b * (b * x + beta) * math.log(b * x / beta + 1) - alpha * x
            else:
                total += gamma * x + gamma * beta / b - alpha * beta
    assert loss.item() == pytest.approx(total / 7, rel=1e-4)


@pytest.mark.parametrize("num_proposals", [0, 5])
def test_box_loss_without_foreground(num_proposals):
    deltas = torch.randn(num_proposals, 12, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 10, 10]] * num_proposals).reshape(-1, 4)
    background = torch.full((num_proposals,), 3)
    layers = predictor(box_reg_loss=BalancedL1())
    loss = layers.box_reg_loss(boxes, boxes, deltas, background)
    loss.backward()
    assert loss.item() == 0 and not deltas.grad.any()


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou"])
def test_other_box_losses_are_detectron2s(loss_type):
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30]])
    arguments = (boxes, boxes + 1, torch.randn(2, 12), torch.tensor([1, 0]))
    losses = [
        predictor(cls, box_reg_loss_type=loss_type).box_reg_loss(*arguments)
        for cls in (FastRCNNOutputLayers, BalancedFastRCNNOutputLayers)
    ]
    assert losses[0] == losses[1]


def test_built_from_config():
    cfg = load_config(
        "configs/BCCD/balanced_faster_rcnn_R_18_FPN.yaml",
        ["MODEL.ROI_HEADS.NUM_BINS", "5", "MODEL.ROI_BOX_HEAD.BALANCED_L1_GAMMA", "1.0"],
    )
    shapes = {f"p{k}": ShapeSpec(channels=64, stride=2**k) for k in range(2, 7)}
    roi_heads = ROI_HEADS_REGISTRY.get("BalancedROIHeads")(cfg, shapes)
    assert roi_heads.num_bins == 5 and roi_heads.iou_range == (0.0, 0.5)
    loss = roi_heads.box_predictor.regression_loss
    assert (loss.alpha, loss.gamma, loss.beta) == (0.5, 1.0, 1.0)
