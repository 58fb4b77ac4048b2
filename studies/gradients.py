#!/usr/bin/env python3
"""Measure the gradients that trained weights would get in further iterations.

Prints three tables: the norm of each loss's gradient on the backbone and its pyramid, with the
share of parameters that would be clipped; the share of the box loss's gradient that comes from
inliers, for each box loss (the question of Libra R-CNN, section 3.3); and the pyramid levels from
which the RoI heads pool.
"""

import argparse
import sys
from collections import defaultdict
from itertools import chain
from typing import Callable, Dict, List, NamedTuple, Sequence

# First, so that importing Detectron2 is quiet.
from balanced_d2.analysis.sampling import check_samples_proposals
from balanced_d2.config.checks import check_weights
from balanced_d2.data.loader import TrainLoader
from balanced_d2.engine import (
    add_model_arguments,
    build_predictor,
    config_from,
    prepare_datasets,
)
from balanced_d2.layers.balanced_l1 import balanced_l1_loss
from balanced_d2.utils.errors import UserError, report_user_errors
from balanced_d2.utils.randomness import seed_all

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import smooth_l1_loss
from tqdm import tqdm

from studies.table import as_markdown_row

# Identifies the random numbers of this program; each use of a seed has its own number.
GRADIENT_SEEDS = 5
BOX_LOSSES: Dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "smooth L1, beta 1": lambda x: smooth_l1_loss(x, torch.zeros_like(x), beta=1.0),
    "L1": torch.abs,
    "Balanced L1": lambda x: balanced_l1_loss(x, torch.zeros_like(x)),
}
"""Box losses as functions of a delta's error, with their default parameters."""


class Measured(NamedTuple):
    norms: Dict[str, List[float]]
    """The norm of the gradient on the backbone in each batch, for each loss and their sum."""
    clipped: List[float]
    """The share of the model's parameter tensors that would be clipped in each batch."""
    errors: torch.Tensor
    """Shape (R, 4): errors of the box deltas of foreground boxes."""
    levels: torch.Tensor
    """Shape (R,): level from which each foreground box is pooled, 0 is the finest."""


def main(args: argparse.Namespace) -> None:
    if args.iterations < 1:
        raise UserError(f"--iterations is {args.iterations}, but has to be at least 1")
    cfg = config_from(args)
    check_samples_proposals(cfg)
    cfg.SEED = max(cfg.SEED, 0)  # the same figures every time
    cfg.DATASETS.TEST = ()
    check_weights(cfg, "measure")
    prepare_datasets(cfg)
    measured = measure(cfg, build_predictor(cfg, "measure").model, args.iterations)
    for table in (
        norm_table(measured),
        inlier_table(measured.errors),
        level_table(cfg, measured),
    ):
        print("\n".join(map(as_markdown_row, table)) + "\n")


def measure(cfg: CfgNode, model: GeneralizedRCNN, num_iterations: int) -> Measured:
    """Run a model on batches of ``DATASETS.TRAIN`` as in training; no weight is changed."""
    model.train()
    shared = [p for p in model.backbone.parameters() if p.requires_grad]
    others = (model.proposal_generator.parameters(), model.roi_heads.parameters())
    trained = [*shared, *(p for p in chain(*others) if p.requires_grad)]
    norms, clipped, errors, levels = defaultdict(list), [], [], []
    loader = TrainLoader(cfg)
    with EventStorage():
        progress = tqdm(range(num_iterations), desc="gradients", unit="batch", disable=None)
        for iteration, batch in zip(progress, loader):
            seed_all(GRADIENT_SEEDS, loader.seed, iteration)
            images = model.preprocess_image(batch)
            targets = [image["instances"].to(model.device) for image in batch]
            features = model.backbone(images.tensor)
            proposals, losses = model.proposal_generator(images, features, targets)
            heads = model.roi_heads
            sampled = heads.label_and_sample_proposals(proposals, targets)
            boxes = [image.proposal_boxes for image in sampled]
            pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
            predictions = heads.box_predictor(heads.box_head(pooled))
            losses.update(heads.box_predictor.losses(predictions, sampled))

            for name, loss in losses.items():
                norms[name].append(_norm(_gradients(loss, shared)))
            of_all = _gradients(sum(losses.values()), trained)
            norms["all"].append(_norm(of_all[: len(shared)]))
            # Detectron2 clips each parameter separately.
            limit = cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
            clipped.append(sum(_norm([g]) > limit for g in of_all) / len(of_all))

            errors.append(_foreground_errors(heads, sampled, predictions[1].detach()))
            levels.append(_foreground_levels(heads, sampled))
    return Measured(norms, clipped, torch.cat(errors), torch.cat(levels))


