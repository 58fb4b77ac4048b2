"""The choices of ``DATALOADER.SAMPLER_TRAIN``: Detectron2's samplers of images, seeded.

The weighted samplers of Detectron2's main are built here from repeat factors, so that both versions
have them.
"""

from functools import partial
from typing import Callable, Dict, List

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from torch.utils.data import Sampler

MakeSampler = Callable[[int], Sampler]
"""Returns an endless sampler of indices for a seed."""


def _training(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    return uniform_sampler(len(records))


def _random_subset(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    num_images, ratio = len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO
    return lambda seed: RandomSubsetTrainingSampler(
        num_images, ratio, seed_shuffle=seed, seed_subset=seed
    )


def _repeat_factor(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    return partial(_repeating, _category_factors(cfg, records))


def _weighted(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    return partial(_repeating, _dataset_factors(cfg, _by_dataset(cfg)))


def _weighted_category(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    parts = _by_dataset(cfg)
    factors = torch.cat([_category_factors(cfg, part) for part in parts])
    factors = factors * _dataset_factors(cfg, parts)
    return partial(_repeating, factors / factors.min())


SAMPLERS: Dict[str, Callable[[CfgNode, List[Dict]], MakeSampler]] = {
    "TrainingSampler": _training,
    "RepeatFactorTrainingSampler": _repeat_factor,
    "RandomSubsetTrainingSampler": _random_subset,
    "WeightedTrainingSampler": _weighted,
    "WeightedCategoryTrainingSampler": _weighted_category,
}


def uniform_sampler(num_images: int) -> MakeSampler:
    """A sampler of each image once per epoch, in a random order."""
    return lambda seed: TrainingSampler(num_images, seed=seed)


def load_records(cfg: CfgNode, *names: str) -> List[Dict]:
    """The records of training datasets, as Detectron2 loads and filters them.

    Args:
        *names: all of ``DATASETS.TRAIN``, or one of them, then without its proposals.
    """
    is_whole = names == tuple(cfg.DATASETS.TRAIN)
    return get_detection_dataset_dicts(
        names,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        if cfg.MODEL.KEYPOINT_ON
        else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN
        if cfg.MODEL.LOAD_PROPOSALS and is_whole
        else None,
    )


def _by_dataset(cfg: CfgNode) -> List[List[Dict]]:
    return [load_records(cfg, name) for name in cfg.DATASETS.TRAIN]


def _dataset_factors(cfg: CfgNode, parts: List[List[Dict]]) -> torch.Tensor:
    given = dict(cfg.DATASETS.TRAIN_REPEAT_FACTOR)
    factors = [float(given.get(name, 1)) for name in cfg.DATASETS.TRAIN]
    sizes = torch.tensor([len(part) for part in parts])
    return torch.tensor(factors).repeat_interleave(sizes)


def _category_factors(cfg: CfgNode, records: List[Dict]) -> torch.Tensor:
    """``max(1, sqrt(threshold / frequency))`` of the rarest category in each image (LVIS, appendix
    B.2), or without the square root, which Detectron2 itself supports only on main."""
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, cfg.DATALOADER.REPEAT_THRESHOLD
    )
    return factors if cfg.DATALOADER.REPEAT_SQRT else factors**2


def _repeating(factors: torch.Tensor, seed: int) -> Sampler:
    return RepeatFactorTrainingSampler(factors, seed=seed)
