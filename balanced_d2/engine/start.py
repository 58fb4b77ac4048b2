"""What weights, data and a resumed training add to a config, and all checks of them together."""

import argparse
import logging
from typing import Collection, List, NamedTuple, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from torch import nn

from balanced_d2.checkpoint import (
    BalancedCheckpointer,
    Contents,
    read_contents,
    start_from,
    training_in,
)
from balanced_d2.config.checks import check_config, check_weights
from balanced_d2.config.lazy import LazyCfgNode, keys_set_by_hand
from balanced_d2.config.resume import as_text, changes, seed_of
from balanced_d2.data.adapted import adapt
from balanced_d2.data.checks.for_model import CheckedData, check_datasets
from balanced_d2.data.class_balance import complete_class_balance, take_class_balance
from balanced_d2.data.classes import NO_NAMES, num_classes_key, set_num_classes, some
from balanced_d2.data.gray_range import find_gray_range
from balanced_d2.engine.lazy import trainer_for
from balanced_d2.engine.output_folder import check_movable, check_unused
from balanced_d2.evaluation.evaluators import check_packages
from balanced_d2.utils.errors import UserError

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """What the checks add to a config."""

    num_classes: Optional[int]
    seed: int
    gray_range: float
    class_counts: List[int]
    class_weights: List[float]
    data: CheckedData


def check_start(cfg: CfgNode, args: argparse.Namespace) -> Start:
    """Complete and check a config, and all that it names.

    Args:
        cfg: changed as the result says.
        args: parsed by :func:`~balanced_d2.engine.defaults.argument_parser`.

    Raises:
        UserError: on anything in them that the user can fix.
    """
    folder = BalancedCheckpointer(nn.Module(), cfg.OUTPUT_DIR)
    resumed = folder.get_checkpoint_file() if args.resume else ""
    if args.eval_only and not resumed and not cfg.MODEL.WEIGHTS:
        raise UserError(
            "nothing to evaluate: set MODEL.WEIGHTS (train.init_checkpoint in a .py config) to a "
            "checkpoint, or add --resume for the last one in OUTPUT_DIR"
        )
    if not resumed:
        check_weights(cfg)
    weights = contents_of(resumed or cfg.MODEL.WEIGHTS)
    is_new = not resumed and not args.eval_only
    if is_new and not args.overwrite:
        check_unused(cfg.OUTPUT_DIR)
    if is_new:
        registered = [path for _, *paths in args.register for path in paths]
        check_movable(cfg.OUTPUT_DIR, [args.config_file, cfg.MODEL.WEIGHTS, *registered])
        weights = Contents()  # which it only begins with
    elif weights.class_names is None and weights.num_classes is not None:
        logger.warning(f"{resumed or cfg.MODEL.WEIGHTS}: {NO_NAMES}")
    by_hand = keys_set_by_hand(args.config_file, args.opts)
    follows = take_num_classes(cfg, weights, by_hand, resumed or cfg.MODEL.WEIGHTS)
    take_gray_range(cfg, weights)
    take_class_balance(cfg, weights.config, weights.class_names)
    check_config(cfg, train=not args.eval_only, resume=bool(resumed))
    if resumed and not args.eval_only:
        check_unfinished(_scaled(cfg), weights.iteration, resumed)
        continue_with(cfg, weights.config, resumed)
    data = check_datasets(
        cfg,
        train=not args.eval_only,
        annotations=not args.skip_data_check,
        known=weights.class_names,
        number_follows=follows,
    )
    check_packages(cfg.DATASETS.TEST)
    if follows and data.classes is not None:
        set_num_classes(cfg, len(data.classes))
    complete_gray_range(cfg, data, train=not args.eval_only)
    complete_class_balance(cfg, data.class_counts, data.classes, train=not args.eval_only)
    if args.overwrite and cfg.MODEL.WEIGHTS and training_in(cfg.OUTPUT_DIR):
        check_beginning(cfg, data.classes)
    return Start(
        num_classes_key(cfg)[1],
        cfg.SEED,
        cfg.INPUT.GRAY_RANGE,
        list(cfg.MODEL.CLASS_COUNTS),
        list(cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS),
        data,
    )


def check_beginning(cfg: CfgNode, classes: Optional[Sequence[str]]) -> None:
    """Raise :class:`UserError` if a training cannot begin with ``MODEL.WEIGHTS``.

    Building the model and loading them takes seconds, so that this is for a training that moves
    another one aside; others find it out when they begin.

    Args:
        classes: the model's.
    """
    logging.disable(logging.WARNING)  # the training says the same again
    try:
        start_from(trainer_for(cfg).build_model(cfg), cfg.MODEL.WEIGHTS, classes)
    finally:
        logging.disable(logging.NOTSET)


def contents_of(weights: str) -> Contents:
    """What the file of ``MODEL.WEIGHTS`` says of its model; nothing for ``""``.

    Raises:
        UserError: if it cannot be read.
    """
    if not weights:
        return Contents()
    try:
        return read_contents(weights)
    except UserError as error:
        raise UserError(f"MODEL.WEIGHTS: {error}") from error


