"""Checks of a config that do not need its data."""

import difflib
import logging
import os
from functools import reduce
from typing import Any, Collection, Iterator, Mapping, Tuple

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
)
from detectron2.solver.build import GradientClipType
from detectron2.utils import comm
from PIL import Image

from balanced_d2.layers.box_losses import BOX_REG_LOSSES, DETECTRON2_LOSSES
from balanced_d2.layers.class_losses import CLS_LOSSES, CROSS_ENTROPY, WITHOUT_WEIGHTS
from balanced_d2.layers.feature_balancer import REFINEMENTS
from balanced_d2.layers.sampling import NEGATIVE_SAMPLERS, POSITIVE_SAMPLERS
from balanced_d2.modeling.balanced_sampling import check_together
from balanced_d2.modeling.roi_heads import CANONICAL
from balanced_d2.utils.compat import LR_SCHEDULERS, has_sigmoid_scores
from balanced_d2.utils.errors import UserError, check_choice, check_package

logger = logging.getLogger(__name__)

# Of keys that name a class.
REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.BALANCED_FPN.BOTTOM_UP": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
# Names that Detectron2 takes without a registry: no box head of its own, proposals from files.
UNREGISTERED = {
    "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
    "MODEL.ROI_BOX_HEAD.NAME": "",
}
# Keys of parts that a model may not have, with those that say it.
OPTIONAL_PARTS = {
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "MODEL.KEYPOINT_ON",
    "MODEL.ROI_MASK_HEAD.NAME": "MODEL.MASK_ON",
}

# The values of keys that Detectron2 compares with texts, late or not at all.
CHOICES = {
    "INPUT.FORMAT": ("BGR", "YUV-BT.601", *Image.MODES),
}
CHOICES_IN_TRAINING = {
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": tuple(kind.value for kind in GradientClipType),
    "SOLVER.LR_SCHEDULER_NAME": LR_SCHEDULERS,
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
}

# The least values of keys whose errors would come late, from other libraries, or not at all.
LEAST = {
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MAX_SIZE_TEST": 1,
    "INPUT.MIN_SIZE_TEST": 0,  # does not scale images
}
LEAST_IN_TRAINING = {
    "INPUT.MAX_SIZE_TRAIN": 1,
    "INPUT.MIN_SIZE_TRAIN": 0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.MOMENTUM": 0,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WEIGHT_DECAY": 0,
}


def check_config(cfg: CfgNode, train: bool, resume: bool = False) -> None:
    """Check all keys that training or evaluation will use.

    Args:
        train: whether the config will be used for training, not only for evaluation.
        resume: whether training resumes. Balances without effect then only cause a warning,
            because configs written by balanced_d2 0.1.0 may have some.

    Raises:
        UserError: naming the first key that is wrong.
    """
    check_names(cfg)
    _check_numbers(cfg, LEAST | LEAST_IN_TRAINING if train else LEAST)
    _check_choices(cfg, CHOICES | CHOICES_IN_TRAINING if train else CHOICES)
    model = cfg.MODEL
    NEGATIVE_SAMPLERS.check(model.ROI_HEADS.NEGATIVE_SAMPLER)
    POSITIVE_SAMPLERS.check(model.ROI_HEADS.POSITIVE_SAMPLER)
    REFINEMENTS.check(model.BALANCED_FPN.REFINE_TYPE)
    BOX_REG_LOSSES.check(model.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE)
    BOX_REG_LOSSES.check(model.RETINANET.BBOX_REG_LOSS_TYPE)
    CLS_LOSSES.check(model.ROI_BOX_HEAD.CLS_LOSS_TYPE)
    _check_combinations(cfg)
    if cfg.DATASETS.TEST:
        _check_sigmas(cfg)
        _check_test_time_augmentation(cfg)
    idle = "; ".join(_idle_balances(cfg))
    if train:
        if idle and not resume:
            raise UserError(idle)
        _check_steps(cfg)
        _check_sizes(cfg)
        check_crop(cfg)
        _check_samplers(cfg)
        _check_batch(cfg)
        _check_averaging(cfg)
        _check_what_follows_evaluation(cfg)
        if cfg.WANDB.ENABLED:
            check_package("wandb", "WANDB.ENABLED")
        if cfg.MLFLOW.ENABLED:
            check_package("mlflow", "MLFLOW.ENABLED")
    if idle:
        logger.warning(idle)


