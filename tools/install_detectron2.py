#!/usr/bin/env python3
"""Install Detectron2 0.6 as a pure-Python wheel that runs on today's PyTorch.

PyPI has no ``detectron2``. It has ``pb1-detectron2`` 0.6, a source archive with the Python code of
Detectron2's release 0.6 but without its C++ sources, so pip cannot build it as it is. This script

1. does nothing if ``detectron2`` already imports;
2. downloads that archive with pip and checks its sha256 before anything in it runs;
3. adapts it to current PyTorch, NumPy, Pillow and setuptools (the tables below, each entry of
   which has to apply exactly as often as it says) and replaces the compiled operators with a
   placeholder that says how to get them;
4. builds the wheel ``detectron2`` 0.6 in a temporary folder and installs it with pip.

Until the last step nothing outside the temporary folder is touched. Every failure is one line on
standard error and exit code 1.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ARCHIVE = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"


class InstallError(Exception):
    """Something the user has to know; shown as one line."""


class Substitution(NamedTuple):
    """Replace ``old`` by ``new`` in ``path``, where ``old`` must occur exactly ``times`` times."""

    path: str
    old: str
    new: str
    times: int = 1


# The placeholder for `detectron2._C`. `import detectron2._C` itself keeps failing, so that code
# which probes for the operators is told the truth.
PLACEHOLDER_PATH = "detectron2/utils/compiled_operators.py"
PLACEHOLDER = '''\
"""Stands in for Detectron2's compiled operators, which this pure-Python build leaves out."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"'{name}' is one of Detectron2's compiled operators, which this pure-Python build of "
        "Detectron2 0.6 leaves out (deformable convolution, rotated boxes, C++ COCO evaluation). "
        "To get them: uninstall this build (pip uninstall detectron2) and compile Detectron2 from "
        "source, see https://detectron2.readthedocs.io/tutorials/install.html"
    )
