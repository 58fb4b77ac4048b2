"""Every form of the rescaling, fast or for exporters, gives PyTorch's values at every size."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.env import TORCH_VERSION
from torch.export import Dim
from torch.nn import functional as F

from balanced_d2 import load_config
from balanced_d2.export.tracing import no_export_warnings
from balanced_d2.layers import rescale
from balanced_d2.layers.rescale import adaptive_max_pool, add_nearest, nearest


@pytest.fixture
def exporting(monkeypatch):
    monkeypatch.setattr(rescale, "is_exporting", lambda: True)


def like(height, width):
    return torch.empty(1, 1, height, width)


def random_sizes(count):
    """Sizes (height, width) of two levels; multiples of each other half of the time."""
    for height, width, f, g, is_multiple in torch.randint(1, 13, (count, 5)).tolist():
        if is_multiple > 6:
            yield (height, width), (f * height, g * width)
        else:
            yield (height, width), (f + g, f + 2 * height)


def assert_equal_to_pytorch(coarse, fine, dtype):
    x = torch.randn(2, 3, *fine, dtype=dtype)
    y = torch.randn(2, 3, *coarse, dtype=dtype)
    assert torch.equal(adaptive_max_pool(x, y), F.adaptive_max_pool2d(x, coarse))
    assert torch.equal(adaptive_max_pool(y, x), F.adaptive_max_pool2d(y, fine))
    assert torch.equal(nearest(y, x), F.interpolate(y, fine, mode="nearest"))
    assert torch.equal(nearest(x, y), F.interpolate(x, coarse, mode="nearest"))
    expected = x + F.interpolate(y, fine, mode="nearest")
    assert torch.equal(add_nearest(x, y), expected)


DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_eager_equals_pytorch(gradient, dtype):
    with torch.set_grad_enabled(gradient):
        for coarse, fine in random_sizes(200):
            assert_equal_to_pytorch(coarse, fine, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_exported_form_equals_pytorch(exporting, dtype):
    for coarse, fine in random_sizes(200):
        assert_equal_to_pytorch(coarse, fine, dtype)


def test_channels_last():
    for coarse, fine in random_sizes(50):
        x = torch.randn(2, 3, *fine).to(memory_format=torch.channels_last)
        y = torch.randn(2, 3, *coarse).to(memory_format=torch.channels_last)
        expected = x + F.interpolate(y, fine, mode="nearest")
        assert torch.equal(add_nearest(x, y), expected)
        with torch.no_grad():
            assert torch.equal(adaptive_max_pool(x, y), F.adaptive_max_pool2d(x, coarse))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_equal_pytorchs(memory_format):
    """Of a level that is pooled, and to which something coarser is added, as balancing does."""

    def plain(x, y):
        return x + F.interpolate(y, x.shape[-2:], mode="nearest"), F.adaptive_max_pool2d(
            x, y.shape[-2:]
        )

    def fast(x, y):
        return add_nearest(x, y), adaptive_max_pool(x, y)

    def run(function, x, y, weights):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        added, pooled = function(x, y)
        ((added * weights[0]).sum() + (pooled * weights[1]).sum()).backward()
        return added, pooled, x.grad, y.grad

    for coarse, fine in random_sizes(100):
        # Few different values: windows have several maxima, of which one gets the gradient.
        x = torch.randint(5, (2, 3, *fine)).float().to(memory_format=memory_format)
        y = torch.randn(2, 3, *coarse)
        weights = torch.randn_like(x), torch.randn_like(y)
        expected = run(plain, x, y, weights)
        torch.testing.assert_close(run(fast, x, y, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("octaves", [1, 2, 3, 4])
def test_exported_form_at_every_image_size(exporting, octaves):
    """Level sizes are halved and rounded up, so their ratio is a power of two only at best."""
    for fine in range(1, 500):
        coarse = -(-fine // 2**octaves)
        x = torch.randn(1, 1, fine, 1)
        expected = F.adaptive_max_pool2d(x, (coarse, 1))
        assert torch.equal(adaptive_max_pool(x, like(coarse, 1)), expected)
        x = torch.arange(coarse, dtype=torch.float32).view(1, 1, coarse, 1)
        # 50 rows to 198 are a case where exact arithmetic picks another row than PyTorch does.
        assert torch.equal(nearest(x, like(fine, 1)), F.interpolate(x, (fine, 1), mode="nearest"))


def test_a_trace_takes_every_size():
    def rescale_both(x, y):
        return adaptive_max_pool(x, y), add_nearest(x, y)

    with torch.no_grad(), no_export_warnings():
        example = torch.randn(1, 2, 8, 12), torch.randn(1, 2, 4, 3)
        traced = torch.jit.trace(rescale_both, example)
        for coarse, fine in random_sizes(50):
            x, y = torch.randn(2, 3, *fine), torch.randn(2, 3, *coarse)
            pooled, added = traced(x, y)
            assert torch.equal(pooled, F.adaptive_max_pool2d(x, coarse))
            assert torch.equal(added, x + F.interpolate(y, fine, mode="nearest"))


@pytest.mark.slow
@pytest.mark.parametrize("refine_type", ["none", "conv", "non_local", "non_local_pooled"])
@pytest.mark.skipif(
    TORCH_VERSION < (2, 14), reason="torch.export of older PyTorch fixes whether P5's size is even"
)
def test_torch_export_of_a_balanced_backbone_with_dynamic_shapes(refine_type):
    cfg = load_config(
        "configs/BCCD/balanced_faster_rcnn_R_18_FPN.yaml",
        ["MODEL.FPN.OUT_CHANNELS", "16", "MODEL.BALANCED_FPN.REFINE_TYPE", refine_type],
    )
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3)).eval()
    if "non_local" in refine_type:
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
