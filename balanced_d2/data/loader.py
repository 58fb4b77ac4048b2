"""The loader of training data: reproducible, able to go on anywhere, and aware of bad images."""

import itertools
import logging
from collections import defaultdict
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from balanced_d2.data.checks.records import clean
from balanced_d2.utils.errors import StopTraining, UserError, check_choice
from balanced_d2.utils.randomness import seeded

# How samples come by their random numbers; another purpose of the same seed has another number.
SAMPLE_SEEDS = 1


class BadImage(NamedTuple):
    """An image that cannot be trained on."""

    path: str
    reason: str


class TrainLoader:
    """Endless batches of training data, the same ones from the same seed.

    What the batches hold and how their images are augmented depends on the seed and the position of
    the batch only: not on the number of worker processes, and not on whether the batches before it
    have been loaded. So a training that is resumed sees what it would have seen. Several processes
    share the images of a batch, augmented as they would be in one process.

    Args:
        dataset: Detectron2's standard dicts. Boxes that nothing can be learnt from are left out
            (:func:`balanced_d2.data.checks.records.clean`).
        mapper: turns such a dict into what the model takes, e.g. Detectron2's ``DatasetMapper``.
        total_batch_size: number of images that all processes load together for an iteration.
        num_workers: worker processes for loading, of each process; 0: none.
        aspect_ratio_grouping: whether a batch has images of one orientation only, which saves
            padding.
        make_sampler: given the seed, an endless sampler of indices of ``dataset`` for this process.
        seed: at least 0; by default one that all processes have drawn together.
        skip_bad_images: whether an image that cannot be read is replaced by the next one.
        max_bad_images: how many different images each process may skip.

    Raises:
        UserError: if ``total_batch_size`` cannot be divided among the processes.
    """

    @configurable
    def __init__(
        self,
        dataset: List[Dict],
        *,
        mapper: Callable[[Dict], Dict],
        total_batch_size: int,
        num_workers: int = 0,
        aspect_ratio_grouping: bool = True,
        make_sampler: Optional[Callable[[int], Sampler]] = None,
        seed: int = -1,
        skip_bad_images: bool = False,
        max_bad_images: int = 100,
    ):
        num_processes = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % num_processes:
            raise UserError(
                f"the batch size (SOLVER.IMS_PER_BATCH) is {total_batch_size}; it has to be a "
                f"multiple of the number of processes, {num_processes}"
            )
        if len(dataset) == 0:
            raise UserError("there is nothing to train on: the data set is empty")
        # Again, for data sets that are not the project's, whose loaders do not do it.
        dataset = clean("DATASETS.TRAIN", dataset)
        self.batch_size = total_batch_size // num_processes
        self.num_workers = num_workers
        self.groups = [
            aspect_ratio_grouping and r.get("width", 0) > r.get("height", 0) for r in dataset
        ]
        self.samples = _Samples(dataset, mapper, skip_bad_images)
        self.make_sampler = make_sampler or (lambda seed: TrainingSampler(len(dataset), seed=seed))
        self.max_bad_images = max_bad_images
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self.position = 0

    @classmethod
    def from_config(cls, cfg):
        name = cfg.DATALOADER.SAMPLER_TRAIN
        check_choice("DATALOADER.SAMPLER_TRAIN", name, SAMPLERS)
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
            if cfg.MODEL.KEYPOINT_ON
            else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
        return {
            "dataset": dataset,
            "mapper": DatasetMapper(cfg, is_train=True),
            "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
            "num_workers": cfg.DATALOADER.NUM_WORKERS,
            "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            "make_sampler": lambda seed: SAMPLERS[name](cfg, dataset, seed),
            "seed": cfg.SEED,
            "skip_bad_images": cfg.DATALOADER.SKIP_BAD_IMAGES,
            "max_bad_images": cfg.DATALOADER.MAX_BAD_IMAGES,
        }

    def state_dict(self) -> Dict[str, int]:
        """The seed, and how many batches have been given out."""
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """To be called before the first batch is asked for."""
        self.seed, self.position = state["seed"], state["position"]

    def __iter__(self) -> Iterator[List[Dict]]:
        loader = DataLoader(
            self.samples,
            batch_sampler=_Batches(
                self.make_sampler(self.seed), self.groups, self.batch_size, self.seed, self.position
            ),
            num_workers=self.num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # or it draws from the one that the model draws from
        )
        skipped: Set[BadImage] = set()
        for batch in loader:
            for _, bad_images in batch:
                self._report(bad_images, skipped)
            self.position += 1
            yield [sample for sample, _ in batch]

    def _report(self, bad_images: Sequence[BadImage], skipped: Set[BadImage]) -> None:
        for bad in bad_images:
            if bad in skipped:
                continue
            message = f"cannot train on the image {bad.path}: {bad.reason}"
            if not self.samples.skip_bad_images:
                raise StopTraining(
                    f"{message}; mend or remove it, or skip such images with "
                    "DATALOADER.SKIP_BAD_IMAGES True"
                )
            skipped.add(bad)
            logging.getLogger(__name__).warning(
                f"{message}; skipped ({len(skipped)} of at most {self.max_bad_images})"
            )
            if len(skipped) > self.max_bad_images:
                raise StopTraining(
                    f"more than {self.max_bad_images} images cannot be read "
                    f"(DATALOADER.MAX_BAD_IMAGES), the last one {bad.path}: {bad.reason}"
                )