def check_names(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a key names something that is not in its registry; those of parts
    that the model does not have may name those of another project."""
    for key, registry in REGISTRIES.items():
        name = _value(cfg, key)
        if key in OPTIONAL_PARTS and not _value(cfg, OPTIONAL_PARTS[key]):
            continue
        if name not in registry and name != UNREGISTERED.get(key):
            names = [known for known, _ in registry]
            close = difflib.get_close_matches(name, names, n=1) or names
            raise UserError(f"{key}: there is no {name!r}; did you mean {', '.join(close)}?")


def _value(cfg: CfgNode, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def _check_choices(cfg: CfgNode, choices: Mapping[str, Collection[str]]) -> None:
    """Raise :class:`UserError` if the value of a key is not one of its choices."""
    for key, known in choices.items():
        if _value(cfg, key) not in known:
            raise UserError(f"{key} is {_value(cfg, key)!r}; choose one of: {', '.join(known)}")


def _check_numbers(cfg: CfgNode, least: Mapping[str, int]) -> None:
    """Raise :class:`UserError` if a key, or one of its values, is below its least."""
    for key, low in least.items():
        value = _value(cfg, key)
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values:
            raise UserError(f"{key} is empty; it needs at least one value")
        if not all(number >= low for number in values):
            raise UserError(f"{key} is {value}; it has to be at least {low}")


def _check_combinations(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if two keys want different things of the RoI heads."""
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    by_loss = getattr(NEGATIVE_SAMPLERS.get(heads.NEGATIVE_SAMPLER), "needs_losses", False)
    if by_loss:
        check_together(heads.POSITIVE_SAMPLER == "random")
    if not has_sigmoid_scores(box_head):
        return
    loss = box_head.CLS_LOSS_TYPE
    for key, value, is_on in (
        ("ROI_BOX_HEAD.CLS_LOSS_TYPE", loss, loss != CROSS_ENTROPY),
        ("ROI_HEADS.NEGATIVE_SAMPLER", heads.NEGATIVE_SAMPLER, by_loss),
    ):
        if is_on:
            raise UserError(
                f"MODEL.{key} is {value!r}, which does not work with "
                "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE (and USE_FED_LOSS), a classification loss of "
                "Detectron2's own: turn one of them off"
            )


def _idle_balances(cfg: CfgNode) -> Iterator[str]:
    """Messages about balances that are on, but not supported by Detectron2's class in the config.

    Whether classes of other projects support them can only be checked on the model:
    :func:`balanced_d2.modeling.check_balanced`.
    """
    model = cfg.MODEL
    meta_architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    heads = ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME)
    is_retinanet = issubclass(meta_architecture, RetinaNet)
    if model.BALANCED_FPN.ENABLED and _is_detectron2s(BACKBONE_REGISTRY.get(model.BACKBONE.NAME)):
        ours = f"build_balanced_{'retinanet_' if is_retinanet else ''}fpn_backbone"
        yield (
            f"MODEL.BALANCED_FPN.ENABLED is True, but MODEL.BACKBONE.NAME {model.BACKBONE.NAME} "
            f"does not balance the pyramid; set it to {ours}, or ENABLED to False"
        )
    for key, value in _set_for_heads(cfg):
        if is_retinanet:
            yield (
                f"{key} is {value!r}, but {model.META_ARCHITECTURE} has no RoI heads; remove it "
                "(configs/Balanced-RetinaNet.yaml turns on RetinaNet's balances)"
            )
        elif _is_detectron2s(heads):
            yield (
                f"{key} is {value!r}, which MODEL.ROI_HEADS.NAME {model.ROI_HEADS.NAME} does not "
                "support; set that to BalancedROIHeads or BalancedCascadeROIHeads"
            )
    box_head = model.ROI_BOX_HEAD
    if len(box_head.CLASS_WEIGHTS) and box_head.CLS_LOSS_TYPE in WITHOUT_WEIGHTS:
        yield (
            f"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS is {list(box_head.CLASS_WEIGHTS)}, which "
            f"CLS_LOSS_TYPE {box_head.CLS_LOSS_TYPE} does not use; set that to "
            "weighted_cross_entropy or weighted_focal, or remove the weights"
        )
    loss = model.RETINANET.BBOX_REG_LOSS_TYPE
    if loss not in DETECTRON2_LOSSES and _is_detectron2s(meta_architecture):
        advice = (
            "set that to BalancedRetinaNet"
            if is_retinanet
            else "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is the key for R-CNN"
        )
        yield (
            f"MODEL.RETINANET.BBOX_REG_LOSS_TYPE is {loss!r}, which MODEL.META_ARCHITECTURE "
            f"{model.META_ARCHITECTURE} does not support; {advice}"
        )