def _gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _foreground_errors(
    heads: StandardROIHeads, sampled: List[Instances], deltas: torch.Tensor
) -> torch.Tensor:
    """Predicted minus target box deltas, shape (R, 4), for the R foreground samples."""
    deltas = deltas.unflatten(1, (-1, 4))  # one box per class, or one for all classes
    errors = [deltas.new_zeros(0, 4)]
    for image, predicted in zip(sampled, deltas.split([len(image) for image in sampled])):
        is_foreground = image.gt_classes < heads.num_classes
        image, predicted = image[is_foreground], predicted[is_foreground]
        if len(image):
            column = image.gt_classes if predicted.shape[1] > 1 else 0
            target = heads.box_predictor.box2box_transform.get_deltas(
                image.proposal_boxes.tensor, image.gt_boxes.tensor
            )
            errors.append(predicted[torch.arange(len(image)), column] - target)
    return torch.cat(errors).cpu()


def _foreground_levels(heads: StandardROIHeads, sampled: List[Instances]) -> torch.Tensor:
    pooler = heads.box_pooler
    return assign_boxes_to_levels(
        [image.proposal_boxes[image.gt_classes < heads.num_classes] for image in sampled],
        *(pooler.min_level, pooler.max_level),
        *(pooler.canonical_box_size, pooler.canonical_level),
    ).cpu()


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def norm_table(measured: Measured) -> List[List[str]]:
    means = {name: sum(values) / len(values) for name, values in measured.norms.items()}
    total = sum(value for name, value in means.items() if name != "all")
    table = [["loss", "norm of its gradient", "share"], ["---"] * 3]
    table += [
        [name, f"{mean:.3f}", "" if name == "all" else f"{mean / total:.0%}"]
        for name, mean in means.items()
    ]
    cut = sum(measured.clipped) / len(measured.clipped)
    return [*table, ["parameters clipped", "", f"{cut:.1%}"]]


def inlier_shares(errors: torch.Tensor) -> Dict[str, float]:
    """The share of the absolute gradient of each box loss that comes from errors below 1."""
    errors = errors.abs().double()
    inlier = errors < 1
    shares = {}
    for name, loss in BOX_LOSSES.items():
        x = errors.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x).sum(), x)
        shares[name] = float(gradient[inlier].sum() / gradient.sum())
    return shares


def inlier_table(errors: torch.Tensor) -> List[List[str]]:
    table = [["box loss", "of its gradient from inliers (error < 1)"], ["---"] * 2]
    table += [[name, f"{share:.0%}"] for name, share in inlier_shares(errors).items()]
    return [
        *table,
        ["inliers among all", f"{float((errors.abs() < 1).float().mean()):.0%}"],
    ]


def level_table(cfg: CfgNode, measured: Measured) -> List[List[str]]:
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    counts = measured.levels.bincount(minlength=len(names)).tolist()
    shares = [f"{count / max(1, sum(counts)):.1%}" for count in counts]
    return [
        ["", *names],
        ["---"] * (len(names) + 1),
        ["foreground boxes pooled from", *shares],
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations", type=int, default=20, metavar="N", help="batches (default: 20)"
    )
    add_model_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_user_errors(main, parse_args()))
