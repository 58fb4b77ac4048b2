"""Run a program's main function, in one process or several."""

import argparse
import sys
from typing import Callable

import torch
from detectron2.engine import launch
from torch.multiprocessing.spawn import ProcessExitedException

from balanced_d2.errors import UserError

EXIT_USER_ERROR = 2


def run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Run ``main(args)`` with Detectron2's launcher.

    Args:
        main: called in each of ``args.num_machines * args.num_gpus`` processes.
        args: as parsed by :func:`balanced_d2.engine.argument_parser`.

    Returns:
        The exit code. Where ``main`` raises :class:`UserError` it is 2, and the error has been
        printed as one line on standard error.
    """
    if max(args.num_gpus, args.num_machines) > 1 and not torch.cuda.is_available():
        return _tell("--num-gpus and --num-machines need CUDA, and this machine has none")
    try:
        launch(
            _Main(main),
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:  # a spawned process has told the error and exited
        return error.exit_code
    except SystemExit as error:
        return error.code
    return 0


class _Main:
    """``main`` with user errors told. A class, since spawned processes have to unpickle it."""

    def __init__(self, main: Callable[[argparse.Namespace], object]):
        self.main = main

    def __call__(self, args: argparse.Namespace) -> None:
        try:
            self.main(args)
        except UserError as error:
            sys.exit(_tell(str(error)))


def _tell(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
