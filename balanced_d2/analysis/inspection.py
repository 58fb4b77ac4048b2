"""All figures about datasets for one model's config, and what follows from them."""

from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
from detectron2.config import CfgNode

from balanced_d2.analysis.dataset import (
    Counts,
    Data,
    count,
    largest_overlaps,
    read_data,
    spread_in_images,
)
from balanced_d2.analysis.images import Look, Twins, find_twins
from balanced_d2.analysis.levels import (
    Levels,
    even_canonical_size,
    evenness,
    input_sizes,
    is_retinanet,
    levels_of,
)
from balanced_d2.analysis.sampling import HARD_IOU, SampledNegatives
from balanced_d2.data.checks.records import Finding
from balanced_d2.data.class_balance import repeat_threshold

# From here on, an advice is worth its line.
SMALL_SHARE = 0.05
"""Fewer boxes than this on a level, and it is hardly used."""
LARGE_SHARE = 0.9
"""More boxes than this on one level, and there is hardly an imbalance between levels."""
TINY = 0.5
"""A square of less than this times the smallest anchor has an IoU below 0.25 with every anchor."""
RARE = 2
"""A class in this many times fewer images than the average class is rare."""
FEW_BOXES = 20
"""AP of a class with fewer boxes than this changes by points with a single box."""
LARGE_SPREAD = 2
"""Boxes of one image differ this many times in size, and so in their number of positives."""


class Advice(NamedTuple):
    """A sentence, and the figure that it rests on."""

    figure: str
    text: str

    def __str__(self) -> str:
        return f"{self.figure}: {self.text}"


class Inspection(NamedTuple):
    """The result of :func:`inspect`; the first split is taken for the training data."""

    data: Data
    findings: Dict[str, List[Finding]]
    """By split, without those that are empty."""
    counts: Counts
    levels: Levels
    min_size: int
    """``INPUT.MIN_SIZE_TEST``, for which the sizes are."""
    sizes: np.ndarray
    """Float (N,), size of each box as the network sees it: square root of the area, in pixels."""
    overlaps: np.ndarray
    """Float (N,), largest IoU with another box of the image."""
    class_overlaps: np.ndarray
    """Float (N,), the same with boxes of the same class only."""
    twins: Optional[Twins]
    """Duplicates, if the images were opened."""
    negatives: Optional[SampledNegatives]
    """Of a model on the training data, if there is one."""
    advice: List[Advice]


def inspect(
    cfg: CfgNode,
    records: Mapping[str, List[Dict]],
    findings: Mapping[str, Sequence[Finding]],
    looks: Optional[Sequence[Look]] = None,
    negatives: Optional[SampledNegatives] = None,
) -> Inspection:
    """Compute everything that is known about datasets without opening an image.

    Args:
        cfg: the config that is to be trained with the data.
        records: see :func:`balanced_d2.analysis.dataset.read_data`.
        findings: of the data check, by dataset.
        looks: what opening the images has shown, for all records in their order.
        negatives: see :func:`balanced_d2.analysis.sampling.sample_negatives`.

    Raises:
        UserError: as :func:`balanced_d2.analysis.dataset.read_data`.
    """
    data = read_data(records)
    overlaps, class_overlaps = largest_overlaps(data)
    inspection = Inspection(
        data=data,
        findings={name: list(of_split) for name, of_split in findings.items() if of_split},
        counts=count(data),
        levels=levels_of(cfg),
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        sizes=input_sizes(cfg, data),
        overlaps=overlaps,
        class_overlaps=class_overlaps,
        twins=find_twins([look.hash for look in looks], data.image_splits) if looks else None,
        negatives=negatives,
        advice=[],
    )
    return inspection._replace(advice=advise(cfg, inspection))


