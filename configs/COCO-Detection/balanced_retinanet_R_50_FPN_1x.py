# The same as balanced_retinanet_R_50_FPN_1x.yaml.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from balanced_d2.modeling import P6P7, BalancedFPN, BalancedL1, BalancedRetinaNet

from ..common.coco import dataloader
from ..common.resnet import bottom_up, pixels
from ..common.train import lr_multiplier, optimizer, train

optimizer.lr = 0.01
dataloader["train"].num_classes = "${model.num_classes}"
bottom_up.out_features = ["res3", "res4", "res5"]

model = L(BalancedRetinaNet)(
    backbone=L(BalancedFPN)(
        bottom_up=bottom_up,
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(P6P7)(in_channels=2048, out_channels="${..out_channels}"),
        refine_level=1,
        refine_type="non_local",
    ),
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=256)] * 5,
        num_classes="${..num_classes}",
        num_anchors=9,
        conv_dims=[256, 256, 256, 256],
        prior_prob=0.01,
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=80,
    box_reg_loss=L(BalancedL1)(alpha=0.5, gamma=1.5, beta=0.11),
    **pixels,
)
