"""Balancing of pyramids that are not Detectron2's FPN."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from balanced_d2 import load_config
from balanced_d2.modeling import BalancedBackbone
from balanced_d2.utils.errors import UserError

from .conftest import TINY_CONFIG, TINY_MODEL
from .test_feature_balancer import balance_loops, non_local_loops, random_parameters, state
from .test_models import batch


class Stem(nn.Sequential):
    """Images to features of a stride that is a power of 2."""

    def __init__(self, channels, stride):
        convs = [nn.Conv2d(3, channels, 3, 2, 1)]
        convs += [nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(stride.bit_length() - 2)]
        super().__init__(*convs)


class Pyramid(Backbone):
    def __init__(self, channels, names):
        super().__init__()
        self._out_features = names
        self._out_feature_channels = dict.fromkeys(names, channels)
        self._out_feature_strides = {name: 2 ** int(name[1]) for name in names}

    @property
    def size_divisibility(self):
        return max(self._out_feature_strides.values())


class PAFPN(Pyramid):
    """Top-down, then bottom-up by convolutions: Path Aggregation Network."""

    def __init__(self, channels=4):
        super().__init__(channels, ["p2", "p3", "p4", "p5"])
        self.stem = Stem(channels, 4)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(3))
        self.up_again = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(3))

    def forward(self, x):
        levels = [self.stem(x)]
        for conv in self.down:
            levels.append(conv(levels[-1]).relu())
        for i in (2, 1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0)
        for i, conv in enumerate(self.up_again):
            levels[i + 1] = levels[i + 1] + conv(levels[i])
        return dict(zip(self._out_features, levels))


class OneScale(Backbone):
    """What stands for a vision transformer."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem = Stem(channels, 16)
        self._out_features = ["last_feat"]
        self._out_feature_channels = {"last_feat": channels}
        self._out_feature_strides = {"last_feat": 16}

    def forward(self, x):
        return {"last_feat": self.stem(x)}


class FromOneScale(Pyramid):
    """With the interface of ViTDet's pyramid, which Detectron2 0.6 does not have."""

    padding_constraints = {"size_divisiblity": 32, "square_size": 128}
    size_divisibility = 0

    def __init__(self, channels=4):
        super().__init__(channels, ["p2", "p3", "p4", "p5"])
        self.net = OneScale(channels)
        self.stages = nn.ModuleList(
            (
                nn.ConvTranspose2d(channels, channels, 4, 4),
                nn.ConvTranspose2d(channels, channels, 2, 2),
                nn.Conv2d(channels, channels, 1),
                nn.MaxPool2d(2),
            )
        )

    def forward(self, x):
        (features,) = self.net(x).values()
        return {
            name: stage(features) + 1e-3 for name, stage in zip(self._out_features, self.stages)
        }


class BiFPN(Pyramid):
    """As a user may write one: learnt weights, and the levels from coarse to fine."""

    def __init__(self, channels=4):
        super().__init__(channels, ["p6", "p5", "p4", "p3", "p2"])
        self.stem = Stem(channels, 4)
        self.weights = nn.Parameter(torch.rand(4, 2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))

    def forward(self, x):
        levels = [self.stem(x)]
        for _ in range(4):
            levels.append(F.max_pool2d(levels[-1], 2, ceil_mode=True))
        for i, (conv, weights) in enumerate(zip(self.convs, self.weights.softmax(dim=1))):
            coarser = F.interpolate(levels[-1 - i], size=levels[-2 - i].shape[-2:])
            levels[-2 - i] = conv(weights[0] * levels[-2 - i] + weights[1] * coarser)
        return dict(zip(self._out_features, reversed(levels)))


def simple_feature_pyramid(channels=4):
    """ViTDet's own; of Detectron2's main."""
    try:
        from detectron2.modeling import SimpleFeaturePyramid
    except ImportError:
        pytest.skip("Detectron2 0.6 has no SimpleFeaturePyramid")
    return SimpleFeaturePyramid(
        OneScale(8), "last_feat", channels, (4.0, 2.0, 1.0, 0.5), square_pad=128
    )


PYRAMIDS = [PAFPN, FromOneScale, simple_feature_pyramid, BiFPN]


@pytest.fixture(params=PYRAMIDS, ids=lambda build: build.__name__)
def pyramid(request):
    return request.param()


