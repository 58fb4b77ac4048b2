"""The backbone of the model that is kept here: small enough for a repository."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

CHANNELS = 8
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TinyBackbone(Backbone):
    """A convolution with batch normalization for each level."""

    def __init__(self, in_channels: int):
        super().__init__()
        for name, stride in STRIDES.items():
            stage = nn.Sequential(
                nn.Conv2d(
                    in_channels, CHANNELS, 5, stride=4 if stride == 4 else 2, padding=2, bias=False
                ),
                nn.BatchNorm2d(CHANNELS),
                nn.ReLU(),
            )
            self.add_module(name, stage)
            in_channels = CHANNELS

    def forward(self, x):
        features = {}
        for name in STRIDES:
            x = features[name] = self.get_submodule(name)(x)
        return features

    def output_shape(self):
        return {name: ShapeSpec(channels=CHANNELS, stride=STRIDES[name]) for name in STRIDES}


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(cfg, input_shape):
    return TinyBackbone(input_shape.channels)