def repeat_factors(class_images: np.ndarray, num_images: int, threshold: float) -> np.ndarray:
    """How often repeat-factor sampling shows the images of each class (LVIS, appendix B.2).

    Args:
        class_images: int (K,), images that have each class.
        num_images: number of all images that training uses.

    Returns:
        Float (K,), 1 for classes that do not occur. An image is shown by the largest factor of its
        classes.
    """
    factors = np.maximum(1, np.sqrt(threshold * num_images / np.maximum(class_images, 1)))
    return np.where(class_images > 0, factors, 1)


def advise(cfg: CfgNode, found: Inspection) -> List[Advice]:
    """What follows from the figures; nothing where they are unremarkable."""
    advice: List[Advice] = []
    for rule in (
        *(_missing_classes, _rare_classes, _few_boxes, _empty_images, _duplicates),
        *(_levels, _tiny_boxes, _crowding, _many_boxes, _feature_balance, _positives, _negatives),
    ):
        advice += rule(cfg, found)
    return advice


def _missing_classes(cfg: CfgNode, found: Inspection) -> List[Advice]:
    boxes = found.counts.class_boxes
    advice = []
    for split, name in enumerate(found.data.splits):
        missing = [found.data.classes[k] for k in np.flatnonzero(boxes[split] == 0)]
        if missing and boxes[split].any():
            figure = f"{name} has no box of {_several(missing)}"
            text = "they cannot be learnt" if split == 0 else "their AP cannot be measured"
            if len(missing) == 1:
                text = text.replace("they", "it").replace("their", "its")
            advice.append(Advice(figure, f"{text}; move images between the splits, or add some"))
    return advice


def _rare_classes(cfg: CfgNode, found: Inspection) -> List[Advice]:
    images = found.counts.class_images[0]
    used = np.flatnonzero(images)
    if len(used) < 2:
        return []
    rarest = used[images[used].argmin()]
    mean = float(images[used].mean())
    by_class = ("RepeatFactorTrainingSampler", "UniformClassTrainingSampler")
    if images[rarest] * RARE > mean or cfg.DATALOADER.SAMPLER_TRAIN in by_class:
        return []
    num_images = found.counts.images[0]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        num_images -= found.counts.empty[0]
    threshold = repeat_threshold(images[used], num_images)
    factors = repeat_factors(images, num_images, threshold)
    figure = (
        f"The class in the fewest images, {found.data.classes[rarest]}, is in "
        f"{images[rarest]:,} of {found.counts.images[0]:,} training images, the average class in "
        f"{mean:,.0f}"
    )
    # In this order, because that is what the study of docs/imbalance.md found.
    text = (
        "DATALOADER.SAMPLER_TRAIN UniformClassTrainingSampler shows it in one of "
        f"{len(used)} images at least, RepeatFactorTrainingSampler with "
        f"DATALOADER.REPEAT_THRESHOLD {threshold:g} its images {factors[rarest]:.1f} times as "
        "often; docs/imbalance.md has what they gained, and other ways"
    )
    return [Advice(figure, text)]


def _few_boxes(cfg: CfgNode, found: Inspection) -> List[Advice]:
    advice = []
    for split, name in enumerate(found.data.splits[1:], 1):
        boxes = found.counts.class_boxes[split]
        few = np.flatnonzero((boxes > 0) & (boxes < FEW_BOXES))
        if len(few):
            names = [f"{found.data.classes[k]} ({boxes[k]})" for k in few[np.argsort(boxes[few])]]
            figure = f"{name} has fewer than {FEW_BOXES} boxes of {_several(names)}"
            advice.append(Advice(figure, "read the AP of the class as a rough number; add images"))
    return advice


def _empty_images(cfg: CfgNode, found: Inspection) -> List[Advice]:
    empty, images = found.counts.empty[0], found.counts.images[0]
    if empty < 0.01 * images or not empty or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        return []
    figure = f"{empty:,} of {images:,} training images ({_percent(empty / images)}) have no box"
    text = (
        "training leaves them out; if they show what must not be detected, set "
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
    )
    return [Advice(figure, text)]


