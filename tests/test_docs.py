"""Every command and every piece of Python in the README and the other pages is run unchanged.

They run in order and in one folder, as for a reader: later pages use the README's results. Only
training and measurements are shortened, by wrappers around the programs.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest

from .conftest import ROOT, has_localhost, write_bccd, write_coco

pytestmark = pytest.mark.slow

PAGES = ["README.md", "CONTRIBUTING.md", "MODEL_ZOO.md", "CHANGELOG.md"]
PAGES += sorted(
    str(page.relative_to(ROOT))
    for pattern in ("docs/*.md", "studies/*/README.md")
    for page in ROOT.glob(pattern)
)
MARK = "not run by the tests: "
# For what is not available on this machine, or is run elsewhere.
REASONS = "needs |it runs them|takes (half an?|four) |it serves until it is stopped"


class Block(NamedTuple):
    place: str
    language: str
    text: str
    why_not: str


def blocks(page):
    pattern = r"(?:<!-- ([^\n]*) -->\n)?^( *)```(sh|python)\n(.*?)^ *```$"
    text = (ROOT / page).read_text()
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        comment, indent, language, content = match.groups()
        content = re.sub(f"^{indent}", "", content, flags=re.MULTILINE)
        line = text.count("\n", 0, match.start(3)) + 1
        yield Block(f"{page}:{line}", language, content, (comment or "").removeprefix(MARK))


BLOCKS = [block for page in PAGES for block in blocks(page)]

# Wrapper around `python` and `torchrun`, with options that make the programs short.
SHORT = """#!/bin/bash
case "$*" in
    *benchmark.py*) short=(--turns 1 --scale 0.05 --only parts) ;;
    *train_net.py*) short=(SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 1
        INPUT.MIN_SIZE_TRAIN "(64,)" INPUT.MIN_SIZE_TEST 64 MODEL.RPN.POST_NMS_TOPK_TEST 20) ;;
    *plot_sampling.py*) short=(SOLVER.IMS_PER_BATCH 1) ;;
esac
exec {program} "$@" "${{short[@]}}"
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder that looks like a clone of the project after `make setup`, with the data that the
    pages mention; and the environment for running commands in it."""
    folder = tmp_path_factory.mktemp("reader") / "balanced_d2"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "output", "datasets"):
            (folder / path.name).symlink_to(path)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    installed = Path(sys.executable).parent
    for path in installed.iterdir():
        if path.name not in ("python", "torchrun", "balanced-d2"):
            (programs / path.name).symlink_to(path)
    for name, program in {
        "python": shlex.quote(sys.executable),
        "torchrun": f"{shlex.quote(sys.executable)} -m torch.distributed.run",
        "balanced-d2": f"{shlex.quote(sys.executable)} -m balanced_d2",
    }.items():
        (programs / name).write_text(SHORT.format(program=program))
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".ready").touch()

    own = write_coco(folder / "own", num_images=4)
    (folder / "images").symlink_to(own.parent / "images")
    for split in ("train", "val"):
        (folder / f"{split}.json").symlink_to(own)
    cv2.imwrite(str(folder / "photo.jpg"), cv2.imread(str(folder / "images" / "1.jpg")))
    write_bccd(folder / "datasets")
    environment = {
        **{k: v for k, v in os.environ.items() if k != "DETECTRON2_DATASETS"},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # pip says what it would install, but does not change the environment.
        "PIP_DRY_RUN": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way of switching it off
        "OMP_NUM_THREADS": "1",
    }
    return folder, environment


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_block(reader, block):
    if block.why_not:
        pytest.skip(block.why_not)
    if "torchrun" in block.text and not has_localhost():
        pytest.skip("localhost has no address here")
    folder, environment = reader
    program = ["bash", "-eux"] if block.language == "sh" else [sys.executable, "-W", "ignore"]
    result = subprocess.run(
        program,
        input=block.text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def test_blocks_that_are_not_run_have_a_reason():
    assert len(BLOCKS) > 20
    for block in BLOCKS:
        assert re.match(REASONS, block.why_not) or not block.why_not, block.place
    # Most blocks are run.
    assert sum(bool(block.why_not) for block in BLOCKS) <= len(BLOCKS) / 3


def targets(page):
    """A page's links to files and pictures of the project."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures(page):
    for target in targets(page):
        path, _, heading = target.partition("#")
        file = ((ROOT / page).parent / path) if path else ROOT / page
        assert file.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            # In GitHub's form.
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in anchors, target
        if file.suffix in (".png", ".webp"):
            assert file.stat().st_size <= 150 * 1024, target
