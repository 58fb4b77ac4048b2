#!/usr/bin/env python3
"""Build the environment in which the project is tested: this is ``make setup``.

Needs nothing but Python. Into a new virtual environment, it installs the exact versions in
``requirements.txt``, an OpenCV that can be imported on this machine, Detectron2
(``install_detectron2.py``) and the project itself.

An environment is ready when it has the file ``.ready``. If its set-up was interrupted or failed, it
is built again from the start; pip keeps its downloads. Every failure is one line on standard error
and exit code 1.
"""

from __future__ import annotations  # so that check_python can run on an old Python

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
# Its requirements are in requirements.txt, except opencv-python, which it would install again.
WITHOUT_REQUIREMENTS = ["lvis==0.5.3"]
OPENCV, HEADLESS = "opencv-python", "opencv-python-headless"
DEBIAN_PACKAGES = "libgl1 libglib2.0-0 libxcb1"  # the libraries that OpenCV's wheels need
UNFINISHED = ".set-up-unfinished"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="FOLDER")
    parser.add_argument(
        "--pip-args",
        default="",
        metavar="ARGS",
        help="further arguments for pip install, such as another index for PyTorch",
    )
    args = parser.parse_args()
    try:
        check_python()
        set_up(args.venv.absolute(), shlex.split(args.pip_args))
    except (InstallError, OSError) as error:
        print(f"set-up: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; run it again to start over", file=sys.stderr)
        return 130
    return 0


def check_python() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  # any version may run this
        raise InstallError(
            f"Python 3.11 or newer is needed, but {sys.executable} is {version}; use another one: "
            "make setup PYTHON=python3.12"
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise InstallError(
            f"{sys.executable} cannot create virtual environments; on Debian and Ubuntu, run: "
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
            f"{venv} exists, but is not from a set-up of this project; move it away, or use "
            "another folder: make setup VENV=.venv-balanced"
        )
    venv.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    ready.unlink(missing_ok=True)
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"creating {venv} with {sys.executable}")
        run_step("create the virtual environment", [sys.executable, "-m", "venv", str(venv)])
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
            raise InstallError(f"{module} is installed but cannot be imported: {failure}")
    unfinished.unlink()
    ready.touch()


def install_opencv(python: Path, pip: list[str], version: str) -> None:
    """Make sure that ``cv2`` imports; without a desktop, only OpenCV's headless build does.

    Raises:
        InstallError: if neither build can be imported, with the packages to install.
    """
    failure = import_failure(python, "cv2")
    if failure is None:
        return
    if "cannot open shared object file" not in failure:
        raise InstallError(f"{OPENCV} is installed but cannot be imported: {failure}")
    missing = re.findall(r"[\w.+-]+\.so[\w.]*", failure)
    say(
        f"{OPENCV} needs {missing[0]}, which this machine does not have: installing {HEADLESS} "
        "instead. It cannot open windows, which demo.py without --output needs, also with "
        f"--webcam; to have them, run: apt-get install {DEBIAN_PACKAGES}, then make clean setup"
    )
    # Both together, because their files have the same names.
    uninstall = [str(python), "-m", "pip", "uninstall", "-q", "-y", OPENCV, HEADLESS]
    run_step(f"remove {OPENCV}", uninstall)
    run_step(f"install {HEADLESS}", [*pip, f"{HEADLESS}=={version}"])
    failure = import_failure(python, "cv2")
    if failure:
        raise InstallError(
            f"neither {OPENCV} nor {HEADLESS} can be imported on this machine ({failure}); install "
            f"the libraries they need; on Debian and Ubuntu, run: apt-get install {DEBIAN_PACKAGES}"
        )


def pinned_version(requirements: Path, package: str) -> str:
    match = re.search(rf"^{re.escape(package)}==(\S+)", requirements.read_text(), re.MULTILINE)
    if match is None:
        raise InstallError(f"{requirements} has no line {package}==VERSION")
    return match.group(1)


def run_step(what: str, command: list[str]) -> None:
    """Run a command and show its output.

    Raises:
        InstallError: if it fails, with its last error line.
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
        process.wait()  # Ctrl-C has interrupted it too
        raise
    if returncode:
        marked = [error for error in errors if re.match(r"ERROR:|\w+: error:", error)]
        error = (marked or errors or [f"exit code {returncode}"])[-1].removeprefix("ERROR: ")
        if "No space left on device" in error:
            error += " (about 8 GB are needed)"
        raise InstallError(f"could not {what}: {error}; fix this and run it again")


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