def _set_for_heads(cfg: CfgNode) -> Iterator[Tuple[str, object]]:
    """Keys and values of the RoI heads' balances that are on."""
    heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    for key in ("NEGATIVE_SAMPLER", "POSITIVE_SAMPLER"):
        if heads[key] != "random":
            yield f"MODEL.ROI_HEADS.{key}", heads[key]
    if box_head.BBOX_REG_LOSS_TYPE not in DETECTRON2_LOSSES:
        yield "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", box_head.BBOX_REG_LOSS_TYPE
    if box_head.CLS_LOSS_TYPE != CROSS_ENTROPY:
        yield "MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", box_head.CLS_LOSS_TYPE
    for key, default in CANONICAL.items():
        if box_head[key] != default:
            yield f"MODEL.ROI_BOX_HEAD.{key}", box_head[key]


def _is_detectron2s(entry) -> bool:
    return entry.__module__.startswith("detectron2.")


def check_weights(cfg: CfgNode, purpose: str = "") -> None:
    """Raise :class:`UserError` if ``MODEL.WEIGHTS`` is needed but not set, or does not exist.

    Args:
        purpose: what trained weights are needed for, such as "export"; empty: they are not.
    """
    weights = cfg.MODEL.WEIGHTS
    if purpose and not weights:
        raise UserError(f"nothing to {purpose}: set MODEL.WEIGHTS to a checkpoint")
    # The checkpointer handles a query such as x.pth?matching_heuristics=True.
    if weights and "://" not in weights and not os.path.isfile(weights.partition("?")[0]):
        raise UserError(f"MODEL.WEIGHTS: there is no file {weights}")


def find_best_weights(cfg: CfgNode) -> None:
    """Let ``MODEL.WEIGHTS`` "best" be the best checkpoint in ``OUTPUT_DIR``
    (``TEST.BEST_CHECKPOINT``).

    Raises:
        UserError: if there is none.
    """
    if cfg.MODEL.WEIGHTS != "best":
        return
    path = os.path.join(cfg.OUTPUT_DIR, "model_best.pth")
    if not os.path.isfile(path):
        raise UserError(
            f"MODEL.WEIGHTS best: there is no {path}; a training with TEST.BEST_CHECKPOINT.METRIC "
            "writes it, to its OUTPUT_DIR"
        )
    logger.info(f"MODEL.WEIGHTS best: {path}")
    cfg.MODEL.WEIGHTS = path


def drop_late_steps(cfg: CfgNode) -> None:
    """Remove steps of the learning rate that are beyond the end of training, with a warning.

    They are common when a config is tried out for a few iterations. Detectron2 removes them too,
    but fails if a step is at the last iteration.
    """
    solver = cfg.SOLVER
    late = [step for step in solver.STEPS if step >= solver.MAX_ITER]
    if late and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        logger.warning(
            f"SOLVER.STEPS: {', '.join(map(str, late))} dropped, because training ends at "
            f"SOLVER.MAX_ITER {solver.MAX_ITER}; the learning rate is not reduced there"
        )
        solver.STEPS = tuple(step for step in solver.STEPS if step < solver.MAX_ITER)


def _check_steps(cfg: CfgNode) -> None:
    steps = tuple(cfg.SOLVER.STEPS)
    is_used = cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    if is_used and not all(before < step for before, step in zip((0, *steps), steps)):
        raise UserError(
            f"SOLVER.STEPS is {steps}; each has to be above 0 and larger than the one before"
        )


def _check_sizes(cfg: CfgNode) -> None:
    sizes, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    if sampling != "range" or not isinstance(sizes, (list, tuple)):
        return
    if len(sizes) != 2 or sizes[0] > sizes[1]:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN_SAMPLING {sampling!r} needs the least and the largest size, but "
            f"INPUT.MIN_SIZE_TRAIN is {sizes}"
        )


