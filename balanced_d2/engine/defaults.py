"""Everything before training or evaluation starts: arguments, config, log, device."""

import argparse
from pathlib import Path
from typing import Type

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from balanced_d2.config import load_config
from balanced_d2.config.checks import check_config, check_weights, drop_late_steps
from balanced_d2.config.lazy import LazyCfgNode, as_read, is_lazy, read_config
from balanced_d2.data.checks.for_model import check_datasets
from balanced_d2.data.datasets.register import add_register_argument, register_from
from balanced_d2.engine.launch import in_main_process
from balanced_d2.engine.lazy import LazyTrainer
from balanced_d2.engine.speed import use_available_device
from balanced_d2.engine.trainer import BalancedTrainer
from balanced_d2.evaluation.evaluators import check_packages
from balanced_d2.utils.errors import UserError


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, ``--register`` and ``--skip-data-check``."""
    parser = default_argument_parser()
    parser.add_argument(
        "--skip-data-check",
        action="store_true",
        help="do not check the annotations or compare the classes with the model's",
    )
    add_register_argument(parser)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--config-file``, ``--register`` and ``KEY VALUE`` pairs, for :func:`config_from`."""
    parser.add_argument("--config-file", required=True, metavar="FILE.yaml")
    add_register_argument(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options"
    )


def config_from(args: argparse.Namespace) -> CfgNode:
    """Register the user's datasets and load the config, for programs that do not train.

    Args:
        args: parsed with :func:`add_model_arguments`.

    Raises:
        UserError: on anything in them that the user can fix.
    """
    if is_lazy(args.config_file):
        raise UserError(
            f"config file {args.config_file}: a LazyConfig can be trained and evaluated, but this "
            "program needs a YAML config"
        )
    register_from(args)
    return load_config(args.config_file, args.opts)


def setup(args: argparse.Namespace) -> CfgNode:
    """Register the user's datasets, load the config, start the log and check config and data.

    Call this in every process, because datasets are registered per process. The data are checked
    in one process for all.

    Args:
        args: parsed by :func:`argument_parser`.

    Returns:
        The config, frozen; for a LazyConfig, a :class:`LazyCfgNode`.

    Raises:
        UserError: on anything in the arguments, the config or the data that the user can fix.
    """
    register_from(args)
    cfg = read_config(args.config_file, args.opts)
    if args.eval_only and not args.resume and not cfg.MODEL.WEIGHTS:
        raise UserError(
            "nothing to evaluate: set MODEL.WEIGHTS (train.init_checkpoint in a .py config) to a "
            "checkpoint, or add --resume for the last one in OUTPUT_DIR"
        )
    resuming = args.resume and any(Path(cfg.OUTPUT_DIR).glob("*.pth"))
    if not resuming:
        check_weights(cfg)
    try:
        # The same loggers that default_setup will get.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="balanced_d2")
    except OSError as error:
        raise UserError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error
    use_available_device(cfg)
    if not args.eval_only:
        drop_late_steps(cfg)
    cfg.freeze()
    check_config(cfg, train=not args.eval_only, resume=resuming)
    in_main_process(
        check_datasets, cfg, train=not args.eval_only, annotations=not args.skip_data_check
    )
    check_packages(cfg.DATASETS.TEST)
    default_setup(as_read(cfg), args)  # last, because it replaces an existing config.yaml
    return cfg


def trainer_for(cfg: CfgNode) -> Type[BalancedTrainer]:
    """The trainer class for a config that :func:`setup` has returned."""
    return LazyTrainer if isinstance(cfg, LazyCfgNode) else BalancedTrainer
