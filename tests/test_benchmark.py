"""The benchmark runs, and the things it compares compute the same."""

import json

import pytest
import torch

from balanced_d2.benchmark import Bench
from balanced_d2.benchmark.baselines import ExplicitBalancer, sample_with_sets
from balanced_d2.benchmark.exported import DEPLOYED, compare_exported
from balanced_d2.benchmark.parts import forward_and_backward, pyramid
from balanced_d2.modeling import FeatureBalancer

from .conftest import assert_user_error, run_program

pytestmark = pytest.mark.slow


def test_runs_on_the_smallest_sizes(tmp_path):
    result = run_program(
        *("tools/benchmark.py", "--scale", "0.05", "--turns", "1"),
        *("--output", tmp_path / "figures.json"),
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"date", "device", "threads", "torch"} <= set(figures["machine"])
    assert len(figures["results"]) == 21
    for title, rows in figures["results"].items():
        assert title in result.stdout
        if "exponents" in rows:
            assert set(rows["sizes"]) == {"1", "2", "4", "8"}
            continue
        first = next(iter(rows.values()))
        assert first["ratio"] == 1
        for name, row in rows.items():
            assert name in result.stdout
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
            assert row.get("peak_mib", 1) > 0
        if "Lite0" in title or "plain" in rows and "fast, bfloat16" in rows:
            assert "of the ceiling" in result.stdout
            for row in rows.values():
                assert (row["flops"] > 0) == ("Lite0" not in title)
                assert row["seconds"]["convolution"] > 0


def test_exported_models(tmp_path, capsys):
    bench = Bench("cpu", turns=1)
    rows = compare_exported(
        bench, DEPLOYED[0], 48, 64, str(tmp_path), formats=("torchscript", "onnx")
    )
    assert {"eager, float32", "eager, bfloat16", "torchscript", "onnx in onnxruntime"} <= set(rows)
    assert rows["eager, float32"]["ratio"] == 1
    assert all(row["median_ms"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert "exported, balanced_faster_rcnn_R_18_FPN, 48 x 64" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--turns", "0"], "--turns has to be 1 or more"),
        (["--scale", "2"], "--scale"),
        (["--scale", "0.01"], "--scale from 0.05"),
        (["--output", "setup.cfg/figures.json"], "cannot write to the folder setup.cfg"),
        (["--output", "tests"], "tests is a folder"),
        (["--only", "parts", "--device", "cuda"], "needs CUDA"),
    ],
)
def test_wrong_arguments(arguments, message, run_here):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert_user_error(run_here("tools/benchmark.py", *arguments), message)


def random_pyramid(dtype):
    """The levels of an image of random size that is padded to a multiple of 32."""
    height, width = (8 * int(side) for side in torch.randint(1, 5, (2,)))
    sizes = [(height >> i, width >> i) for i in range(4)]
    sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    return [torch.randn(2, 32, *size).to(dtype).requires_grad_() for size in sizes]


def balance(module, features, weights):
    """Outputs, and gradients of levels and parameters."""
    outputs = module(features)
    loss = sum((x * w).sum() for x, w in zip(outputs, weights))
    return outputs, torch.autograd.grad(loss, [*features, *module.parameters()])


def assert_near(got, expected, tolerance):
    """Equal within a tolerance relative to the largest value, or to 1 if that is smaller."""
    for a, b in zip(got, expected):
        error = (a - b).float().abs().max() / b.float().abs().max().clamp(min=1)
        assert error <= tolerance


@pytest.mark.parametrize("seed", range(8))
def test_balancer_equals_the_explicit_form(seed):
    """In single precision, against the explicit form in double precision."""
    torch.manual_seed(seed)
    explicit, balancer = ExplicitBalancer(32), FeatureBalancer(32)
    balancer.load_state_dict(explicit.state_dict())
    features = random_pyramid(torch.float32)
    weights = [torch.randn_like(x) for x in features]
    got = balance(balancer, features, weights)
    exact = [x.detach().double().requires_grad_() for x in features]
    expected = balance(explicit.double(), exact, weights)
    assert_near(got[0], expected[0], 1e-5)
    assert_near(got[1], expected[1], 1e-5)
    with torch.no_grad():
        assert_near(balancer(features), expected[0], 1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_balancer_equals_the_explicit_form_in_bfloat16(seed):
    """Gradients only of levels that need no pooling from the refined one: with 8 bits, a different
    rounding makes a different position the largest."""
    torch.manual_seed(seed)
    explicit, balancer = ExplicitBalancer(32), FeatureBalancer(32)
    balancer.load_state_dict(explicit.state_dict())
    explicit, balancer = explicit.bfloat16(), balancer.bfloat16()
    features = random_pyramid(torch.bfloat16)
    weights = [torch.randn_like(x) for x in features]
    expected, got = (balance(module, features, weights) for module in (explicit, balancer))
    assert_near(got[0], expected[0], 2e-2)
    fine, weights = features[:3], weights[:3]
    expected, got = (balance(module, fine, weights) for module in (explicit, balancer))
    assert_near(got[1][:3], expected[1][:3], 2e-2)


def test_samplers_draw_alike():
    """The straightforward sampler takes as many from each bin as this project's."""
    from balanced_d2.modeling import sample_iou_balanced

    ious = torch.cat([torch.full((900,), 0.05), torch.full((60,), 0.2), torch.full((40,), 0.4)])
    for sample in (sample_with_sets, sample_iou_balanced):
        chosen = sample(ious, 300)
        assert len(set(chosen.tolist())) == 300
        assert torch.bincount((6 * ious[chosen]).long()).tolist() == [200, 60, 40]


def test_peak_memory_counts_simultaneous_allocations():
    bench = Bench("cpu", turns=1)

    def run():
        for _ in range(3):
            torch.zeros(250_000)  # 1 MB, freed at once
        both = torch.zeros(250_000), torch.zeros(500_000)
        del both

    assert bench.peak(run) == pytest.approx(3e6, rel=0.01)


def test_memory_of_balancing_grows_linearly():
    """An N x N matrix would make it grow with the square of the area."""
    bench = Bench("cpu", turns=1)
    balancer = FeatureBalancer(16)
    peaks = {}
    for area, (height, width) in {1: (256, 512), 4: (512, 1024), 16: (1024, 2048)}.items():
        run = forward_and_backward(balancer, pyramid(1, 16, height, width, "cpu"))
        run()
        peaks[area] = bench.peak(run)
    # The growth from step to step, without what does not depend on the size.
    assert 3.6 < (peaks[16] - peaks[4]) / (peaks[4] - peaks[1]) < 4.4
