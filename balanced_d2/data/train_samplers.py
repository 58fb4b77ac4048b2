"""The choices of ``DATALOADER.SAMPLER_TRAIN``: seeded samplers of images.

Detectron2's, and one of this project.

The weighted samplers of Detectron2's main are built here from repeat factors, so that both versions
have them.
"""

from functools import partial
from typing import Callable, Dict, Iterator, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from torch.utils.data import Sampler

from balanced_d2.utils.errors import UserError

MakeSampler = Callable[[int], Sampler]
"""Returns an endless sampler of indices for a seed."""


def _training(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    return uniform_sampler(len(records))


def _random_subset(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    num_images, ratio = len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if int(num_images * ratio) < 1:
        raise UserError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio:g}, which is less than one of the "
            f"{num_images} training images: choose a larger one"
        )
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


def _uniform_class(cfg: CfgNode, records: List[Dict]) -> MakeSampler:
    return partial(UniformClassTrainingSampler, images_of_classes(records))


SAMPLERS: Dict[str, Callable[[CfgNode, List[Dict]], MakeSampler]] = {
    "TrainingSampler": _training,
    "RepeatFactorTrainingSampler": _repeat_factor,
    "RandomSubsetTrainingSampler": _random_subset,
    "WeightedTrainingSampler": _weighted,
    "WeightedCategoryTrainingSampler": _weighted_category,
    "UniformClassTrainingSampler": _uniform_class,
}


class UniformClassTrainingSampler(Sampler):
    """Each class equally often, by an image that has it: class-aware sampling (Shen et al., ECCV
    2016, section 3.3).

    The classes come in a random order, again and again in a new one, and so do the images of each
    class. An image that has several classes comes more often; one without objects never does.

    Args:
        images: the indices of the images of each class.
        seed: of the order.

    Raises:
        UserError: if there are none.
    """

    def __init__(self, images: Sequence[Sequence[int]], seed: int):
        self.images = [list(of_class) for of_class in images if len(of_class)]
        if not self.images:
            raise UserError(
                "DATALOADER.SAMPLER_TRAIN UniformClassTrainingSampler: no image has an object"
            )
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed)
        waiting: List[List[int]] = [[] for _ in self.images]
        while True:
            for k in torch.randperm(len(self.images), generator=generator).tolist():
                if not waiting[k]:
                    order = torch.randperm(len(self.images[k]), generator=generator).tolist()
                    waiting[k] = [self.images[k][i] for i in order]
                yield waiting[k].pop()


def images_of_classes(records: List[Dict]) -> List[List[int]]:
    """The indices of the records that have each class, of the classes that occur."""
    images: Dict[int, List[int]] = {}
    for index, record in enumerate(records):
        classes = {
            a["category_id"] for a in record.get("annotations", ()) if not a.get("iscrowd", 0)
        }
        for category in sorted(classes):
            images.setdefault(category, []).append(index)
    return [images[category] for category in sorted(images)]


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
