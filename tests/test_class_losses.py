"""Classification losses against plain float64 loops from the papers, and their degenerate cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from balanced_d2.layers import (
    CLS_LOSSES,
    BalancedSoftmax,
    ClassLoss,
    FocalLoss,
    SeesawLoss,
    WeightedCrossEntropy,
    WeightedFocalLoss,
    class_groups,
    weights_of_counts,
)
from balanced_d2.layers.class_counts import GROUPS
from balanced_d2.utils.errors import UserError

from .test_properties import examples

K = 4
COUNTS = [100, 3, 40, 0]
WEIGHTS = [0.5, 2.0, 1.0, 3.0]
SEEN = [90, 2, 30, 0, 600]

# How each loss is made here.
MAKE = {
    "focal": lambda: FocalLoss(K, 1.5),
    "weighted_cross_entropy": lambda: WeightedCrossEntropy(K, WEIGHTS),
    "weighted_focal": lambda: WeightedFocalLoss(K, 1.5, [*WEIGHTS, 0.25]),
    "balanced_softmax": lambda: BalancedSoftmax(K, COUNTS),
    "seesaw": lambda: seesaw(),
    "seesaw, no objectness": lambda: seesaw(objectness=False),
    "seesaw, eps 0": lambda: seesaw(eps=0.0),
}


def seesaw(**arguments):
    loss = SeesawLoss(K, **arguments)
    loss.counts.copy_(torch.tensor(SEEN))
    return loss


def softmax(row):
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def seesaw_loops(row, label, counts, p=0.8, q=2.0, eps=0.01):
    """Equations 1 to 6 of the paper, with the authors' least score that is divided by."""
    scores = softmax(row)
    denominator = 0.0
    for j, z in enumerate(row):
        if j == label:
            denominator += math.exp(z)
            continue
        n_i, n_j = max(counts[label], 1), max(counts[j], 1)
        mitigation = 1 if n_i <= n_j else (n_j / n_i) ** p
        ratio = scores[j] / max(scores[label], eps)
        compensation = 1 if ratio <= 1 else ratio**q
        denominator += mitigation * compensation * math.exp(z)
    return -math.log(math.exp(row[label]) / denominator)


def objectness_loops(row, label, **arguments):
    objects = softmax(row[K:])
    loss = -math.log(objects[0 if label < K else 1])
    return loss + (seesaw_loops(row[:K], label, SEEN[:K], **arguments) if label < K else 0)


def focal_loops(row, label):
    p = softmax(row)[label]
    return -((1 - p) ** 1.5) * math.log(p)


def balanced_softmax_loops(row, label):
    """Equation 4: the prior of the background is that of the average class."""
    counts = [max(n, 1) for n in COUNTS]
    priors = [*counts, sum(counts) / K]
    terms = [n * math.exp(z) for n, z in zip(priors, row)]
    return -math.log(terms[label] / sum(terms))


LOOPS = {
    "focal": focal_loops,
    "weighted_cross_entropy": lambda row, k: -[*WEIGHTS, 1][k] * math.log(softmax(row)[k]),
    "weighted_focal": lambda row, k: [*WEIGHTS, 0.25][k] * focal_loops(row, k),
    "balanced_softmax": balanced_softmax_loops,
    "seesaw": objectness_loops,
    "seesaw, no objectness": lambda row, k: seesaw_loops(row, k, SEEN),
    "seesaw, eps 0": lambda row, k: objectness_loops(row, k, eps=0.0),
}


def test_every_loss_is_tested():
    assert {name.partition(",")[0] for name in MAKE} == set(CLS_LOSSES.names())
    assert MAKE.keys() == LOOPS.keys()


@pytest.mark.parametrize("name", MAKE)
def test_values(name):
    torch.manual_seed(1)
    loss = MAKE[name]()
    logits = 3 * torch.randn(40, loss.num_logits, dtype=torch.float64)
    classes = torch.arange(40) % (K + 1)
    expected = [LOOPS[name](row, k) for row, k in zip(logits.tolist(), classes.tolist())]
    got = loss.loss(logits, classes)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-7)  # weights are in float32
    in_float32 = loss.loss(logits.float(), classes)
    assert in_float32.dtype == torch.float32
    np.testing.assert_allclose(in_float32.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MAKE if "seesaw" not in name])
def test_gradients(name):
    torch.manual_seed(2)
    loss = MAKE[name]()
    logits = torch.randn(6, loss.num_logits, dtype=torch.float64, requires_grad=True)
    classes = torch.arange(6) % (K + 1)
    assert torch.autograd.gradcheck(lambda z: loss.loss(z, classes), logits)


