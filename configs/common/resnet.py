# ResNet-50 for MSRA's weights and batch-norm statistics, with the pixel normalisation they expect.
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

bottom_up = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
    freeze_at=2,
)

pixels = {
    "pixel_mean": [103.53, 116.28, 123.675],
    "pixel_std": [1.0, 1.0, 1.0],
    "input_format": "BGR",
}