def test_keeps_what_the_pyramid_says_of_itself(pyramid):
    balanced = BalancedBackbone(pyramid, refine_level=1)
    assert balanced.output_shape() == pyramid.output_shape()
    assert balanced.size_divisibility == pyramid.size_divisibility
    assert balanced.padding_constraints == getattr(pyramid, "padding_constraints", {})
    image = torch.randn(2, 3, 64, 128)
    features = balanced(image)
    sizes = [x.shape[-1] for x in features.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert list(balanced.output_shape()) == list(features)
    for name, spec in balanced.output_shape().items():
        assert features[name].shape == (2, spec.channels, 64 // spec.stride, 128 // spec.stride)


@pytest.mark.parametrize("refine_level", [0, 2])
def test_values_equal_plain_loops(pyramid, refine_level):
    balanced = random_parameters(BalancedBackbone(pyramid, refine_level=refine_level))
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter, std=0.15)
    image = torch.randn(1, 3, 64, 128, dtype=torch.float64)
    with torch.no_grad():
        got, unbalanced = balanced(image), pyramid(image)
    names = sorted(unbalanced)
    levels = [unbalanced[name][0].numpy() for name in names]
    weights = state(balanced.balancer.refine)
    expected = balance_loops(levels, refine_level, lambda x: non_local_loops(x, weights))
    assert list(got) == names
    for name, want in zip(names, expected):
        np.testing.assert_allclose(got[name][0].numpy(), want, rtol=1e-9, atol=1e-9)


def test_gradients_equal_finite_differences(pyramid):
    """Of a loss of all levels, along a random direction of all parameters."""
    balanced = random_parameters(BalancedBackbone(pyramid, refine_level=1))
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    weights = {name: torch.randn_like(x) for name, x in balanced(image).items()}

    def loss(parameters):
        features = torch.func.functional_call(balanced, parameters, (image,))
        return sum((features[name] * weights[name]).sum() for name in features)

    parameters = dict(balanced.named_parameters())
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}
    gradients = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    derivative = sum((g * d).sum() for g, d in zip(gradients, direction.values()))
    with torch.no_grad():
        step = 1e-7
        there, back = (
            loss({name: x + sign * step * direction[name] for name, x in parameters.items()})
            for sign in (1, -1)
        )
    torch.testing.assert_close(derivative, (there - back) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", PYRAMIDS)
def test_a_detector_on_it_trains_and_detects(build, monkeypatch):
    def build_backbone(cfg, input_shape: ShapeSpec):
        node = cfg.MODEL.BALANCED_FPN
        return BalancedBackbone(
            build(cfg.MODEL.FPN.OUT_CHANNELS),
            refine_level=node.REFINE_LEVEL,
            refine_type=node.REFINE_TYPE,
        )

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_balanced_user", build_backbone)
    names = "['p2', 'p3', 'p4', 'p5']"
    opts = [*TINY_MODEL, "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_balanced_user"]
    opts += ["MODEL.RPN.IN_FEATURES", names, "MODEL.ROI_HEADS.IN_FEATURES", names]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [96]]", "MODEL.WEIGHTS", ""]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    model = build_model(load_config(TINY_CONFIG, opts))
    nn.init.normal_(model.backbone.balancer.refine.conv_out.weight, std=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = batch()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # of sampling
        with EventStorage():
            loss = sum(model.train()(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for name, parameter in model.backbone.named_parameters():
        if not name.endswith("phi.bias"):  # which adds the same to all logits of a softmax
            assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        assert len(model.eval()(inputs[:1])[0]["instances"]) > 0


def test_in_a_lazy_config():
    node = L(BalancedBackbone)(backbone=L(PAFPN)(channels=8), refine_level=1, refine_type="conv")
    balanced = instantiate(node)
    assert balanced.balancer.refine.conv.in_channels == 8
    assert list(balanced(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5"]


def test_a_refinement_can_be_given_as_a_module():
    balanced = BalancedBackbone(PAFPN(), refine_type=nn.Conv2d(4, 4, 1))
    assert isinstance(balanced.balancer.refine, nn.Conv2d)


def changed(attribute, value):
    pyramid = PAFPN()
    getattr(pyramid, attribute)["p3"] = value
    return pyramid


@pytest.mark.parametrize(
    "pyramid, arguments, message",
    [
        (changed("_out_feature_channels", 8), {}, "levels of PAFPN .*'p3': 8.* the same for all"),
        (changed("_out_feature_strides", None), {}, "PAFPN does not give the stride.*'p3': None"),
        (PAFPN(), {"refine_level": 4}, "is 4, but the pyramid has 4 levels; choose 0 to 3"),
        (PAFPN(), {"refine_level": -1}, "refine_level .* is -1"),
        (PAFPN(), {"refine_type": "nonlocal"}, "there is no 'nonlocal'"),
    ],
)
def test_what_does_not_fit(pyramid, arguments, message):
    with pytest.raises(UserError, match=message):
        BalancedBackbone(pyramid, **arguments)