SAMPLERS = {
    "TrainingSampler": lambda cfg, dataset, seed: TrainingSampler(len(dataset), seed=seed),
    "RepeatFactorTrainingSampler": lambda cfg, dataset, seed: RepeatFactorTrainingSampler(
        RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD
        ),
        seed=seed,
    ),
    "RandomSubsetTrainingSampler": lambda cfg, dataset, seed: RandomSubsetTrainingSampler(
        len(dataset), cfg.DATALOADER.RANDOM_SUBSET_RATIO, seed_shuffle=seed, seed_subset=seed
    ),
}


class _Batches(Sampler):
    """The batches from a position on, each a list of (key of the random numbers, index)."""

    def __init__(self, sampler, groups: Sequence[bool], batch_size: int, seed: int, position: int):
        self.sampler, self.groups, self.batch_size = sampler, groups, batch_size
        self.seed, self.position = seed, position

    def __iter__(self) -> Iterator[List[Tuple[Tuple[int, ...], int]]]:
        waiting: Dict[bool, List] = defaultdict(list)
        num_batches = 0
        # Of the stream of images that the samplers of all processes take turns in.
        numbers = itertools.count(comm.get_rank(), comm.get_world_size())
        for number, index in zip(numbers, self.sampler):
            group = waiting[self.groups[index]]
            group.append(((SAMPLE_SEEDS, self.seed, number), index))
            if len(group) == self.batch_size:
                num_batches += 1
                if num_batches > self.position:  # those before have only been counted
                    yield group[:]
                group.clear()


class _Samples(Dataset):
    """Loaded and augmented images: (sample, the bad images that it stands in for)."""

    def __init__(self, dataset: List[Dict], mapper: Callable, skip_bad_images: bool):
        self.records = DatasetFromList(dataset, copy=True)
        self.mapper = mapper
        self.skip_bad_images = skip_bad_images

    def __getitem__(self, key_and_index) -> Tuple[Optional[Dict], List[BadImage]]:
        key, index = key_and_index
        bad_images = []
        with seeded(*key):
            for offset in range(len(self.records)):
                record = self.records[(index + offset) % len(self.records)]
                path = record.get("file_name", "without a file name")
                try:
                    sample = self.mapper(record)
                except (OSError, SizeMismatchError, SyntaxError) as error:
                    # Pillow calls a broken PNG a SyntaxError
                    reason = " ".join(str(error).split()) or type(error).__name__
                    bad_images.append(BadImage(path, reason))
                    if not self.skip_bad_images:
                        return None, bad_images
                    continue
                if sample is not None:  # a mapper may turn an image down
                    return sample, bad_images
        return None, [*bad_images, BadImage("(every one)", "the mapper returns none of them")]
