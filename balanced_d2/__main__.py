"""The command ``balanced-d2``, also as ``python -m balanced_d2``.

It imports only what the chosen command needs, so that help and installation need no Detectron2.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import balanced_d2
from balanced_d2.utils.errors import EXIT_USER_ERROR, report_user_errors

PROGRAM = "balanced-d2"
# Modules whose absence balanced_d2.utils.requirements explains in one line.
REQUIRED = ("detectron2", "cv2")


class Command(NamedTuple):
    module: str
    help: str
    arguments: List[str] = []
    """Come before those of the user."""


COMMANDS: Dict[str, Command] = {
    "train": Command("train", "train a detector and evaluate it"),
    "evaluate": Command("train", "evaluate a detector: train with --eval-only", ["--eval-only"]),
    "detect": Command("detect", "draw what a detector finds in images and videos"),
    "export": Command("export_model", "write a detector as a file that needs no Detectron2"),
    "check": Command("check_dataset", "print what is wrong in datasets"),
    "inspect": Command("inspect_dataset", "show what is imbalanced in datasets"),
    "analyze": Command("analyze_errors", "show where a detector loses AP"),
    "contact-sheet": Command("contact_sheet", "draw detections beside the ground truth"),
    "plot-training": Command("plot_training", "plot curves of training runs"),
    "plot-sampling": Command("plot_sampling", "plot which negatives are sampled"),
    "plot-features": Command("plot_features", "draw the pyramid before and after balancing"),
    "web-demo": Command("web_demo", "show a detector on a page in the browser"),
    "convert-mmdet": Command("convert_mmdet_weights", "convert MMDetection's Libra R-CNN"),
    "convert-torchvision": Command(
        "convert_torchvision_weights", "convert a COCO detector of torchvision"
    ),
    "benchmark": Command("benchmark", "measure this project against plain Detectron2"),
}

# Files that import nothing of this project, so that they also run without it.
ALONE: Dict[str, Command] = {
    "run-exported": Command("export/run_exported.py", "run an exported file, without Detectron2"),
    "install-detectron2": Command(
        "installation/install_detectron2.py", "install Detectron2 without compiling it"
    ),
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command.

    Args:
        argv: its name and its arguments, by default those of the process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in COMMANDS | ALONE:
        _parser().parse_args(arguments or ["--help"])
    name, *rest = arguments
    command = COMMANDS.get(name) or ALONE[name]
    # As if the command were a program of its own.
    sys.argv = [f"{PROGRAM} {name}", *command.arguments, *rest]
    if name in ALONE:
        path = Path(__file__).parent / command.module
        code = compile(path.read_bytes(), path, "exec")
        # Not by runpy, which puts the name of the file into sys.argv.
        exec(code, {"__name__": "__main__", "__file__": str(path)})
        raise AssertionError(f"{path} has to end with sys.exit")
    try:
        program = importlib.import_module(f"balanced_d2.commands.{command.module}")
    except ImportError as error:
        if error.name not in REQUIRED:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    if command.module == "train":
        from balanced_d2.engine import run

        return run(program.main, program.parse_args())
    return report_user_errors(program.main, program.parse_args())


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS | ALONE))
    lines = [f"  {name:<{width}}  {c.help}" for name, c in (COMMANDS | ALONE).items()]
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description="Balanced learning (Libra R-CNN) for Detectron2.",
        epilog="\n".join(["commands:", *lines, "", f"{PROGRAM} COMMAND --help says more."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=balanced_d2.__version__)
    parser.add_argument("command", choices=COMMANDS | ALONE, metavar="COMMAND", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