def check_crop(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if the package that cropping polygons needs is not installed."""
    if cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        check_package("shapely", "INPUT.CROP.ENABLED with polygon masks")


def _check_sigmas(cfg: CfgNode) -> None:
    number, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.MODEL.KEYPOINT_ON and number != (len(sigmas) or 17):
        raise UserError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {len(sigmas)} values, but needs one for each of the "
            f"{number} keypoints (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS); it may be empty only for "
            "COCO's 17 keypoints"
        )


def _check_test_time_augmentation(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    model = cfg.MODEL
    meta_architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    for key, unsupported in (
        ("META_ARCHITECTURE", not issubclass(meta_architecture, GeneralizedRCNN)),
        ("KEYPOINT_ON", model.KEYPOINT_ON),
        ("LOAD_PROPOSALS", model.LOAD_PROPOSALS),
    ):
        if unsupported:
            raise UserError(
                "TEST.AUG.ENABLED is True, but Detectron2 has no test-time augmentation for models "
                f"whose MODEL.{key} is {model[key]}; set TEST.AUG.ENABLED to False"
            )


def _check_batch(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if a batch cannot be divided among the processes, and into the parts
    of ``SOLVER.ACCUMULATE``."""
    key, size, parts = "SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    divisor, processes = "the number of processes", comm.get_world_size()
    if hasattr(cfg, "lazy"):  # in which it is the loader's
        key = "dataloader.train.total_batch_size"
        size = cfg.lazy.dataloader.train.get("total_batch_size")
    elif cfg.SOLVER.REFERENCE_WORLD_SIZE:  # Detectron2 scales it to as many as there are
        divisor, processes = "SOLVER.REFERENCE_WORLD_SIZE", cfg.SOLVER.REFERENCE_WORLD_SIZE
    if parts < 1:
        raise UserError(f"SOLVER.ACCUMULATE is {parts}; it has to be at least 1")
    if size is None:  # a loader of another kind
        return
    if size < 1 or size % processes:
        raise UserError(
            f"the batch size ({key}) is {size}; it has to be a multiple of {divisor}, {processes}"
        )
    if parts > size // processes:
        raise UserError(
            f"SOLVER.ACCUMULATE is {parts}, but each process has only {size // processes} of the "
            f"{key} {size} images: choose at most {size // processes}"
        )


def _check_averaging(cfg: CfgNode) -> None:
    ema = cfg.SOLVER.EMA
    if not 0 <= ema.DECAY < 1:
        raise UserError(f"SOLVER.EMA.DECAY is {ema.DECAY}; it has to be at least 0 and below 1")
    if ema.ENABLED and cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            "TEST.PRECISE_BN.ENABLED is True, but measures the statistics of the weights that are "
            "trained, not of their average, which SOLVER.EMA.ENABLED evaluates: turn one off"
        )


def _check_what_follows_evaluation(cfg: CfgNode) -> None:
    best, stopping = cfg.TEST.BEST_CHECKPOINT, cfg.SOLVER.EARLY_STOPPING
    for key, node, is_on in (
        ("TEST.BEST_CHECKPOINT", best, bool(best.METRIC)),
        ("SOLVER.EARLY_STOPPING", stopping, stopping.PATIENCE != 0),
    ):
        if not is_on:
            continue
        check_choice(f"{key}.MODE", node.MODE, ("max", "min"))
        if not cfg.DATASETS.TEST or cfg.TEST.EVAL_PERIOD < 1:
            raise UserError(
                f"{key} needs evaluations during training: set DATASETS.TEST and, in iterations, "
                "TEST.EVAL_PERIOD"
            )
    if stopping.PATIENCE < 0 or stopping.MIN_CHANGE < 0:
        raise UserError(
            f"SOLVER.EARLY_STOPPING: PATIENCE is {stopping.PATIENCE} and MIN_CHANGE "
            f"{stopping.MIN_CHANGE}; neither can be below 0"
        )


def _check_samplers(cfg: CfgNode) -> None:
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if not 0 < ratio <= 1:
        raise UserError(
            f"DATALOADER.RANDOM_SUBSET_RATIO is {ratio}; it has to be above 0 and at most 1"
        )
    if (
        cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
        and cfg.DATALOADER.REPEAT_THRESHOLD <= 0
    ):
        logger.warning(
            "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler repeats no image, because "
            f"DATALOADER.REPEAT_THRESHOLD is {cfg.DATALOADER.REPEAT_THRESHOLD:g}; "
            "balanced-d2 inspect suggests one for the data"
        )
    key = "DATASETS.TRAIN_REPEAT_FACTOR"
    for pair in cfg.DATASETS.TRAIN_REPEAT_FACTOR:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{key}: {pair!r} is not a pair of dataset and factor")
        name, factor = pair
        if name not in cfg.DATASETS.TRAIN:
            raise UserError(f"{key}: {name!r} is not in DATASETS.TRAIN")
        if not factor > 0:
            raise UserError(f"{key}: the factor of {name!r} is {factor}; it has to be above 0")
