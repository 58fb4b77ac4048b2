"""Run a program's main function in one or several processes."""

import argparse
import os
import re
import sys
from typing import Callable, TypeVar

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing.spawn import ProcessExitedException

from balanced_d2.utils.compat import create_local_process_group
from balanced_d2.utils.errors import UserError, report_user_errors

Main = Callable[[argparse.Namespace], object]
Result = TypeVar("Result")


def run(main: Main, args: argparse.Namespace) -> int:
    """Run ``main(args)`` and report its user errors.

    Under ``torchrun``, it runs in each process that was started, on GPUs if there are any and on
    CPUs otherwise; if ``torchrun`` restarts them after a failure, ``args.resume`` is set and
    ``args.overwrite`` is not. Without ``torchrun``, Detectron2's launcher starts
    ``args.num_gpus`` processes.

    Args:
        main: called in each process.
        args: as parsed by :func:`balanced_d2.engine.argument_parser`.

    Returns:
        The exit code for the program.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return report_user_errors(_join_torchrun, main, args)
    return report_user_errors(_launch, main, args)


def in_main_process(function: Callable[..., Result], *args, **kwargs) -> Result:
    """Call a function in one process; all processes return its result, or raise its
    :class:`UserError`."""
    result, failure = None, None
    if comm.is_main_process():
        try:
            result = function(*args, **kwargs)
        except UserError as error:
            failure = error
    result, failure = comm.all_gather((result, failure))[0]
    if failure is not None:
        raise failure
    return result


def _join_torchrun(main: Main, args: argparse.Namespace) -> None:
    local_rank, num_local = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
    if torch.cuda.is_available():
        if num_local > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node is {num_local}, but this machine has "
                f"{torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(local_rank)
    num_restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    store, rank, num_processes = next(distributed.rendezvous("env://"))
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        # The store survives a restart, with the addresses of processes that no longer exist.
        store=distributed.PrefixStore(f"start {num_restarts}", store),
        rank=rank,
        world_size=num_processes,
    )
    try:
        create_local_process_group(num_local)
        if num_restarts > 0:
            args.resume, args.overwrite = True, False
        main(args)
        comm.synchronize()  # a process that leaves early breaks connections that others still use
    finally:
        distributed.destroy_process_group()


def _launch(main: Main, args: argparse.Namespace) -> None:
    if args.num_gpus * args.num_machines > 1 and not torch.cuda.is_available():
        # torchrun takes a file or a module, not the command balanced-d2.
        program = re.sub("^balanced-d2 ", "-m balanced_d2 ", sys.argv[0])
        raise UserError(
            "--num-gpus and --num-machines need CUDA, which is not available; on CPUs, run: "
            f"torchrun --local-addr 127.0.0.1 --nproc-per-node {args.num_gpus} {program} ..."
        )
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
        sys.exit(error.exit_code)  # the worker has already reported the error


def _main_worker(main: Main, args: argparse.Namespace) -> None:
    """Run ``main`` in each process and report its errors there: only exit codes are passed on."""
    exit_code = report_user_errors(main, args)
    if exit_code:
        sys.exit(exit_code)
