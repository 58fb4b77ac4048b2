"""Convolutions that compute the batch norm after them."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from balanced_d2 import load_config
from balanced_d2.engine.speed import speed_up
from balanced_d2.modeling.feature_backbone import FeatureBackbone
from balanced_d2.modeling.fold_norm import _FoldedNorm, fold_norm

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL
from .test_speed import losses_and_detections


def with_statistics(module: nn.Module) -> nn.Module:
    """Let the norms scale and shift."""
    with torch.no_grad():
        for norm in module.modules():
            if hasattr(norm, "running_var"):
                for name, low in (("weight", 0.5), ("bias", -1.0)):
                    getattr(norm, name).uniform_(low, low + 1.5)
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.2, 3)
    return module


def block(norm: nn.Module, bias: bool = True, groups: int = 1) -> nn.Module:
    conv = Conv2d(4, 6, 3, stride=2, padding=1, bias=bias, groups=groups, norm=norm)
    return with_statistics(conv).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_sums_of_the_definition(bias, groups):
    torch.manual_seed(0)
    conv = block(FrozenBatchNorm2d(6), bias, groups)
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    norm, padded = conv.norm, nn.functional.pad(x, (1, 1, 1, 1))
    expected = torch.zeros(1, 6, 3, 4, dtype=torch.float64)
    per_group = 4 // groups
    for o in range(6):
        first = o // (6 // groups) * per_group
        for i in range(3):
            for j in range(4):
                seen = padded[0, first : first + per_group, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                value = (seen * conv.weight[o]).sum() + (conv.bias[o] if bias else 0)
                value = (value - norm.running_mean[o]) / (norm.running_var[o] + norm.eps).sqrt()
                expected[0, o, i, j] = value * norm.weight[o] + norm.bias[o]
    fold_norm(conv)
    assert torch.allclose(conv(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_stay(norm, training):
    torch.manual_seed(0)
    plain = nn.Sequential(block(norm(6)), nn.ReLU()).train(training)
    folded = copy.deepcopy(plain)
    fold_norm(folded)
    folded = copy.deepcopy(folded)  # the copy must not compute with the weights of its original
    assert list(folded.state_dict()) == list(plain.state_dict())
    x, results = torch.randn(2, 4, 9, 8, dtype=torch.float64), []
    for model in (plain, folded):
        image = x.clone().requires_grad_()
        output = model(image)
        (output * torch.arange(6.0)[:, None, None]).sum().backward()
        results.append([output, image.grad, *(p.grad for p in model.parameters())])
    for expected, value in zip(*results):
        assert torch.allclose(value, expected, rtol=1e-10, atol=1e-12)
    for expected, value in zip(plain.buffers(), folded.buffers()):
        assert torch.equal(expected, value)


def test_new_weights_are_seen_where_folded_ones_are_kept():
    torch.manual_seed(0)
    conv, other = block(FrozenBatchNorm2d(6)), block(FrozenBatchNorm2d(6))
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = other(x)
        fold_norm(conv)
        assert not torch.allclose(conv(x), expected)
        conv.load_state_dict(other.state_dict())
        assert torch.allclose(conv(x), expected)
        conv.weight.mul_(2)
        other.weight.mul_(2)
        assert torch.allclose(conv(x), other(x))
        conv.norm.running_mean = other.norm.running_mean = torch.ones(6, dtype=torch.float64)
        assert torch.allclose(conv(x), other(x))


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_what_was_learnt_since_the_last_evaluation_is_seen(norm):
    """A fused optimizer and the norm's statistics change without a new version of the tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(block(norm(6)), nn.ReLU())
    plain = copy.deepcopy(model)
    fold_norm(model)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (model, plain)]
    before = None
    for _ in range(3):
        for mode in (True, False):
            with torch.no_grad():
                expected, found = plain.train(mode)(x), model.train(mode)(x)
                assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
                assert before is None or not torch.allclose(found, before)
        before = found
        for m, optimizer in zip((model, plain), optimizers):
            optimizer.zero_grad()
            (m.train()(x) - 1).square().sum().backward()
            optimizer.step()
        # In training mode, without a change of it (PreciseBN).
        with torch.no_grad():
            assert torch.allclose(model(x), plain(x), rtol=1e-9, atol=1e-12)
    copy.deepcopy(model)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_what_was_learnt_in_evaluation_mode_is_seen(norm):
    """As of batch norms that are kept still by the mode, which then never changes."""
    torch.manual_seed(0)
    plain = block(norm(6)).eval()
    model = copy.deepcopy(plain)
    fold_norm(model)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
    for m in (model, plain):
        (m(x) - 1).square().sum().backward()
        torch.optim.AdamW(m.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(model(x), before)


def test_inference_mode():
    """A model may be made or run in it, and give gradients of its input afterwards."""
    torch.manual_seed(0)
    model = block(FrozenBatchNorm2d(6)).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    fold_norm(model)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.allclose(model(x), plain(x))
        made = block(FrozenBatchNorm2d(6)).eval()
        fold_norm(made)
        for _ in range(2):
            made.load_state_dict(plain.state_dict())
            assert torch.allclose(made(x), plain(x))
            plain.weight.mul_(2)
    gradients = []
    for m in (model, plain):
        m.load_state_dict(plain.state_dict())
        image = x.clone().requires_grad_()
        m(image).square().sum().backward()
        gradients.append(image.grad)
    assert torch.allclose(*gradients)


def test_threads_share_a_model():
    """One computes a convolution from its beginning to its end while another is in it."""
    entered, left = threading.Event(), threading.Event()

    class Slow(nn.Conv2d):
        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                assert left.wait(60)
            return super().forward(x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = Slow(3, 3, 3, stride=4, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return [self.norm(self.conv(x))]

    torch.manual_seed(0)
    network = with_statistics(Network()).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        (expected,) = network(x)
    backbone = FeatureBackbone(
        network, [3], [4], ["res2"], freeze_at=0, freeze_norm=lambda m: m, norm="BN"
    ).eval()
    fold_norm(backbone)
    assert isinstance(network.norm, _FoldedNorm)

    @torch.no_grad()
    def run():
        return backbone(x)["res2"]

    with ThreadPoolExecutor() as pool:
        other = pool.submit(run)
        try:
            assert entered.wait(60)
            found = run()
        finally:
            left.set()
        for value in (found, other.result()):
            assert torch.allclose(value, expected, atol=1e-6)


class Reused(nn.Module):
    """What the convolution gives is read twice: its norm must not be folded into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, stride=4, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return [x + self.norm(x)]


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_networks_of_timm(name, norm):
    pytest.importorskip("timm")
    from balanced_d2.modeling.timm_backbone import TimmBackbone

    torch.manual_seed(0)
    plain = with_statistics(TimmBackbone(name, pretrained=False, norm=norm)).eval()
    folded = copy.deepcopy(plain)
    fold_norm(folded)
    norms = [module for module in folded.modules() if hasattr(module, "running_var")]
    assert norms and all(isinstance(norm, _FoldedNorm) for norm in norms)
    x = torch.randn(1, 3, 64, 96)
    expected, outputs = plain(x), folded(x)
    for level, value in outputs.items():
        difference = (value - expected[level]).abs().max()
        assert difference <= 1e-5 * value.abs().max(), level


def test_norm_of_a_shared_output_stays():
    torch.manual_seed(0)
    network = with_statistics(Reused()).eval()
    x = torch.randn(1, 3, 8, 8)
    (expected,) = network(x)
    backbone = FeatureBackbone(
        network, [3], [4], ["res2"], freeze_at=0, freeze_norm=lambda m: m, norm="BN"
    )
    fold_norm(backbone)
    assert torch.equal(network(x)[0], expected)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_detector_stays_within_rounding(norm):
    """Losses, gradients and detections of a whole model, by the key of the config."""
    results = []
    for fold in ("False", "True"):
        cfg = load_config(
            str(ROOT / TINY_CONFIG),
            [
                *TINY_MODEL,
                *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu"),
                *("MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", "BN", "MODEL.FOLD_NORM", fold),
            ],
        )
        torch.manual_seed(0)
        model = build_model(cfg)
        torch.manual_seed(1)
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_var.data.uniform_(0.8, 1.2)
                module.running_mean.data.normal_(0, 0.1)
        model = speed_up(cfg, model)
        losses, found = losses_and_detections(model)
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((losses, gradients, found))
    (losses, gradients, found), (other_losses, other_gradients, also_found) = results
    for name, value in losses.items():
        assert torch.allclose(other_losses[name], value, rtol=1e-4), name
    assert gradients.keys() == other_gradients.keys()
    assert len(found) == len(also_found) > 0
    assert torch.allclose(also_found.scores, found.scores, atol=1e-4)
    assert torch.allclose(also_found.pred_boxes.tensor, found.pred_boxes.tensor, atol=1e-2)


def test_traces_compute_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(block(FrozenBatchNorm2d(6)), nn.ReLU()).eval()
    x = torch.randn(1, 4, 12, 9, dtype=torch.float64)
    expected = model(x)
    fold_norm(model)
    traced = torch.jit.trace(model, x)
    assert torch.allclose(traced(x), expected)
    assert traced.state_dict().keys() == model.state_dict().keys()
