"""SOLVER.OPTIMIZER and SOLVER.BACKBONE_MULTIPLIER."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from balanced_d2 import load_config
from balanced_d2.engine.optimizer import build_optimizer, settings_kept

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, assert_user_error
from .test_backbones import ON_TIMM


def tiny_config(*options):
    model = [*TINY_MODEL, "MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "0.01"]
    return load_config(str(ROOT / TINY_CONFIG), [*model, *options])


class Detector(nn.Module):
    """Two weights and a norm, under names as detectors have them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"bottom_up": nn.Linear(2, 2, bias=False), "fpn_output2": nn.BatchNorm2d(2)}
        )
        self.roi_heads = nn.Linear(2, 1, bias=False)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)


def test_adamw_equals_the_formula_of_its_paper():
    """Algorithm 2 of Loshchilov and Hutter (2019), with each group's rate and decay."""
    cfg = tiny_config(
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BACKBONE_MULTIPLIER", "0.25"),
        *("SOLVER.WEIGHT_DECAY", "0.1", "SOLVER.WEIGHT_DECAY_NORM", "0.0"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1.5"),
    )
    torch.manual_seed(0)
    model = Detector()
    optimizer = build_optimizer(cfg, model)
    rates = {"backbone.bottom_up.weight": (0.0025, 0.1), "roi_heads.weight": (0.01, 0.1)}
    rates |= {f"backbone.fpn_output2.{name}": (0.01, 0.0) for name in ("weight", "bias")}
    trained = dict(model.named_parameters())
    expected = {name: trained[name].detach().double().flatten().tolist() for name in rates}
    moments = {name: [[0.0, 0.0] for _ in values] for name, values in expected.items()}
    for step in range(1, 4):
        for name, values in expected.items():
            gradient = torch.randn_like(trained[name])
            trained[name].grad = gradient.clone()
            rate, decay = rates[name]
            for i, g in enumerate(gradient.flatten().tolist()):
                g = min(max(g, -1.5), 1.5)
                m, v = moments[name][i]
                moments[name][i] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                update = m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
                values[i] -= rate * (update + decay * values[i])
        optimizer.step()
    for name, values in expected.items():
        value = trained[name].detach().double().flatten()
        assert torch.allclose(value, torch.tensor(values).double(), atol=1e-6), name
    assert model.frozen.grad is None and torch.equal(model.frozen, torch.zeros(3))


CLIPPED = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm")
NOT_CLIPPED = ("SOLVER.CLIP_GRADIENTS.ENABLED", "False")
MIXED = ("SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cuda")


def test_scaled_gradients_are_clipped_as_others():
    """GradScaler multiplies them by 65,536, which a clip before the unscaling would undo."""
    weights = []
    for scaled in (True, False):
        cfg = tiny_config("SOLVER.OPTIMIZER", "AdamW", *CLIPPED, *(MIXED if scaled else ()))
        torch.manual_seed(0)
        model = nn.Linear(200, 50, bias=False)
        optimizer = build_optimizer(cfg, model)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        inputs = torch.randn(8, 200)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(model(inputs).square().mean() / 100).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


@pytest.mark.parametrize("options", [CLIPPED, (*MIXED, *NOT_CLIPPED), (*MIXED, *CLIPPED)])
def test_the_implementation_may_change_in_a_resumed_training(options):
    """The state of one that is not fused counts its steps on the CPU, others with parameters."""
    model = nn.Linear(2, 1, device="meta")
    optimizer = build_optimizer(tiny_config("SOLVER.OPTIMIZER", "AdamW", *options), model)
    state = torch.optim.AdamW(nn.Linear(2, 1).parameters(), fused=False).state_dict()
    moment = torch.zeros(1)
    state["state"] = {i: {"step": torch.tensor(3.0), "exp_avg": moment} for i in range(2)}
    state["param_groups"] = [
        {**state["param_groups"][0], "params": group["params"]}
        for group in optimizer.state_dict()["param_groups"]
    ]
    with settings_kept(optimizer, None):
        optimizer.load_state_dict(state)
    is_fused = options != (*MIXED, *CLIPPED)
    for parameter in model.parameters():
        assert optimizer.state[parameter]["step"].device.type == ("meta" if is_fused else "cpu")
    # None, unlike False, does not rule out PyTorch's other fast implementation.
    assert {group["fused"] for group in optimizer.param_groups} == {True if is_fused else None}


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "RMSprop"])
def test_optimizers_of_others_resume(name):
    """Such as a LazyConfig names: those that have no fused form, too."""
    weights = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        for step in range(4):
            if interrupted and step == 2:
                state = optimizer.state_dict()
                optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
                with settings_kept(optimizer, None):
                    optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(torch.full((1, 4), step + 1.0)).square().sum().backward()
            optimizer.step()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_sgd_alone_is_detectron2s():
    from detectron2.solver import build_optimizer as detectron2s

    cfg, model = tiny_config(), Detector()
    built, expected = build_optimizer(cfg, model), detectron2s(cfg, model)
    assert type(built).__name__ == type(expected).__name__
    assert built.param_groups == expected.param_groups


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("options", [ON_TIMM, []])
def test_the_backbone_has_its_own_rate(optimizer, options):
    cfg = tiny_config(
        *options,
        *("MODEL.TIMM.PRETRAINED", "False", "MODEL.FPN.NORM", "BN"),
        *("SOLVER.OPTIMIZER", optimizer, "SOLVER.BACKBONE_MULTIPLIER", "0.5"),
        *("SOLVER.MOMENTUM", "0.8", "SOLVER.WEIGHT_DECAY_NORM", "0.03"),
    )
    model = build_model(cfg)
    built = build_optimizer(cfg, model)
    groups = {id(p): group for group in built.param_groups for p in group["params"]}
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters(recurse=False)
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(groups) == len(trained) == sum(len(g["params"]) for g in built.param_groups)
    for name, parameter in trained.items():
        group = groups[id(parameter)]
        is_below = name.startswith("backbone.bottom_up.")
        assert group["lr"] == (0.005 if is_below else 0.01), name
        assert group["weight_decay"] == (0.03 if id(parameter) in norms else 0.0001), name
        assert group.get("momentum", 0.8) == 0.8
    assert any(".bottom_up." in name for name in trained)


@pytest.mark.slow
def test_training_with_adamw_resumes_exactly(tiny_coco, tmp_path, train_net_here):
    arguments = [
        *("--register", "tiny", tiny_coco, tiny_coco.parent / "images", *TINY_MODEL),
        *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path),
        *("SEED", "1", "DATALOADER.NUM_WORKERS", "0", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "4"),
        *("MODEL.FOLD_NORM", "True", "SOLVER.BACKBONE_MULTIPLIER", "0.3"),
    ]
    result = train_net_here(*arguments)
    assert result.returncode == 0, result.stderr
    expected = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    for name in ("model_final.pth", "model_0000003.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    result = train_net_here("--resume", *arguments)
    assert "Starting training from iteration 2" in result.stdout
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_an_unknown_optimizer_is_refused(tiny_coco, tmp_path, train_net_here):
    result = train_net_here(
        *("--register", "tiny", tiny_coco, tiny_coco.parent / "images", *TINY_MODEL),
        *("DATASETS.TRAIN", "('tiny',)", "OUTPUT_DIR", tmp_path, "SOLVER.OPTIMIZER", "Adam"),
    )
    assert_user_error(result, "SOLVER.OPTIMIZER is 'Adam'; choose one of: SGD, AdamW")
