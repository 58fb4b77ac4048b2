"""The form of the rescaling that exporters take gives the same values, at every size."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch.export import Dim
from torch.nn import functional as F

from balanced_d2 import load_config
from balanced_d2.modeling import rescale
from balanced_d2.modeling.rescale import adaptive_max_pool, nearest


@pytest.fixture
def exporting(monkeypatch):
    monkeypatch.setattr(rescale, "is_exporting", lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_sizes(exporting, dtype):
    for height, width, *size in torch.randint(1, 40, (300, 4)).tolist():
        x = torch.randn(2, 3, height, width, dtype=dtype)
        assert torch.equal(adaptive_max_pool(x, size), F.adaptive_max_pool2d(x, size))
        assert torch.equal(nearest(x, size), F.interpolate(x, size, mode="nearest"))


@pytest.mark.parametrize("octaves", [1, 2, 3, 4])
def test_levels_of_every_image_size(exporting, octaves):
    """Level sizes are halved and rounded up, so their ratio is a power of two only at best."""
    for fine in range(1, 500):
        coarse = -(-fine // 2**octaves)
        x = torch.randn(1, 1, fine, 1)
        assert torch.equal(adaptive_max_pool(x, [coarse, 1]), F.adaptive_max_pool2d(x, (coarse, 1)))
        x = torch.arange(coarse, dtype=torch.float32).view(1, 1, coarse, 1)
        # 50 rows to 198 are a case where exact arithmetic picks another row than PyTorch does.
        assert torch.equal(nearest(x, [fine, 1]), F.interpolate(x, (fine, 1), mode="nearest"))


def test_eager_runs_pytorchs_own_kernels():
    x = torch.randn(1, 4, 48, 64)
    with torch.profiler.profile() as profile:
        nearest(adaptive_max_pool(x, [12, 16]), [48, 64])
    operators = {event.key for event in profile.key_averages()}
    assert {"aten::adaptive_max_pool2d", "aten::upsample_nearest2d"} <= operators
    assert "aten::index" not in operators


@pytest.mark.parametrize("refine_type", ["none", "conv", "non_local"])
def test_torch_export_of_a_balanced_backbone_with_dynamic_shapes(refine_type):
    cfg = load_config(
        "configs/BCCD/balanced_faster_rcnn_R_18_FPN.yaml",
        ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.BALANCED_FPN.REFINE_TYPE", refine_type],
    )
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3)).eval()
    if refine_type == "non_local":
        torch.nn.init.normal_(backbone.balancer.refine.conv_out.weight)
    batch = Dim("batch", min=1, max=16)
    height, width = (32 * Dim(name, min=3, max=64) for name in ("height", "width"))
    exported = torch.export.export(
        backbone,
        (torch.randn(2, 3, 160, 224),),
        dynamic_shapes=({0: batch, 2: height, 3: width},),
    ).module()
    for size in ((1, 96, 320), (3, 352, 128), (2, 480, 416)):
        image = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            expected, got = backbone(image), exported(image)
        assert list(got) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
        for name, feature in expected.items():
            torch.testing.assert_close(got[name], feature, rtol=1e-5, atol=1e-5)