def _duplicates(cfg: CfgNode, found: Inspection) -> List[Advice]:
    if found.twins is None:
        return []
    advice = []
    splits = found.data.image_splits
    for split, name in enumerate(found.data.splits[1:], 1):
        of_split = splits == split
        copies = int((found.twins.elsewhere[of_split] >= 0).sum())
        if copies:
            share = _percent(copies / of_split.sum())
            images = f"{copies:,} of {of_split.sum():,} images of {name} ({share})"
            figure = f"{images} are nearly the same as one of another split"
            text = "AP on copies says nothing about new images; remove them from one of the splits"
            advice.append(Advice(figure, text))
    repeated = int((found.twins.within[splits == 0] >= 0).sum())
    if repeated > SMALL_SHARE * found.counts.images[0]:
        figure = f"{repeated:,} of {found.counts.images[0]:,} training images resemble another one"
        text = "they count as one or two, such as frames of a video; split by video, not by image"
        advice.append(Advice(figure, text))
    return advice


def _of_training(found: Inspection, values: np.ndarray) -> np.ndarray:
    return values[found.data.box_splits == 0]


def _levels(cfg: CfgNode, found: Inspection) -> List[Advice]:
    sizes = _of_training(found, found.sizes)
    if is_retinanet(cfg) or len(found.levels.names) < 2 or not len(sizes):
        return []
    shares = found.levels.shares(sizes)
    best, even = even_canonical_size(cfg, sizes)
    unused = [name for name, share in zip(found.levels.names, shares) if share < SMALL_SHARE]
    # A size that is nearly as good is left alone.
    if not unused or evenness(even) < evenness(shares) + 0.1:
        return []
    figure = (
        f"At {found.min_size} pixels, the levels {', '.join(found.levels.names)} get "
        f"{_percents(shares)} of the training boxes"
    )
    text = (
        f"with MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE {best} (it is "
        f"{cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE}) they get {_percents(even)}"
    )
    return [Advice(figure, text)]


def _tiny_boxes(cfg: CfgNode, found: Inspection) -> List[Advice]:
    sizes = _of_training(found, found.sizes)
    smallest = min(size for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in level)
    share = float((sizes < TINY * smallest).mean()) if len(sizes) else 0.0
    if share < SMALL_SHARE:
        return []
    figure = (
        f"{_percent(share)} of the training boxes are smaller than {TINY * smallest:g} pixels at "
        f"{found.min_size}, half of the smallest anchor"
    )
    text = (
        "no anchor fits them; raise INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST, or halve "
        "MODEL.ANCHOR_GENERATOR.SIZES"
    )
    return [Advice(figure, text)]


def _crowding(cfg: CfgNode, found: Inspection) -> List[Advice]:
    node = cfg.MODEL.RETINANET if is_retinanet(cfg) else cfg.MODEL.ROI_HEADS
    key = "MODEL.RETINANET" if is_retinanet(cfg) else "MODEL.ROI_HEADS"
    overlaps = found.class_overlaps
    share = float((overlaps > node.NMS_THRESH_TEST).mean()) if len(overlaps) else 0.0
    if share < 0.01:
        return []
    figure = (
        f"{_percent(share)} of the boxes overlap one of their class by an IoU above "
        f"{node.NMS_THRESH_TEST:g}"
    )
    text = (
        f"non-maximum suppression keeps one of two such boxes; raise {key}.NMS_THRESH_TEST, and "
        "check for boxes that were drawn twice"
    )
    return [Advice(figure, text)]


def _many_boxes(cfg: CfgNode, found: Inspection) -> List[Advice]:
    most, limit = int(found.counts.per_image.max(initial=0)), cfg.TEST.DETECTIONS_PER_IMAGE
    advice = []
    if most > limit:
        figure = f"An image has {most:,} boxes, and TEST.DETECTIONS_PER_IMAGE is {limit}"
        advice.append(Advice(figure, "the others cannot be found; raise it"))
    heads = cfg.MODEL.ROI_HEADS
    positives = int(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION)
    of_training = found.counts.per_image[found.data.image_splits == 0]
    share = float((of_training > positives).mean()) if len(of_training) else 0.0
    if share >= 0.01 and not is_retinanet(cfg):
        figure = (
            f"{_percent(share)} of the training images have more than {positives} boxes, the "
            "positives that the RoI heads sample"
        )
        text = "some boxes get none; raise MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"
        advice.append(Advice(figure, text))
    return advice


