#!/usr/bin/env python3
"""Install Detectron2 0.6 as a complete pure-Python wheel for current PyTorch.

PyPI has no ``detectron2``. It has ``pb1-detectron2`` 0.6, a source archive with the Python code of
Detectron2's release 0.6 but without its C++ sources, so pip cannot build it as it is. This program

1. does nothing if this or another Detectron2 is already installed;
2. downloads that archive with pip and checks its sha256 before anything in it runs;
3. adapts it to current PyTorch, NumPy, Pillow and setuptools: it applies the substitutions below,
   each exactly the stated number of times, and adds the modules in ``wheel/``, which implement the
   compiled operators with PyTorch and torchvision;
4. builds the wheel in a temporary folder and installs it with pip. Its version is
   ``0.6+pure.`` and a digest of all this, so that a wheel built by another version of this program
   is recognized and replaced.

Before the last step, nothing outside the temporary folder changes; if that step is interrupted,
the next run removes its leftovers, but no Detectron2 that is not from this program. Every failure
is one line on standard error and exit code 1.
"""

from __future__ import annotations  # so that set_up.py can run, and stop, on an old Python

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ARCHIVE = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# Our modules, each replacing the archive's module with the same path.
MODULES = Path(__file__).parent / "wheel"


class InstallError(Exception):
    """A failure, shown to the user as one line."""


class Substitution(NamedTuple):
    """Replace the regular expression ``old`` with ``new`` in the files that match the glob
    ``path``, where it has to occur ``times`` times in total."""

    path: str
    old: str
    new: str
    times: int = 1