def take_num_classes(
    cfg: CfgNode, weights: Contents, by_hand: Collection[str], source: str
) -> bool:
    """Set the model's number of classes to that of its weights.

    Args:
        weights: what they say.
        by_hand: the keys that are set by hand.
        source: their file, for the message.

    Returns:
        Whether the number still has to follow from the data.

    Raises:
        UserError: if another one is set by hand.
    """
    key, number = num_classes_key(cfg)
    if number is None or weights.num_classes is None:
        return number is not None and key not in by_hand
    if key in by_hand and number != weights.num_classes:
        names = f" ({some(weights.class_names)})" if weights.class_names else ""
        raise UserError(
            f"{key} is {number}, but {source} has {weights.num_classes} classes{names}: leave it "
            "out; only a training of another number can begin with them (MODEL.WEIGHTS)"
        )
    set_num_classes(cfg, weights.num_classes)
    return False


def check_unfinished(cfg: CfgNode, iteration: Optional[int], checkpoint: str) -> None:
    """Raise :class:`UserError` if a resumed training is beyond its end.

    Args:
        cfg: as it is trained, with ``SOLVER.REFERENCE_WORLD_SIZE`` applied.
        iteration: the last one of the checkpoint, from 0; None if it does not say it.
        checkpoint: where the training goes on.
    """
    if iteration is not None and iteration >= cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"--resume: SOLVER.MAX_ITER (train.max_iter) is {cfg.SOLVER.MAX_ITER}, but the "
            f"training of {checkpoint} has made {iteration + 1} iterations: choose at least that"
        )


def continue_with(cfg: CfgNode, before: str, checkpoint: str) -> None:
    """Report what a resumed training does differently from now on, and refuse what cannot change.

    Args:
        cfg: its ``SEED`` becomes that of the training.
        before: the config of the training; "" if it is not known.
        checkpoint: where it goes on.

    Raises:
        UserError: naming the keys that cannot change, and how to begin again from the weights.
    """
    if not before:
        logger.warning(
            f"{checkpoint} does not say the config of its training (older versions did not write "
            "it): a config that differs is not noticed"
        )
        return
    applied, refused = changes(before, _scaled(cfg))  # as it was saved
    if refused:
        raise UserError(
            f"--resume: the training in {cfg.OUTPUT_DIR} cannot go on with {as_text(refused)}; "
            "leave them as they were, or begin again from its weights: MODEL.WEIGHTS "
            f"{checkpoint} and another OUTPUT_DIR, without --resume"
        )
    if applied:
        logger.warning(f"--resume: from now on {as_text(applied)}")
    if seed_of(before) != cfg.SEED:
        logger.warning(f"--resume: SEED stays {seed_of(before)}, which the order of images follows")
        cfg.SEED = seed_of(before)


def _scaled(cfg: CfgNode) -> CfgNode:
    return DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())


def take_gray_range(cfg: CfgNode, weights: Contents) -> None:
    """Set ``INPUT.GRAY_RANGE``, where it is not set, to that of the weights."""
    if not isinstance(cfg, LazyCfgNode):  # whose mapper does not follow it
        cfg.INPUT.GRAY_RANGE = cfg.INPUT.GRAY_RANGE or weights.gray_range


def complete_gray_range(cfg: CfgNode, data: CheckedData, train: bool) -> None:
    """Set ``INPUT.GRAY_RANGE``, where neither the config nor its weights say it, to what the data
    have: the training data, or else the test data.

    Raises:
        UserError: if an image has no range, or a LazyConfig reads it with Detectron2's mapper.
    """
    found = cfg.INPUT.GRAY_RANGE
    for names in (cfg.DATASETS.TRAIN if train else (), cfg.DATASETS.TEST):
        found = found or find_gray_range([name for name in names if name in data.deep])
    if found and not cfg.INPUT.GRAY_RANGE and isinstance(cfg, LazyCfgNode):
        raise UserError(
            "the data have gray images of more than 8 bits, which Detectron2's mapper clips: use a "
            "YAML config, or L(balanced_d2.data.mapper.ImageMapper) with gray_range "
            f"{found:g} in dataloader.train and dataloader.test"
        )
    cfg.INPUT.GRAY_RANGE = found


def prepare_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Check ``DATASETS``, give them the classes of ``MODEL.WEIGHTS`` and complete
    ``INPUT.GRAY_RANGE``, for programs that do not train.

    Args:
        train: whether ``DATASETS.TRAIN`` will be used.

    Raises:
        UserError: as :func:`check_datasets` does.
    """
    weights = contents_of(cfg.MODEL.WEIGHTS)
    data = check_datasets(cfg, train=train, known=weights.class_names)
    take_gray_range(cfg, weights)
    complete_gray_range(cfg, data, train=train)
    for name, change in data.changes.items():
        adapt(name, change, data.classes or ())