def _feature_balance(cfg: CfgNode, found: Inspection) -> List[Advice]:
    sizes = _of_training(found, found.sizes)
    if len(found.levels.names) < 2 or not len(sizes):
        return []
    shares = found.levels.shares(sizes)
    low, high = np.percentile(sizes, [5, 95])
    top = int(shares.argmax())
    key = "MODEL.BALANCED_FPN.ENABLED"
    if shares[top] > LARGE_SHARE:
        figure = f"{_percent(shares[top])} of the training boxes are on {found.levels.names[top]}"
        text = f"between levels there is little to balance, so expect little of {key}"
        return [Advice(figure, text)]
    used = int((shares >= SMALL_SHARE).sum())
    if used < 3:
        return []
    figure = (
        f"{used} levels have {_percent(SMALL_SHARE)} of the training boxes or more, and their "
        f"sizes, 5th to 95th percentile, differ {high / max(low, 1e-9):.0f} times"
    )
    is_on = cfg.MODEL.BALANCED_FPN.ENABLED
    text = (
        f"feature balance ({key}, now {'on' if is_on else 'off'}) is made for such data: with "
        "REFINE_TYPE none and without ZERO_INIT it gained 1.1 ± 0.8 AP on generated shapes of four "
        "levels, where small objects lost, and nothing on photographs (-0.2 ± 0.4, docs/study.md); "
        "compare several runs with it and without"
    )
    return [Advice(figure, text)]


def _positives(cfg: CfgNode, found: Inspection) -> List[Advice]:
    of_training = found.data.box_splits == 0
    ratios = spread_in_images(found.sizes[of_training], found.data.box_images[of_training])
    key = "MODEL.ROI_HEADS.POSITIVE_SAMPLER"
    median = float(np.median(ratios)) if len(ratios) else 0.0
    if is_retinanet(cfg) or median < LARGE_SPREAD:
        return []
    if cfg.MODEL.ROI_HEADS.POSITIVE_SAMPLER == "instance_balanced":
        return []
    figure = (
        f"In the median training image with two boxes or more, the largest is {median:.1f} times "
        "the size of the smallest"
    )
    text = f"large boxes get most of the positives; {key} instance_balanced gives all the same"
    return [Advice(figure, text)]


def _negatives(cfg: CfgNode, found: Inspection) -> List[Advice]:
    if found.negatives is None:
        return []
    random, balanced = (found.negatives.sampled[name] for name in ("random", "iou_balanced"))
    finest = [found.levels.shares(of.sizes)[0] for of in (random, balanced)]
    figure = (
        f"Of the negatives that random sampling takes, {_percent(random.hard)} are hard (IoU > "
        f"{HARD_IOU:g}) and {_percent(finest[0])} on {found.levels.names[0]}, with IoU-balanced "
        f"sampling {_percent(balanced.hard)} and {_percent(finest[1])}"
    )
    key = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER"
    if balanced.hard < random.hard + SMALL_SHARE:
        return [Advice(figure, f"{key} iou_balanced changes little here")]
    text = (
        f"{key} iou_balanced trains on harder ones; in the study (docs/study.md), where 56 to 75 % "
        "were hard with random sampling, it gained 0.8 ± 0.4 AP on generated shapes and 0.1 ± 0.6 "
        "on photographs; in the paper, 30 % were"
    )
    return [Advice(figure, text)]


def _several(names: Sequence[str], number: int = 5) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1g} %"


def _percents(shares: np.ndarray) -> str:
    return ", ".join(f"{100 * share:.0f}" for share in shares) + " %"