SUBSTITUTIONS = [
    # NumPy no longer has aliases of Python's own types.
    Substitution("detectron2/**/*.py", r"\bnp\.(bool|float|int|str)\b", r"\1", 19),
    # PyTorch's own schedulers are no longer subclasses of _LRScheduler.
    Substitution(
        "detectron2/**/*.py", r"\blr_scheduler\._LRScheduler\b", "lr_scheduler.LRScheduler", 7
    ),
    # Pillow no longer has Image.LINEAR; BILINEAR is the same filter.
    Substitution("detectron2/data/transforms/transform.py", r"Image\.LINEAR", "Image.BILINEAR"),
    # random.sample accepts only sequences.
    Substitution(
        "detectron2/data/common.py",
        r"sample\(self\._fallback_candidates,",
        "sample(sorted(self._fallback_candidates),",
    ),
    # setuptools no longer has pkg_resources.
    Substitution("detectron2/model_zoo/model_zoo.py", r"import pkg_resources\n", ""),
    Substitution(
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", ',
        "os.path.join(os.path.dirname(__file__), ",
    ),
    # A key that is read but has no default.
    Substitution(
        "detectron2/config/defaults.py",
        r"(_C\.DATALOADER\.REPEAT_THRESHOLD = 0\.0\n)",
        r"\1_C.DATALOADER.RANDOM_SUBSET_RATIO = 1.0\n",
    ),
    # torch.meshgrid's default, made explicit as it requests.
    Substitution(
        "detectron2/modeling/anchor_generator.py",
        r"meshgrid\(shifts_y, shifts_x\)",
        'meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    # The module that registers torch.ops.detectron2.nms_rotated.
    Substitution(
        "detectron2/layers/nms.py",
        r"(from torchvision\.ops import boxes as box_ops.*\n)",
        r"\1from . import rotated_boxes  # noqa: F401\n",
    ),
    Substitution(
        "detectron2/utils/collect_env.py",
        r'f"not built correctly: \{e\}"',
        '"left out: pure-Python build, with the operators of PyTorch and torchvision"',
    ),
    # Packaging: upstream's name, no extension modules, all configs, no stale pins.
    Substitution("setup.py", r'name="pb1-detectron2"', 'name="detectron2"'),
    Substitution("setup.py", r'python_requires=">=3\.6"', 'python_requires=">=3.10"'),
    Substitution("setup.py", r"    ext_modules=get_extensions\(\),\n    cmdclass=.*\n", ""),
    Substitution(
        "setup.py", r"get_model_zoo_configs\(\)\}", '["configs/**/*.yaml", "configs/**/*.py"]}'
    ),
    Substitution("setup.py", r'"iopath>=0\.1\.7,<0\.1\.10"', '"iopath>=0.1.9"'),
    Substitution("setup.py", r'"black==21\.4b2"', '"black", "faster-coco-eval>=1.7"'),
    Substitution("setup.py", r' *"(future|pydot)",  # used .*\n', "", 2),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="a copy of the source archive (default: download it with pip)",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FOLDER",
        help="only write the wheel, for any machine and Python, to a folder",
    )
    args = parser.parse_args()
    try:
        if args.wheel is None and is_installed():
            return 0
        require_build_tools()
        with tempfile.TemporaryDirectory(prefix="install-detectron2-") as tmp:
            archive = args.archive or download(Path(tmp))
            source = unpack(archive, Path(tmp) / "source")
            adapt(source)
            wheel = build_wheel(source, Path(tmp) / "wheel")
            if args.wheel is None:
                install(wheel)
            else:
                args.wheel.mkdir(parents=True, exist_ok=True)
                say(f"wrote {shutil.copy(wheel, args.wheel)}")
    except (InstallError, OSError) as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted; run it again", file=sys.stderr)
        return 130
    return 0


def is_installed() -> bool:
    """Whether this or another Detectron2 is installed and can be imported."""
    remove_leftovers()
    version, is_ours = installed_detectron2()
    if version is None:
        return False
    if is_ours and version != wheel_version():
        say(f"replacing detectron2 {version}, which another version of this program installed")
        return False
    require_import("detectron2")
    say(f"detectron2 {version} is already installed")
    return True


def wheel_version() -> str:
    """Version of the wheel that this program builds."""
    digest = hashlib.sha256()
    for path in (Path(__file__), *sorted(MODULES.rglob("*.py"))):
        digest.update(path.read_bytes())
    return f"0.6+pure.r{digest.hexdigest()[:8]}"


def installed_detectron2() -> tuple[str | None, bool]:
    """Version of the installed Detectron2, if any, and whether this program built it."""
    try:
        distribution = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        if run([sys.executable, "-c", FIND.format("detectron2")]).returncode:
            return None, False
        return "(without metadata)", False  # for example on PYTHONPATH
    # Wheels from earlier versions of this program had no version of their own.
    had_placeholder = Path(str(distribution.locate_file(""))) / EARLIER_MODULE
    is_ours = "+pure." in distribution.version or had_placeholder.exists()
    return distribution.version, is_ours


EARLIER_MODULE = "detectron2/utils/compiled_operators.py"
FIND = "import sys, importlib.util; sys.exit(importlib.util.find_spec({!r}) is None)"


def require_import(module: str) -> None:
    """Raise :class:`InstallError` if an installed module cannot be imported."""
    failure = import_failure(sys.executable, module)
    if failure is None:
        return
    if failure.startswith("cv2") and "cannot open shared object file" in failure:
        failure += (
            "; OpenCV's headless build needs fewer libraries: pip uninstall -y opencv-python, then "
            "pip install opencv-python-headless"
        )
    raise InstallError(f"{module} is installed but cannot be imported: {failure}")


def import_failure(python: str | Path, module: str) -> str | None:
    """Why a module cannot be imported in a process of its own, None if it can.

    Names the package that fails, which may be one that ``module`` imports, and the reason.
    """
    result = run([str(python), "-c", f"import {module}"])
    if result.returncode == 0:
        return None
    reason = last_line(result.stderr)
    if result.returncode < 0:
        reason = f"the process was ended by signal {-result.returncode}"
    files = re.findall(r'^  File ".*?site-packages/([\w.-]+)', result.stderr, re.MULTILINE)
    package = files[-1].removesuffix(".py") if files else module
    if reason.startswith("ModuleNotFoundError"):
        package, reason = f"a requirement of {package}", reason.split(": ", 1)[-1]
    return f"{package} fails ({reason})"


def require_build_tools() -> None:
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"pip is not installed for {sys.executable}, but Detectron2's installation needs it; "
            f"first run: {sys.executable} -m ensurepip (in an environment of uv: uv pip install "
            "pip)"
        )
    for module, requirement in (("torch", "torch torchvision"), ("setuptools", "setuptools")):
        if importlib.util.find_spec(module) is None:
            raise InstallError(
                f"{module} is not installed for {sys.executable}, but Detectron2's installation "
                f"needs it; first run: pip install {requirement}"
            )


def download(folder: Path) -> Path:
    """Download the archive. pip checks the hash before it runs anything in the archive."""
    say(f"downloading {ARCHIVE} from PyPI")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{ARCHIVE} --hash=sha256:{SHA256}\n")
    result = pip(
        "download",
        "--no-deps",
        "--no-build-isolation",  # its setup.py imports torch
        "--no-binary=:all:",
        "--require-hashes",
        f"--dest={folder / 'archive'}",
        f"--requirement={requirements}",
    )
    if "DO NOT MATCH THE HASHES" in result.stderr:
        got = re.search(r"Got\s+(\w+)", result.stderr)
        raise wrong_checksum(f"{ARCHIVE} from PyPI", got.group(1) if got else "another")
    if result.returncode != 0:
        raise InstallError(
            f"could not download {ARCHIVE} from PyPI ({pip_error(result)}); is there a network? "
            "If you have a copy of the archive, pass it with --archive FILE"
        )
    return next((folder / "archive").iterdir())


