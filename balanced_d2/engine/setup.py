"""What happens before training or evaluation starts: arguments, config, log, device."""

import argparse
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from balanced_d2.config import load_config
from balanced_d2.data.check import check_datasets
from balanced_d2.data.register import add_register_argument, register_from
from balanced_d2.errors import UserError


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and ``--register``."""
    parser = default_argument_parser()
    add_register_argument(parser)
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Register the user's data sets, load the config, start the log and check the data.

    To be called in every process: data sets are registered per process.

    Args:
        args: parsed by :func:`argument_parser`.

    Returns:
        The config, frozen.

    Raises:
        UserError: on anything in the arguments, the config or the data that is the user's to mend.
    """
    register_from(args)
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only and not args.resume and not cfg.MODEL.WEIGHTS:
        raise UserError(
            "nothing to evaluate: set MODEL.WEIGHTS to a checkpoint, or add --resume for the last "
            "one in OUTPUT_DIR"
        )
    check_weights(cfg)
    try:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="balanced_d2")
    except OSError as error:
        raise UserError(f"cannot write to OUTPUT_DIR {cfg.OUTPUT_DIR}: {error.strerror}") from error
    use_available_device(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    check_datasets(cfg, train=not args.eval_only)
    return cfg


def use_available_device(cfg: CfgNode) -> None:
    """Without CUDA on the machine, set ``cfg`` to the CPU in full precision, and say so."""
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return
    message = "no CUDA on this machine: running on the CPU"
    if cfg.SOLVER.AMP.ENABLED:
        message += ", in full precision (mixed precision needs CUDA)"
    logging.getLogger(__name__).warning(message)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.AMP.ENABLED = False


def check_weights(cfg: CfgNode) -> None:
    """Raise :class:`UserError` if ``MODEL.WEIGHTS`` is set, but to no file."""
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise UserError(f"MODEL.WEIGHTS: there is no file {weights}")