@pytest.mark.parametrize("objectness", [True, False])
def test_gradients_of_seesaw(objectness):
    """Those of a cross-entropy with constant factors (equation 8): by finite differences, with the
    factors held."""
    torch.manual_seed(3)
    loss = seesaw(objectness=objectness)
    logits = 2 * torch.randn(10, loss.num_logits, dtype=torch.float64)
    classes = torch.arange(10) % (K + 1)
    number = K if objectness else K + 1
    factors = torch.ones(10, loss.num_logits, dtype=torch.float64)
    for r, k in enumerate(classes.tolist()):
        if k >= number:
            continue
        scores = softmax(logits[r, :number].tolist())
        for j in range(number):
            n_i, n_j = max(SEEN[k], 1), max(SEEN[j], 1)
            ratio = scores[j] / max(scores[k], 0.01)
            factors[r, j] = min(1, n_j / n_i) ** 0.8 * (max(1, ratio) ** 2 if j != k else 1)

    def held(z):
        total = z.new_zeros(())
        for r, k in enumerate(classes.tolist()):
            if k < number:
                terms = factors[r, :number] * z[r, :number].exp()
                total = total - (z[r, k].exp() / terms.sum()).log()
            if objectness:
                total = total - z[r, K:].log_softmax(dim=0)[0 if k < K else 1]
        return total

    z = logits.clone().requires_grad_()
    loss.loss(z, classes).sum().backward()
    for r in range(10):
        for j in range(loss.num_logits):
            step = torch.zeros_like(logits)
            step[r, j] = 1e-6
            slope = (held(logits + step) - held(logits - step)) / 2e-6
            assert z.grad[r, j].item() == pytest.approx(slope.item(), abs=1e-6)


def test_special_cases_are_cross_entropy():
    logits = torch.randn(20, K + 1, dtype=torch.float64)
    classes = torch.randint(K + 1, (20,))
    expected = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
    for loss in (
        FocalLoss(K, gamma=0.0),
        WeightedCrossEntropy(K, [1.0] * K),
        BalancedSoftmax(K, [7] * K),
        seesaw(objectness=False, p=0.0, q=0.0),
    ):
        torch.testing.assert_close(loss.loss(logits, classes), expected)


def test_probabilities():
    logits = torch.randn(9, K + 2)
    for name, make in MAKE.items():
        loss = make()
        rows = logits[:, : loss.num_logits]
        got = loss.probabilities(rows)
        assert got.shape == (9, K + 1)
        torch.testing.assert_close(got.sum(dim=1), torch.ones(9))
        for row, result in zip(rows.tolist(), got.tolist()):
            expected = softmax(row)
            if loss.num_logits == K + 2:
                is_object, is_background = softmax(row[K:])
                expected = [p * is_object for p in softmax(row[:K])] + [is_background]
            assert result == pytest.approx(expected, rel=1e-4), name


def test_balanced_softmax_recovers_uniform_classes():
    """Trained on a long tail, the plain softmax is that of uniform data (theorem 1): here logits
    alone, without an input, whose best values are then all equal."""
    counts = [100, 10, 1]
    logits = torch.zeros(4, requires_grad=True)
    loss = BalancedSoftmax(3, counts)
    classes = torch.tensor([0] * 100 + [1] * 10 + [2] + [3] * 37)  # background as the average class
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        value = loss.loss(logits.expand(len(classes), 4), classes).mean()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(
        loss.probabilities(logits[None])[0], torch.full((4,), 0.25), atol=1e-3, rtol=0
    )


# Counts of Seesaw loss


def test_seesaw_counts():
    loss = SeesawLoss(3)
    loss.count(torch.tensor([0, 0, 3, 2]))
    loss.count(torch.tensor([3, 3]))
    loss.count(torch.zeros(0, dtype=torch.long))
    assert loss.counts.tolist() == [2, 0, 1, 3] and loss.counts.dtype == torch.long
    again = SeesawLoss(3)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.counts, loss.counts)
    before = loss.counts.clone()
    loss.loss(torch.randn(2, 5), torch.tensor([0, 1]))  # as for OHEM
    assert torch.equal(loss.counts, before)


def _count(rank, store, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    loss = SeesawLoss(2)
    for classes in ([0, 0, 2], [1]) if rank == 0 else ([2], []):
        loss.count(torch.tensor(classes, dtype=torch.long))
    logits = torch.linspace(-1, 1, 4).expand(3, 4)
    results[rank] = loss.counts.tolist(), loss.loss(logits, torch.arange(3)).tolist()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_count, (str(tmp_path / "store"), results), nprocs=2)
        found = dict(results)
    one = SeesawLoss(2)
    one.count(torch.tensor([0, 0, 2, 2]))
    one.count(torch.tensor([1]))
    values = one.loss(torch.linspace(-1, 1, 4).expand(3, 4), torch.arange(3)).tolist()
    assert found == {rank: (one.counts.tolist(), values) for rank in range(2)}


