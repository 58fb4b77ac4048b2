"""Everything before training or evaluation starts: arguments, config, log, device."""

import argparse
from typing import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup

from balanced_d2.config import load_config
from balanced_d2.config.checks import check_weights, drop_late_steps, find_best_weights
from balanced_d2.config.lazy import (
    as_read,
    is_lazy,
    keys_set_by_hand,
    read_config,
)
from balanced_d2.config.zoo import find_config
from balanced_d2.data.adapted import adapt
from balanced_d2.data.class_balance import take_class_balance
from balanced_d2.data.classes import set_num_classes
from balanced_d2.data.datasets.register import add_register_argument, register_from
from balanced_d2.engine.dry_run import set_apart
from balanced_d2.engine.launch import in_main_process
from balanced_d2.engine.log import early_log, start_log
from balanced_d2.engine.output_folder import move_aside
from balanced_d2.engine.speed import use_available_device
from balanced_d2.engine.start import check_start, contents_of, take_gray_range, take_num_classes
from balanced_d2.utils.errors import UserError


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, ``--register``, ``--skip-data-check``, ``--overwrite`` and
    ``--dry-run``."""
    parser = default_argument_parser()
    parser.add_argument(
        "--skip-data-check",
        action="store_true",
        help="do not check the annotations and files or compare the classes with the model's",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin again in an OUTPUT_DIR that holds a training, which is moved aside",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, train and evaluate a little, predict time and memory of the whole "
        "training, and write nothing to OUTPUT_DIR",
    )
    add_register_argument(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """``--config-file``, ``--register`` and ``KEY VALUE`` pairs, for :func:`config_from`.

    Args:
        required: whether there has to be a ``--config-file``.
    """
    parser.add_argument("--config-file", required=required, metavar="FILE.yaml")
    add_register_argument(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options"
    )


def config_from(args: argparse.Namespace) -> CfgNode:
    """Register the user's datasets and load the config, as :func:`trained_config` does, for
    programs that do not train.

    Args:
        args: parsed with :func:`add_model_arguments`.

    Raises:
        UserError: on anything in them that the user can fix.
    """
    register_from(args)
    return trained_config(args.config_file, args.opts)


def trained_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a trained model: its number of classes is that of its weights, and so is the
    range of gray images, where it is not set.

    Args:
        config_file: the path of a YAML config, or its name in the model zoo.
        opts: ``KEY VALUE`` pairs.

    Raises:
        UserError: on anything in them that the user can fix.
    """
    config_file = find_config(config_file)
    if is_lazy(config_file):
        raise UserError(
            f"config file {config_file}: a LazyConfig can be trained and evaluated, but this "
            "program needs a YAML config"
        )
    cfg = load_config(config_file, opts)
    find_best_weights(cfg)
    check_weights(cfg)
    weights = contents_of(cfg.MODEL.WEIGHTS)
    take_num_classes(cfg, weights, keys_set_by_hand(config_file, opts), cfg.MODEL.WEIGHTS)
    take_gray_range(cfg, weights)
    take_class_balance(cfg, weights.config, weights.class_names)
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Register the user's datasets, load the config, complete it, check everything, and only then
    write to ``OUTPUT_DIR``: the config and the log. With ``--dry-run``, that is a temporary folder.

    Call this in every process, because datasets are registered per process. What is read from files
    is read and checked in one process for all.

    Args:
        args: parsed by :func:`argument_parser`.

    Returns:
        The config, frozen; for a LazyConfig, a :class:`LazyCfgNode`.

    Raises:
        UserError: on anything in the arguments, the config, the weights or the data that the user
            can fix.
    """
    if args.resume or args.eval_only:
        other = "--resume" if args.resume else "--eval-only"
        if args.overwrite:
            raise UserError(f"--overwrite begins a training again, {other} does not: leave one out")
        if args.dry_run:
            raise UserError(f"--dry-run is for a training that begins: leave {other} out")
    register_from(args)
    args.config_file = find_config(args.config_file)
    cfg = read_config(args.config_file, args.opts)
    with early_log() as records:
        find_best_weights(cfg)
        use_available_device(cfg)
        if not args.eval_only:
            drop_late_steps(cfg)
        start = in_main_process(check_start, cfg, args)
        set_num_classes(cfg, start.num_classes)
        cfg.SEED, cfg.INPUT.GRAY_RANGE = start.seed, start.gray_range
        cfg.MODEL.CLASS_COUNTS = start.class_counts
        cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS = start.class_weights
        if args.dry_run:
            set_apart(cfg)
        cfg.freeze()
        for name, change in start.data.changes.items():
            adapt(name, change, start.data.classes or ())
        if args.overwrite and not args.dry_run:
            in_main_process(move_aside, cfg.OUTPUT_DIR)
    start_log(cfg.OUTPUT_DIR, records)
    default_setup(as_read(cfg), args)
    return cfg
