"""Run a program's main function, in one process or several."""

import argparse
import sys
from typing import Callable

import torch
from detectron2.engine import launch
from torch.multiprocessing.spawn import ProcessExitedException

from balanced_d2.errors import UserError, tell_user_errors

Main = Callable[[argparse.Namespace], object]


def run(main: Main, args: argparse.Namespace) -> int:
    """Run ``main(args)`` with Detectron2's launcher and tell its user errors.

    Args:
        main: called in each of ``args.num_machines * args.num_gpus`` processes.
        args: as parsed by :func:`balanced_d2.engine.argument_parser`.

    Returns:
        The exit code for the program.
    """
    return tell_user_errors(_launch, main, args)


def _launch(main: Main, args: argparse.Namespace) -> None:
    if args.num_gpus * args.num_machines > 1 and not torch.cuda.is_available():
        raise UserError("--num-gpus and --num-machines need CUDA, which this machine has not")
    try:
        launch(
            _main_worker,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except ProcessExitedException as error:
        sys.exit(error.exit_code)  # the worker has told why


def _main_worker(main: Main, args: argparse.Namespace) -> None:
    """What each process runs: it tells its own errors, since only its exit code leaves it."""
    exit_code = tell_user_errors(main, args)
    if exit_code:
        sys.exit(exit_code)
