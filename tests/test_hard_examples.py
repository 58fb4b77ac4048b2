"""OHEM: the sampler, the losses that heads give it, and what they leave alone."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from balanced_d2 import load_config
from balanced_d2.config.checks import check_config
from balanced_d2.modeling import (
    BalancedFastRCNNOutputLayers,
    BalancedL1,
    BalancedSamplingMixin,
    FocalLoss,
    HardExampleSampler,
    SeesawLoss,
    sample_instance_balanced,
)
from balanced_d2.utils.errors import UserError

from .conftest import TINY_CONFIG
from .test_roi_heads import ground_truth, iou_loops, shifted_proposals

OHEM = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "ohem"]


def boxes(number, seed=0, size=60.0):
    generator = torch.Generator().manual_seed(seed)
    corner = 100 * torch.rand(number, 2, generator=generator)
    return torch.cat(
        [corner, corner + size * (0.5 + torch.rand(number, 2, generator=generator))], 1
    )


def suppressed_loops(losses, all_boxes, number, threshold):
    """From the hardest on, each that overlaps no harder one too much."""
    kept = []
    for index in sorted(range(len(losses)), key=lambda i: -losses[i]):
        ious = [iou_loops(all_boxes[index], [all_boxes[other]])[0] for other in kept]
        if not any(iou > threshold for iou in ious):
            kept.append(index)
    return kept[:number]


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("number", [0, 1, 20, 500])
def test_sampler(threshold, number):
    torch.manual_seed(4)
    losses, where = torch.rand(120), boxes(120)
    got = HardExampleSampler(threshold)(losses, where, number).tolist()
    assert got == suppressed_loops(losses.tolist(), where.tolist(), number, threshold)
    none = HardExampleSampler(threshold)(torch.zeros(0), torch.zeros(0, 4), 5)
    assert len(none) == 0


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1])
def test_wrong_thresholds(threshold):
    with pytest.raises(UserError, match="OHEM_NMS_THRESH"):
        HardExampleSampler(threshold)


# Losses of single proposals


def labelled(classes, seed=0):
    proposals = Instances((200, 200))
    proposals.proposal_boxes = Boxes(boxes(len(classes), seed))
    proposals.gt_boxes = Boxes(boxes(len(classes), seed) + torch.randn(len(classes), 4))
    proposals.gt_classes = torch.tensor(classes)
    return proposals


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"smooth_l1_beta": 0.5, "loss_weight": {"loss_box_reg": 3.0, "loss_cls": 0.5}},
        *({"box_reg_loss_type": name} for name in ("giou", "diou", "ciou")),
        {"box_reg_loss": BalancedL1()},
        {"cls_loss": FocalLoss(3)},
        {"cls_loss": SeesawLoss(3), "loss_weight": 2.0},
    ],
    ids=["plain", "smooth L1", "giou", "diou", "ciou", "Balanced L1", "focal", "Seesaw"],
)
def test_losses_of_single_proposals(arguments, class_agnostic):
    """As the head's own losses of each proposal by itself."""
    torch.manual_seed(5)
    predictor = BalancedFastRCNNOutputLayers(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=3,
        cls_agnostic_bbox_reg=class_agnostic,
        **copy.deepcopy(arguments),
    )
    images = [labelled([0, 3, 2], seed=1), labelled([3, 1], seed=2)]
    scores = torch.randn(5, predictor.cls_score.out_features)
    deltas = torch.randn(5, 4 if class_agnostic else 12)
    got = predictor.proposal_losses((scores, deltas), images)
    assert not got.requires_grad
    expected = []
    for index, (image, row) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        alone = copy.deepcopy(predictor)  # of which Seesaw loss counts the one proposal
        if isinstance(alone.classification_loss, SeesawLoss):
            alone.classification_loss.p = 0.0
        with EventStorage():
            losses = alone.losses((scores[[index]], deltas[[index]]), [images[image][[row]]])
        expected.append(sum(losses.values()).item())
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)


# In the heads


def small_heads(*options, cls="BalancedROIHeads"):
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", "4", "MODEL.FPN.OUT_CHANNELS", "8", *options]
    options += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "24"]
    options += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]
    if cls == "BalancedCascadeROIHeads":
        options += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    cfg = load_config(TINY_CONFIG, options)
    shapes = {f"p{k}": ShapeSpec(channels=8, stride=2**k) for k in range(2, 7)}
    torch.manual_seed(6)
    heads = ROI_HEADS_REGISTRY.get(cls)(cfg, shapes)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


