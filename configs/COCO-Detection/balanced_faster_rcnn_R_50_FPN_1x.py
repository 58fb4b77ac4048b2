# The same as balanced_faster_rcnn_R_50_FPN_1x.yaml.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from balanced_d2.modeling import (
    BalancedFastRCNNOutputLayers,
    BalancedFPN,
    BalancedL1,
    BalancedROIHeads,
    IoUBalancedSampler,
)

from ..common.coco import dataloader
from ..common.resnet import bottom_up, pixels
from ..common.train import lr_multiplier, optimizer, train

dataloader["train"].num_classes = "${model.roi_heads.num_classes}"
bottom_up.out_features = ["res2", "res3", "res4", "res5"]

model = L(GeneralizedRCNN)(
    backbone=L(BalancedFPN)(
        bottom_up=bottom_up,
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
        refine_level=2,
        refine_type="non_local",
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=[2000, 1000],
        post_nms_topk=[1000, 1000],
        nms_thresh=0.7,
    ),
    roi_heads=L(BalancedROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        negative_sampler=L(IoUBalancedSampler)(num_bins=3, iou_range=[0.0, 0.5]),
        num_bins="${.negative_sampler.num_bins}",
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=L(BalancedFastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=[10, 10, 5, 5]),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
            box_reg_loss=L(BalancedL1)(alpha=0.5, gamma=1.5, beta=1.0),
        ),
    ),
    **pixels,
)