'''
IMPORT_COMPILED = "from detectron2 import _C\n"
IMPORT_PLACEHOLDER = "from detectron2.utils import compiled_operators as _C\n"

SUBSTITUTIONS = [
    # Compiled operators: importing the modules works, asking for an operator explains itself.
    Substitution("detectron2/layers/deform_conv.py", IMPORT_COMPILED, IMPORT_PLACEHOLDER),
    Substitution(
        "detectron2/layers/deform_conv.py",
        "        super(DeformConv, self).__init__()\n",
        "        _C.deform_conv_forward\n        super(DeformConv, self).__init__()\n",
    ),
    Substitution(
        "detectron2/layers/deform_conv.py",
        "        super(ModulatedDeformConv, self).__init__()\n",
        "        _C.modulated_deform_conv_forward\n"
        "        super(ModulatedDeformConv, self).__init__()\n",
    ),
    Substitution("detectron2/layers/roi_align_rotated.py", IMPORT_COMPILED, IMPORT_PLACEHOLDER),
    Substitution(
        "detectron2/layers/roi_align_rotated.py",
        "        super(ROIAlignRotated, self).__init__()\n",
        "        _C.roi_align_rotated_forward\n        super(ROIAlignRotated, self).__init__()\n",
    ),
    Substitution("detectron2/layers/rotated_boxes.py", IMPORT_COMPILED, IMPORT_PLACEHOLDER),
    Substitution(
        "detectron2/layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(",
        f"    {IMPORT_PLACEHOLDER}\n    return _C.nms_rotated(",
    ),
    Substitution("detectron2/evaluation/fast_eval_api.py", IMPORT_COMPILED, IMPORT_PLACEHOLDER),
    # pycocotools' own COCOeval serves instead of the C++ one.
    Substitution(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "from pycocotools.cocoeval import COCOeval as COCOeval_opt\n",
    ),
    # Caffe2 is no longer part of PyTorch.
    Substitution("detectron2/export/__init__.py", "from .api import *\n", ""),
    # Image.LINEAR is gone from Pillow; BILINEAR is the same filter.
    Substitution("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # What torch.meshgrid does by default, said as it asks for.
    Substitution(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
    ),
    # NumPy's aliases of Python's own types are gone.
    Substitution("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Substitution("detectron2/data/build.py", "dtype=np.int)", "dtype=int)"),
    Substitution("detectron2/data/datasets/pascal_voc.py", "dtype=np.str)", "dtype=str)"),
    Substitution("detectron2/evaluation/pascal_voc_evaluation.py", "(np.bool)", "(bool)", 2),
    Substitution("detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.int)", "dtype=int)", 2),
    Substitution(
        "detectron2/evaluation/sem_seg_evaluation.py", "dtype=np.float)", "dtype=float)", 2
    ),
    Substitution("detectron2/evaluation/sem_seg_evaluation.py", "(np.float)", "(float)", 3),
    Substitution("detectron2/structures/masks.py", "(np.bool)", "(bool)", 2),
    Substitution("detectron2/structures/masks.py", "dtype=np.bool)", "dtype=bool)"),
    Substitution("detectron2/utils/video_visualizer.py", "dtype=np.bool)", "dtype=bool)"),
    Substitution("detectron2/utils/visualizer.py", "(np.bool)", "(bool)", 3),
    # pkg_resources is gone from setuptools.
    Substitution("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Substitution(
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", ',
        "os.path.join(\n        os.path.dirname(__file__), ",
    ),
    # Packaging: upstream's name, no extension modules, the archive's own configs, no stale pins.
    Substitution("setup.py", '    name="pb1-detectron2",\n', '    name="detectron2",\n'),
    Substitution("setup.py", "    ext_modules=get_extensions(),\n", ""),
    Substitution(
        "setup.py", '    cmdclass={"build_ext": torch.utils.cpp_extension.BuildExtension},\n', ""
    ),
    Substitution("setup.py", "get_model_zoo_configs()},", '["configs/**/*.yaml"]},'),
    Substitution("setup.py", '"iopath>=0.1.7,<0.1.10"', '"iopath>=0.1.9"'),
    Substitution("setup.py", '        "black==21.4b2",\n', ""),
    Substitution("setup.py", '        "future",  # used by caffe2\n', ""),
    Substitution("setup.py", '        "pydot",  # used to save caffe2 SVGs\n', ""),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="the source archive, if it is already here (default: download it with pip)",
    )
    args = parser.parse_args()
    try:
        version = detectron2_version()
        if version:
            say(f"detectron2 {version} is already installed")
            return 0
        require_build_tools()
        with tempfile.TemporaryDirectory(prefix="install-detectron2-") as tmp:
            archive = args.archive or download(Path(tmp))
            source = unpack(archive, Path(tmp) / "source")
            adapt(source)
            install(build_wheel(source, Path(tmp) / "wheel"))
    except (InstallError, OSError) as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("install_detectron2: interrupted; nothing was installed", file=sys.stderr)
        return 130
    return 0


def detectron2_version() -> str | None:
    """The version of the Detectron2 that imports here (in a process of its own), if any."""
    result = run([sys.executable, "-c", "import detectron2; print(detectron2.__version__)"])
    if result.returncode == 0:
        return result.stdout.split()[-1]
    if "No module named 'detectron2'" in result.stderr:
        return None
    raise InstallError(
        "detectron2 is installed but does not import "
        f"({last_line(result.stderr)}); mend it, or remove it: pip uninstall detectron2"
    )


def require_build_tools() -> None:
    for module, requirement in (("torch", "torch torchvision"), ("setuptools", "setuptools")):
        if importlib.util.find_spec(module) is None:
            raise InstallError(
                f"{module} is not installed for {sys.executable}, and Detectron2 needs it to "
                f"install; run first: pip install {requirement}"
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
            "With a copy of the archive at hand, pass it with --archive FILE"
        )
    return next((folder / "archive").iterdir())


def unpack(archive: Path, folder: Path) -> Path:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise wrong_checksum(str(archive), digest)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.iterdir())


def wrong_checksum(what: str, got: str) -> InstallError:
    return InstallError(
        f"wrong checksum: {what} has sha256 {got}, expected {SHA256}; nothing was installed"
    )


def adapt(source: Path, substitutions=SUBSTITUTIONS) -> None:
    """Apply every substitution to the unpacked archive and add the placeholder module.

    Raises:
        InstallError: naming each substitution that does not apply exactly as often as expected.
    """
    failures = []
    for substitution in substitutions:
        path = source / substitution.path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = text.count(substitution.old)
        if found != substitution.times:
            failures.append(
                f"{substitution.path}: {substitution.old.strip()!r} found {found} times, "
                f"expected {substitution.times}"
            )
            continue
        path.write_text(text.replace(substitution.old, substitution.new), encoding="utf-8")
    if failures:
        raise InstallError(
            "the source archive is not the one this script knows; substitutions that do not "
            "apply: " + "; ".join(failures)
        )
    (source / PLACEHOLDER_PATH).write_text(PLACEHOLDER, encoding="utf-8")


def build_wheel(source: Path, folder: Path) -> Path:
    say("building the wheel detectron2 0.6")
    result = pip("wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(source))
    if result.returncode != 0:
        raise InstallError(f"could not build the wheel ({pip_error(result)})")
    return next(folder.iterdir())


def install(wheel: Path) -> None:
    say("installing it")
    result = pip("install", str(wheel))
    if result.returncode != 0:
        raise InstallError(f"could not install the wheel ({pip_error(result)})")
    say(f"installed detectron2 {detectron2_version()}")


def pip(*arguments: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments])


def run(command) -> subprocess.CompletedProcess:
    # From the root folder, so that no detectron2 beside the user's own files is taken for it.
    return subprocess.run(
        command, capture_output=True, text=True, cwd=os.path.abspath(os.sep), check=False
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
