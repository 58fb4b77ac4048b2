"""What only a GPU shows. Skipped where there is none."""

import warnings

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from balanced_d2.modeling import (
    BalancedSamplingMixin,
    FeatureBalancer,
    balanced_l1_loss,
    sample_instance_balanced,
    sample_iou_balanced,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def pyramid(dtype):
    sizes = [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]
    return [torch.randn(2, 32, *size, device="cuda", dtype=dtype) for size in sizes]


@pytest.fixture
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_iou_balanced_sampling_does_not_synchronise(no_synchronisation):
    sample_iou_balanced(0.5 * torch.rand(2000, device="cuda"), 512)


def test_balancing_and_loss_do_not_synchronise(no_synchronisation):
    balancer = FeatureBalancer(32).cuda()
    loss = sum(x.sum() for x in balancer(pyramid(torch.float32)))
    loss = loss + balanced_l1_loss(
        torch.randn(9, 4, device="cuda"), torch.zeros(9, 4, device="cuda"), reduction="sum"
    )
    loss.backward()


def test_heads_synchronise_no_more_than_detectron2s():
    def synchronisations(cls, **arguments):
        heads = cls(
            num_classes=4,
            batch_size_per_image=64,
            positive_fraction=0.25,
            proposal_matcher=Matcher([0.5], [0, 1]),
            **arguments,
        )
        proposals, targets = Instances((99, 99)), Instances((99, 99))
        corners = torch.rand(400, 2, device="cuda") * 50
        proposals.proposal_boxes = Boxes(torch.cat([corners, corners + 30], dim=1))
        proposals.objectness_logits = torch.zeros(400, device="cuda")
        targets.gt_boxes = Boxes(torch.tensor([[20.0, 20, 50, 50]], device="cuda"))
        targets.gt_classes = torch.tensor([1], device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with EventStorage(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                heads.label_and_sample_proposals([proposals], [targets])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    class Balanced(BalancedSamplingMixin, ROIHeads):
        pass

    assert synchronisations(Balanced) <= synchronisations(ROIHeads)


def test_instance_balanced_sampling():
    groups = torch.randint(9, (2000,), device="cuda")
    assert len(set(sample_instance_balanced(groups, 512).tolist())) == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balancing_equals_the_cpu(dtype):
    torch.manual_seed(0)
    balancer = FeatureBalancer(32).cuda()
    torch.nn.init.normal_(balancer.refine.conv_out.weight, std=0.1)
    features = pyramid(torch.float32)
    with torch.no_grad():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            got = balancer(features)
        expected = balancer.cpu()([x.cpu() for x in features])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.float().cpu(), b, rtol=tolerance, atol=tolerance)
