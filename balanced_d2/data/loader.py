"""The loader of training data: reproducible, resumable anywhere, and able to skip bad images."""

import logging
from collections import defaultdict
from typing import (
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from balanced_d2.data.checks.records import clean
from balanced_d2.data.classes import num_classes_key
from balanced_d2.data.image import ImageError
from balanced_d2.data.mapper import ImageMapper
from balanced_d2.data.train_samplers import SAMPLERS, MakeSampler, load_records, uniform_sampler
from balanced_d2.utils.errors import StopTraining, UserError, check_choice
from balanced_d2.utils.randomness import seeded

# Identifies the random numbers of samples; each use of a seed has its own number.
SAMPLE_SEEDS = 1

Batch = List[Tuple[Tuple[int, ...], int]]
"""For each image, the key of its random numbers and its index."""


class BadImage(NamedTuple):
    """An image that cannot be trained on."""

    path: str
    reason: str


class TrainLoader:
    """Endless batches of training data, always the same for the same seed.

    The content of a batch and the augmentation of its images depend only on the seed and the
    position of the batch: not on the number of worker processes, and not on whether earlier batches
    have been loaded. A resumed run therefore sees the same images as an uninterrupted one. Several
    processes divide the images of a batch among them; together they see what one process would.

    Args:
        dataset: Detectron2's standard dicts. Boxes that nothing can be learnt from are left out
            (:func:`balanced_d2.data.checks.records.clean`).
        mapper: turns such a dict into the model's input, e.g. Detectron2's ``DatasetMapper``.
        total_batch_size: number of images per iteration, for all processes together.
        num_workers: number of worker processes for loading, for each process; 0 for none.
        aspect_ratio_grouping: whether all images of a batch have the same orientation, which saves
            padding.
        make_sampler: returns, for a seed, an endless sampler of indices of ``dataset``, the same in
            all processes. Detectron2's samplers return the share of one process; here, all their
            indices are used.
        seed: at least 0; by default one that all processes agree on.
        skip_bad_images: whether an image that cannot be read is replaced by the next one.
        max_bad_images: how many different images each process may skip.
        num_classes: the model's number of classes, a limit for the classes that the mapper returns;
            None for no limit.

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
        make_sampler: Optional[MakeSampler] = None,
        seed: int = -1,
        skip_bad_images: bool = False,
        max_bad_images: int = 100,
        num_classes: Optional[int] = None,
    ):
        num_processes = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % num_processes:
            raise UserError(
                f"the batch size (SOLVER.IMS_PER_BATCH) is {total_batch_size}; it has to be a "
                f"multiple of the number of processes, {num_processes}"
            )
        if len(dataset) == 0:
            raise UserError("there is nothing to train on: the dataset is empty")
        # Done here for other projects' datasets, whose loaders do not do it.
        dataset = clean("DATASETS.TRAIN", dataset)
        self.batch_size = total_batch_size
        self.num_workers = num_workers
        self.groups = [
            aspect_ratio_grouping and r.get("width", 0) > r.get("height", 0) for r in dataset
        ]
        self.samples = _Samples(dataset, mapper, skip_bad_images)
        self.make_sampler = make_sampler or uniform_sampler(len(dataset))
        self.max_bad_images = max_bad_images
        self.num_classes = num_classes
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self.position = 0

    @classmethod
    def from_config(cls, cfg):
        name = cfg.DATALOADER.SAMPLER_TRAIN
        check_choice("DATALOADER.SAMPLER_TRAIN", name, SAMPLERS)
        dataset = load_records(cfg, *cfg.DATASETS.TRAIN)
        return {
            "dataset": dataset,
            "mapper": ImageMapper(cfg, is_train=True),
            "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
            "num_workers": cfg.DATALOADER.NUM_WORKERS,
            "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            "make_sampler": SAMPLERS[name](cfg, dataset),
            "seed": cfg.SEED,
            "skip_bad_images": cfg.DATALOADER.SKIP_BAD_IMAGES,
            "max_bad_images": cfg.DATALOADER.MAX_BAD_IMAGES,
            "num_classes": num_classes_key(cfg)[1],
        }

    def state_dict(self) -> Dict[str, int]:
        """The seed, the number of batches that have been returned, and that of the images."""
        num_images = len(self.samples.records)
        return {"seed": self.seed, "position": self.position, "num_images": num_images}

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """Continue from a state. Call this before taking the first batch."""
        self.seed, self.position = state["seed"], state["position"]
        num_images = len(self.samples.records)
        before = state.get("num_images", num_images)
        if before != num_images:
            logging.getLogger(__name__).warning(
                f"the training data had {before} images, and now have {num_images}: from here on "
                "the images come in another order"
            )

    def last_batch(self) -> List[str]:
        """The image files of the last batch that was returned, for all processes."""
        batch = next(self._batches(self.position - 1))
        return [self.samples.records[index].get("file_name", "?") for _, index in batch]

    def _batches(self, position: int) -> Iterator[Batch]:
        return _batches(
            self.make_sampler(self.seed), self.groups, self.batch_size, self.seed, position
        )

    def __iter__(self) -> Iterator[List[Dict]]:
        rank, num_processes = comm.get_rank(), comm.get_world_size()
        loader = DataLoader(
            self.samples,
            batch_sampler=(b[rank::num_processes] for b in self._batches(self.position)),
            num_workers=self.num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # otherwise it would draw from the model's
        )
        skipped: Set[BadImage] = set()
        for batch in loader:
            for sample, bad_images in batch:
                self._report(bad_images, skipped)
                if sample is None:
                    why = "the mapper rejects every one"
                    if bad_images:
                        why = f"such as {bad_images[0].path}: {bad_images[0].reason}"
                    number = len(self.samples.records)
                    raise StopTraining(f"none of the {number} images can be trained on: {why}")
                self._check_classes(sample)
            self.position += 1
            yield [sample for sample, _ in batch]

    def _check_classes(self, sample: Dict) -> None:
        # Detectron2 would silently take the class after the last one for background.
        classes = getattr(sample.get("instances"), "gt_classes", None)
        if self.num_classes is None or classes is None or len(classes) == 0:
            return
        if not 0 <= classes.min() <= classes.max() < self.num_classes:
            raise StopTraining(
                f"an object in {sample.get('file_name', 'an image')} has class "
                f"{int(classes.max())}, but the model has {self.num_classes} classes, counted from "
                "0: change its number of classes, or let the mapper change the classes"
            )

    def _report(self, bad_images: Sequence[BadImage], skipped: Set[BadImage]) -> None:
        for bad in bad_images:
            if bad in skipped:
                continue
            message = f"cannot train on the image {bad.path}: {bad.reason}"
            if not self.samples.skip_bad_images:
                raise StopTraining(
                    f"{message}; fix or remove it, or skip such images with "
                    "DATALOADER.SKIP_BAD_IMAGES True"
                )
            skipped.add(bad)
            logging.getLogger(__name__).warning(
                f"{message}; skipped ({len(skipped)} of at most {self.max_bad_images})"
            )
            if len(skipped) > self.max_bad_images:
                raise StopTraining(
                    f"more than {self.max_bad_images} images cannot be read "
                    f"(DATALOADER.MAX_BAD_IMAGES), the last one is {bad.path}: {bad.reason}"
                )


def _batches(
    sampler: Sampler, groups: Sequence[bool], batch_size: int, seed: int, position: int
) -> Iterator[Batch]:
    """The batches of all processes together, starting at a position."""
    waiting: Dict[bool, Batch] = defaultdict(list)
    num_batches = 0
    # Detectron2's samplers iterate over the share of one process; these are all indices.
    indices = getattr(sampler, "_infinite_indices", sampler.__iter__)()
    for number, index in enumerate(indices):
        group = waiting[groups[index]]
        group.append(((SAMPLE_SEEDS, seed, number), index))
        if len(group) == batch_size:
            num_batches += 1
            if num_batches > position:  # earlier ones are only counted
                yield group[:]
            group.clear()


class _Samples(Dataset):
    """Loaded and augmented images: (sample, the bad images that it replaces)."""

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
                except (ImageError, OSError, SizeMismatchError, SyntaxError) as error:
                    # Pillow raises SyntaxError for a broken PNG.
                    reason = " ".join(str(error).split()) or type(error).__name__
                    reason = reason.removeprefix(f"cannot read the image {path}: ")
                    bad_images.append(BadImage(path, reason))
                    if not self.skip_bad_images:
                        return None, bad_images
                    continue
                if sample is not None:  # a mapper may reject an image
                    return sample, bad_images
        return None, bad_images
