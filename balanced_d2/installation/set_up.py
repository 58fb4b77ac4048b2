#!/usr/bin/env python3
"""Build the environment that the project is tested in: what ``make setup`` runs.

Needs nothing but Python. In a virtual environment of its own it installs the exact versions of
``requirements.txt``, an OpenCV that imports on this machine, Detectron2
(``install_detectron2.py``) and the project itself.

An environment is ready when it has the file ``.ready``. One that is not, since its set-up was
interrupted or failed, is built again from the start, so that it ends as if nothing had happened;
pip keeps what it has downloaded. Every failure is one line on standard error and exit code 1.
"""

from __future__ import annotations  # so that check_python gets to run on an old one

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from install_detectron2 import (  # type: ignore[import-not-found]  # beside this file
    InstallError,
    import_failure,
)

ROOT = Path(__file__).resolve().parent.parent.parent
# Its requirements are in requirements.txt, but for opencv-python, which it would bring back.
WITHOUT_REQUIREMENTS = ["lvis==0.5.3"]
OPENCV, HEADLESS = "opencv-python", "opencv-python-headless"
DEBIAN_PACKAGES = "libgl1 libglib2.0-0 libxcb1"  # what OpenCV's wheels look for
UNFINISHED = ".set-up-unfinished"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="FOLDER")
    parser.add_argument(
        "--pip-args",
        default="",
        metavar="ARGS",
        help="more arguments for pip install, such as an index to take PyTorch from",
    )
    args = parser.parse_args()
    try:
        check_python()
        set_up(args.venv.absolute(), shlex.split(args.pip_args))
    except (InstallError, OSError) as error:
        print(f"set-up: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; the next run starts again", file=sys.stderr)
        return 130
    return 0


def check_python() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  # it is run with any
        raise InstallError(
            f"Python 3.11 or newer is needed, {sys.executable} is {version}; name another one: "
            "make setup PYTHON=python3.12"
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise InstallError(
            f"{sys.executable} cannot make virtual environments; on Debian and Ubuntu: "
            "apt-get install python3-venv"
        )


def set_up(venv: Path, pip_args: list[str]) -> None:
    """Make ``venv`` ready."""
    ready, unfinished = venv / ".ready", venv / UNFINISHED
    if unfinished.exists():
        say(f"{venv} was not finished: building it again")
        shutil.rmtree(venv)
    elif venv.exists() and not ready.exists() and any(venv.iterdir()):
        raise InstallError(
            f"{venv} is there, but not from a set-up of this project; move it away, or name "
            "another folder: make setup VENV=.venv-balanced"
        )
    venv.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    ready.unlink(missing_ok=True)
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"making {venv} with {sys.executable}")
        run_step("make the virtual environment", [sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    requirements = ROOT / "requirements.txt"
    run_step("install requirements.txt", [*pip, *pip_args, "-r", str(requirements)])
    run_step(
        f"install {' '.join(WITHOUT_REQUIREMENTS)}",
        [*pip, *pip_args, "--no-deps", *WITHOUT_REQUIREMENTS],
    )
    install_opencv(python, [*pip, *pip_args], pinned_version(requirements, OPENCV))
    installer = Path(__file__).with_name("install_detectron2.py")
    run_step("install Detectron2", [str(python), str(installer)])
    run_step("install the project", [*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    for module in ("torch", "torchvision", "cv2", "detectron2", "balanced_d2"):
        failure = import_failure(python, module)
        if failure:
            raise InstallError(f"{module} is installed but does not import: {failure}")
    unfinished.unlink()
    ready.touch()


def install_opencv(python: Path, pip: list[str], version: str) -> None:
    """See to it that ``cv2`` imports: without a desktop that takes OpenCV's build without windows.

    Raises:
        InstallError: if neither build imports, with what to install.
    """
    failure = import_failure(python, "cv2")
    if failure is None:
        return
    if "cannot open shared object file" not in failure:
        raise InstallError(f"{OPENCV} is installed but does not import: {failure}")
    missing = re.findall(r"[\w.+-]+\.so[\w.]*", failure)
    say(
        f"{OPENCV} needs {missing[0]}, which this machine does not have: putting {HEADLESS} in its "
        "place. It opens no windows, which demo.py without --output needs, --webcam too; for them: "
        f"apt-get install {DEBIAN_PACKAGES}, then make clean setup"
    )
    # Both at once, since their files have the same names.
    uninstall = [str(python), "-m", "pip", "uninstall", "-q", "-y", OPENCV, HEADLESS]
    run_step(f"remove {OPENCV}", uninstall)
    run_step(f"install {HEADLESS}", [*pip, f"{HEADLESS}=={version}"])
    failure = import_failure(python, "cv2")
    if failure:
        raise InstallError(
            f"neither {OPENCV} nor {HEADLESS} imports on this machine ({failure}); install what "
            f"they need, on Debian and Ubuntu: apt-get install {DEBIAN_PACKAGES}"
        )


def pinned_version(requirements: Path, package: str) -> str:
    match = re.search(rf"^{re.escape(package)}==(\S+)", requirements.read_text(), re.MULTILINE)
    if match is None:
        raise InstallError(f"{requirements} has no line {package}==VERSION")
    return match.group(1)


def run_step(what: str, command: list[str]) -> None:
    """Run a command whose output is the user's to see.

    Raises:
        InstallError: if it fails, with its last line of error.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    errors = []
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            if line.strip():
                errors.append(line.strip())
        returncode = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has been interrupted, too
        raise
    if returncode:
        marked = [error for error in errors if re.match(r"ERROR:|\w+: error:", error)]
        error = (marked or errors or [f"exit code {returncode}"])[-1].removeprefix("ERROR: ")
        if "No space left on device" in error:
            error += " (about 8 GB are needed)"
        raise InstallError(f"could not {what}: {error}; when that is settled, run this again")


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