def unpack(archive: Path, folder: Path) -> Path:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise wrong_checksum(str(archive), digest)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(folder)
    return next(folder.iterdir())


def wrong_checksum(what: str, got: str) -> InstallError:
    return InstallError(
        f"wrong checksum: {what} has sha256 {got}, expected {SHA256}; nothing was installed"
    )


def adapt(source: Path, substitutions=SUBSTITUTIONS, modules: Path = MODULES) -> None:
    """Apply all substitutions to the unpacked archive and replace its modules with ours.

    Raises:
        InstallError: naming each substitution that does not apply exactly as often as expected,
            and each module that has no counterpart in the archive.
    """
    failures = []
    for substitution in substitutions:
        found = 0
        for path in sorted(source.glob(substitution.path)):
            text = path.read_text(encoding="utf-8")
            text, count = re.subn(substitution.old, substitution.new, text)
            if count:
                path.write_text(text, encoding="utf-8")
            found += count
        if found != substitution.times:
            failures.append(
                f"{substitution.path}: {substitution.old!r} found {found} times, "
                f"expected {substitution.times}"
            )
    for module in sorted(modules.rglob("*.py")):
        path = module.relative_to(modules)
        if not (source / path).is_file():
            failures.append(f"{path}: to be replaced, but does not exist")
            continue
        shutil.copyfile(module, source / path)
    if failures:
        raise InstallError(
            "the source archive is not the expected one; changes that do not apply: "
            + "; ".join(failures)
        )


def build_wheel(source: Path, folder: Path) -> Path:
    say("building the wheel")
    result = pip(
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={folder}",
        str(source),
        # Appended to the version by Detectron2's setup.py.
        D2_VERSION_SUFFIX=wheel_version().removeprefix("0.6"),
        SOURCE_DATE_EPOCH="1634256000",  # makes the build reproducible
    )
    if result.returncode != 0:
        raise InstallError(f"could not build the wheel ({pip_error(result)})")
    return next(folder.iterdir())


def install(wheel: Path) -> None:
    say(f"installing detectron2 {wheel_version()}")
    marker = leftover_marker()
    marker.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        sizes = {file.filename: file.file_size for file in archive.infolist()}
    marker.write_text(json.dumps(sizes))
    # By name, so that pip does not record the path of a temporary file.
    result = pip("install", f"detectron2=={wheel_version()}", f"--find-links={wheel.parent}")
    if result.returncode != 0:
        raise InstallError(f"could not install the wheel ({pip_error(result)}); run this again")
    marker.unlink()
    require_import("detectron2")
    say("done")


def leftover_marker() -> Path:
    """A file that exists while pip installs, and afterwards only if pip did not finish.

    It has the sizes of the wheel's files, by which leftovers are recognized.
    """
    folder = sysconfig.get_path("purelib")
    if not os.access(folder, os.W_OK):  # then pip uses the user's own
        folder = site.getusersitepackages()
    return Path(folder) / "install_detectron2_unfinished"


def remove_leftovers() -> None:
    """Remove the leftovers of an installation that was interrupted or failed, unless another
    Detectron2 has been installed there since."""
    marker = leftover_marker()
    if not marker.exists():
        return
    try:
        sizes = json.loads(marker.read_text())
    except ValueError:  # pip had not started, or it is from an earlier version of this program
        sizes = {}
    if are_leftovers(marker.parent, sizes):
        say("removing the leftovers of an interrupted installation")
        for pattern in ("detectron2", "detectron2-*", "~etectron2*"):
            for path in marker.parent.glob(pattern):
                shutil.rmtree(path)
    marker.unlink()
    importlib.invalidate_caches()


def are_leftovers(folder: Path, sizes: dict[str, int]) -> bool:
    """Whether all that a folder has of Detectron2 is from this program.

    Args:
        sizes: by path, the sizes in bytes of the files of the wheel that was being installed.
    """
    metadata = list(folder.glob("?etectron2-*"))
    if metadata:
        return all("+pure." in path.name for path in metadata)
    # pip writes them last; and one file may be cut off.
    files = [path for path in (folder / "detectron2").rglob("*") if path.is_file()]
    return all(
        path.stat().st_size <= sizes.get(path.relative_to(folder).as_posix(), -1)
        for path in files
        if path.suffix != ".pyc"
    )


def pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return run(command, **environment)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    # From the root folder, so that no detectron2 in the current folder is imported instead.
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=os.path.abspath(os.sep),
        env={**os.environ, **environment},
        check=False,
    )


def pip_error(result: subprocess.CompletedProcess) -> str:
    errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
    return errors[0] if errors else last_line(result.stderr)


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def say(text: str) -> None:
    print(f"install_detectron2: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
