"""The negatives that the RoI heads would train on, with each negative sampler."""

from typing import Dict, List, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from balanced_d2.data.loader import TrainLoader
from balanced_d2.layers.sampling import NEGATIVE_SAMPLERS
from balanced_d2.modeling.balanced_sampling import BalancedSamplingMixin
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.randomness import seed_all

HARD_IOU = 0.05
"""Negatives above this are called hard, as in the paper's figure 3."""
# Identifies the random numbers drawn here; each use of a seed has its own number.
SAMPLING_SEEDS = 3


class Negatives(NamedTuple):
    """Proposals that are background, those of all images together."""

    ious: np.ndarray
    """Float (N,), the largest IoU with ground truth."""
    sizes: np.ndarray
    """Float (N,), square root of the area, in pixels of the network's input."""

    @property
    def hard(self) -> float:
        """The share with an IoU above :data:`HARD_IOU`, 0 if there are none."""
        return float((self.ious > HARD_IOU).mean()) if len(self.ious) else 0.0


class SampledNegatives(NamedTuple):
    available: Negatives
    """All to choose from."""
    sampled: Dict[str, Negatives]
    """What each sampler takes, by its name."""
    bin_edges: np.ndarray
    """Shape (num_bins + 1,), edges of the bins of IoU-balanced sampling."""
    num_images: int
    """Number of images that the proposals are from."""


class _ProposalSampler(BalancedSamplingMixin, ROIHeads):
    """The sampling part of RoI heads, without layers."""


def check_samples_proposals(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a config's model is not a two-stage detector with an RPN."""
    model = cfg.MODEL
    is_two_stage = issubclass(META_ARCH_REGISTRY.get(model.META_ARCHITECTURE), GeneralizedRCNN)
    if not is_two_stage or model.LOAD_PROPOSALS:
        raise UserError(
            f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE} does not sample proposals of an "
            "RPN of its own; only two-stage detectors such as Faster R-CNN do"
        )


def sample_negatives(cfg: CfgNode, model: GeneralizedRCNN, num_iterations: int) -> SampledNegatives:
    """Sample from a model's proposals on training data, with every negative sampler in turn that
    needs no losses.

    All samplers get the same proposals, made as in training: from augmented images of
    ``DATASETS.TRAIN``, with batch statistics and the number of proposals that ``MODEL.RPN`` sets
    for training. Weights do not change, but the running statistics of batch normalisation do.

    Args:
        cfg: the model's config. ``SEED`` makes the result reproducible.
        model: the model of ``cfg``, with trained weights; see :func:`check_samples_proposals`.
        num_iterations: number of batches.
    """
    samplers = {
        name: _sampler(cfg, name)
        for name, sampler in NEGATIVE_SAMPLERS
        if not getattr(sampler, "needs_losses", False)
    }
    everything = _sampler(cfg, "random")
    everything.batch_size_per_image = int(1e9)
    found: Dict[str, List[Negatives]] = {name: [] for name in (*samplers, "available")}
    loader = TrainLoader(cfg)
    was_training = model.training
    model.train()
    num_images = 0
    with torch.no_grad(), EventStorage():
        progress = tqdm(range(num_iterations), desc="sampling", unit="batch", disable=None)
        for iteration, batch in zip(progress, loader):
            seed_all(SAMPLING_SEEDS, loader.seed, iteration)
            targets = [image["instances"].to(model.device) for image in batch]
            images = model.preprocess_image(batch)
            features = model.backbone(images.tensor)
            proposals, _ = model.proposal_generator(images, features, targets)
            for name, sampler in (*samplers.items(), ("available", everything)):
                sampled = sampler.label_and_sample_proposals(proposals, targets)
                found[name] += [
                    _negatives_of(*image, background=sampler.num_classes)
                    for image in zip(sampled, targets)
                ]
            num_images += len(batch)
    model.train(was_training)
    joined = {name: Negatives(*map(np.concatenate, zip(*parts))) for name, parts in found.items()}
    low, high = everything.iou_range
    return SampledNegatives(
        available=joined.pop("available"),
        sampled=joined,
        bin_edges=np.linspace(low, high, everything.num_bins + 1),
        num_images=num_images,
    )


def _sampler(cfg: CfgNode, negative_sampler: str) -> _ProposalSampler:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NEGATIVE_SAMPLER = negative_sampler
    return _ProposalSampler(cfg)


def _negatives_of(sampled: Instances, targets: Instances, background: int) -> Negatives:
    boxes = sampled[sampled.gt_classes == background].proposal_boxes
    if len(targets):
        ious = pairwise_iou(boxes, targets.gt_boxes).max(dim=1).values.cpu().numpy()
    else:
        ious = np.zeros(len(boxes))
    return Negatives(ious, boxes.area().sqrt().cpu().numpy())