# Weights and groups


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 1.0])
def test_weights_of_counts(beta):
    """1 / E_n with E_n the sum of beta**i for i < n (proposition 1), as loops."""
    counts = [500, 60, 7, 1]
    raw = [1 / sum(beta**i for i in range(n)) for n in counts]
    mean = sum(n * w for n, w in zip(counts, raw)) / sum(counts)
    expected = [w / mean for w in raw]
    np.testing.assert_allclose(weights_of_counts(counts, beta).numpy(), expected, rtol=1e-9)


def test_inverse_frequency_gives_all_classes_the_same_sum():
    counts = torch.tensor([500, 60, 7, 1])
    products = weights_of_counts(counts.tolist(), 1.0) * counts
    torch.testing.assert_close(products, products[:1].expand(4))


def test_class_groups():
    names = [
        "-" if g < 0 else GROUPS[g][0]
        for g in class_groups([9, 0, 100, 50, 2, 3, 2, 1000]).tolist()
    ]
    # By counts: 2 (two), 3, 9, 50, 100, 1000; seven classes in threes, the first group the largest.
    assert names == ["c", "-", "f", "c", "r", "r", "r", "f"]
    assert class_groups([5, 9]).tolist() == [-1, -1]
    assert class_groups([5, 9, 0]).tolist() == [-1, -1, -1]
    assert class_groups([4, 4, 4]).tolist() == [0, 1, 2]
    assert class_groups([]).tolist() == []


# What is refused


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FocalLoss(K, -1.0), "FOCAL_GAMMA"),
        (lambda: FocalLoss(K, math.inf), "FOCAL_GAMMA"),
        (lambda: SeesawLoss(K, p=-1), "SEESAW_P"),
        (lambda: SeesawLoss(K, q=math.nan), "SEESAW_Q"),
        (lambda: SeesawLoss(K, eps=1.0), "SEESAW_EPS"),
        (lambda: WeightedCrossEntropy(K, [1.0] * 3), "3 class weights.*4 are needed.*or 5"),
        (lambda: WeightedFocalLoss(K, 2.0, [1.0, 1, 1, -1]), "CLASS_WEIGHTS"),
        (lambda: BalancedSoftmax(K, [1, 2]), "CLASS_COUNTS has 2 numbers.*4 are needed"),
        (lambda: BalancedSoftmax(K, [1, 2, 3, -4]), "at least 0"),
        (lambda: weights_of_counts([1, 2], 1.5), "CLASS_WEIGHT_BETA"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "loss", [WeightedCrossEntropy(K), WeightedFocalLoss(K), BalancedSoftmax(K)]
)
def test_without_counts_only_inference_works(loss):
    assert loss.needs_counts and not FocalLoss.needs_counts and not SeesawLoss.needs_counts
    loss.probabilities(torch.randn(2, K + 1))
    with pytest.raises(UserError, match="needs the number of training objects.*MODEL.CLASS_COUNTS"):
        loss.loss(torch.randn(2, K + 1), torch.tensor([0, 4]))


# Degenerate inputs


huge = st.floats(-(2.0**99), 2.0**99, width=32)


@examples
@given(
    st.sampled_from(sorted(MAKE)),
    st.integers(0, 12),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.data(),
)
def test_any_logits(name, number, dtype, data):
    """Finite losses, at least 0, and finite gradients, for empty batches, all background, one
    class, and logits of any size; scores are probabilities."""
    loss = MAKE[name]()
    elements = huge if dtype == torch.float32 else st.floats(-60000, 60000, width=32)
    logits = data.draw(hnp.arrays(np.float32, (number, loss.num_logits), elements=elements))
    classes = data.draw(hnp.arrays(np.int64, number, elements=st.integers(0, K)))
    if data.draw(st.booleans()):
        classes[:] = K
    z = torch.from_numpy(logits).to(dtype).requires_grad_()
    values = loss.loss(z, torch.from_numpy(classes))
    assert values.shape == (number,) and values.dtype == torch.float32
    assert torch.isfinite(values).all() and (values >= -1e-5).all()
    values.sum().backward()
    assert torch.isfinite(z.grad).all()
    scores = loss.probabilities(z)
    assert scores.shape == (number, K + 1) and ((scores >= 0) & (scores <= 1)).all()
    assert torch.allclose(scores.sum(dim=1), torch.ones(number), atol=1e-3)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
def test_focal_loss_of_a_certain_prediction(gamma):
    logits = torch.tensor([[1e3, 0.0, 0, 0, 0]], requires_grad=True)
    loss = FocalLoss(K, gamma).loss(logits, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == 0 and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", MAKE)
def test_in_mixed_precision(name):
    """As the float32 loss of the same rounded logits."""
    loss = MAKE[name]()
    layer = torch.nn.Linear(8, loss.num_logits)
    x, classes = torch.randn(5, 8), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(x)
        value = loss.loss(logits, classes)
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    torch.testing.assert_close(value, loss.loss(logits.float(), classes))
    value.sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_a_loss_without_parameters():
    assert ClassLoss.from_config(None, 3, [1, 2, 3]) == {"num_classes": 3}
    assert not list(ClassLoss(3).buffers())