FEATURES = {
    f"p{k}": torch.randn(2, 8, 256 // 2**k, 256 // 2**k, generator=torch.Generator().manual_seed(k))
    for k in range(2, 7)
}


def run(heads):
    seen = []
    sample = heads.label_and_sample_proposals

    def watched(proposals, targets):
        seen.append((proposals, sample(proposals, targets)))
        return seen[-1][1]

    heads.label_and_sample_proposals = watched
    no_objects = Instances((200, 200), gt_boxes=Boxes(torch.zeros(0, 4)))
    no_objects.gt_classes = torch.zeros(0, dtype=torch.long)
    proposals = [shifted_proposals(60), shifted_proposals(30)]
    before, random_state = copy.deepcopy(proposals), torch.random.get_rng_state()
    with EventStorage() as storage:
        _, losses = heads.train()(None, FEATURES, proposals, [ground_truth(), no_objects])
        logged = {name: value for name, (value, _) in storage.latest().items()}
    if heads.needs_losses:  # nothing is drawn
        assert torch.equal(torch.random.get_rng_state(), random_state)
    for after, was in zip(proposals, before):  # what the RPN has given stays as it was
        assert after.get_fields().keys() == was.get_fields().keys()
    return seen[-1], losses, logged


@pytest.mark.parametrize("cls", ["BalancedROIHeads", "BalancedCascadeROIHeads"])
@pytest.mark.parametrize("append", ["True", "False"])
def test_the_hardest_are_trained_on(cls, append):
    heads = small_heads(*OHEM, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", append, cls=cls)
    (candidates, sampled), losses, logged = run(heads)
    assert all(torch.isfinite(value) for value in losses.values())
    gt = ground_truth()
    for image, (all_of, chosen) in enumerate(zip(candidates, sampled)):
        assert len(all_of) == (60, 30)[image] + (2 if append == "True" and image == 0 else 0)
        # The losses again, of each labelled by plain loops.
        labels = []
        again = Instances(all_of.image_size, proposal_boxes=all_of.proposal_boxes)
        gt_boxes = all_of.proposal_boxes.tensor.clone()
        for row, box in enumerate(all_of.proposal_boxes.tensor.tolist()):
            iou, index = iou_loops(box, gt.gt_boxes.tensor.tolist()) if image == 0 else (0, -1)
            labels.append(gt.gt_classes[index].item() if iou >= 0.5 else 4)
            if iou >= 0.5:
                gt_boxes[row] = gt.gt_boxes.tensor[index]
        again.gt_classes, again.gt_boxes = torch.tensor(labels), Boxes(gt_boxes)
        stage = (lambda part: part[0]) if "Cascade" in cls else (lambda part: part)
        pooled = heads.box_pooler(
            [FEATURES[name][[image]] for name in heads.box_in_features], [again.proposal_boxes]
        )
        predictor = stage(heads.box_predictor)
        with EventStorage():
            predictions = predictor(stage(heads.box_head)(pooled))
        expected = predictor.proposal_losses(predictions, [again])
        torch.testing.assert_close(all_of.losses, expected, rtol=1e-3, atol=1e-4)
        hardest = suppressed_loops(
            all_of.losses.tolist(), all_of.proposal_boxes.tensor.tolist(), 24, 0.7
        )
        assert sorted(map(tuple, chosen.proposal_boxes.tensor.tolist())) == sorted(
            map(tuple, all_of.proposal_boxes.tensor[hardest].tolist())
        )
        assert not chosen.has("losses")
        assert sorted(chosen.gt_classes.tolist()) == sorted(labels[i] for i in hardest)
        # Foreground first, as elsewhere.
        is_background = (chosen.gt_classes == 4).int()
        assert (is_background.diff() >= 0).all()
    number = sum(int((image.gt_classes < 4).sum()) for image in sampled)
    assert logged["roi_head/num_fg_samples"] == number / 2


def test_statistics_and_counts_of_the_head_do_not_change():
    """Normalisation in the box head sees the candidates, but learns nothing of them, and Seesaw
    loss counts those that are trained on alone."""
    heads = small_heads(
        *(*OHEM, "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", "seesaw", "MODEL.ROI_BOX_HEAD.NORM", "BN"),
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "8"),
    )
    (_, sampled), losses, _ = run(heads)
    (norm,) = (m for m in heads.box_head.modules() if hasattr(m, "num_batches_tracked"))
    assert norm.num_batches_tracked == 1 and norm.training
    counts = heads.box_predictor.classification_loss.counts
    assert counts.sum() == sum(len(image) for image in sampled)
    assert losses["loss_cls"].requires_grad


@pytest.mark.parametrize("key", ["NEGATIVE_SAMPLER", "POSITIVE_SAMPLER"])
def test_other_samplers_have_no_second_pass(key, monkeypatch):
    name = "iou_balanced" if key == "NEGATIVE_SAMPLER" else "instance_balanced"
    heads = small_heads(f"MODEL.ROI_HEADS.{key}", name)
    assert not heads.needs_losses
    monkeypatch.setattr(heads, "candidate_losses", None)
    run(heads)


# What is refused


def test_with_a_sampler_of_positives():
    options = [*OHEM, "MODEL.ROI_HEADS.POSITIVE_SAMPLER", "instance_balanced"]
    with pytest.raises(UserError, match="POSITIVE_SAMPLER to random"):
        check_config(load_config(TINY_CONFIG, options), train=True)
    with pytest.raises(UserError, match="POSITIVE_SAMPLER to random"):
        small_heads(*options)


def test_heads_that_offer_no_losses():
    class Heads(BalancedSamplingMixin, ROIHeads):
        pass

    arguments = {
        "num_classes": 4,
        "batch_size_per_image": 8,
        "positive_fraction": 0.25,
        "proposal_matcher": small_heads().proposal_matcher,
        "negative_sampler": HardExampleSampler(),
    }
    with pytest.raises(UserError, match="Heads does not offer the losses.*BalancedROIHeads"):
        Heads(**arguments)
    with pytest.raises(UserError, match="positives and negatives together"):
        Heads(**arguments, positive_sampler=sample_instance_balanced)
