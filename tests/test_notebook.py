"""notebooks/tutorial.ipynb: all of its cells run in order, as in Jupyter."""

import json
import os
import re
import subprocess
import sys

import pytest

from .conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"

# What Jupyter does with `!`: a shell, with the values of Python in braces; and nothing is shown.
BEFORE = """
import re, subprocess

def shell(command):
    command = re.sub(r"\\{(.+?)\\}", lambda found: str(eval(found[1])), command)
    subprocess.run(command, shell=True, check=True)
"""


def cells(kind):
    content = json.loads(NOTEBOOK.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_nothing_of_a_machine_is_in_it():
    for cell in cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
    assert not re.search(r"/(home|root|work|tmp|Users)/", NOTEBOOK.read_text())


def test_links():
    for cell in cells("markdown"):
        for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
            assert (NOTEBOOK.parent / target).is_file(), target


def as_python(source):
    """The code of a cell without Jupyter's ``!``."""
    joined = source.replace("\\\n", " ")
    return re.sub(r"^!(.*)$", lambda found: f"shell({found[1]!r})", joined, flags=re.MULTILINE)


def test_own_data_and_environment(tmp_path, monkeypatch):
    """The first cell takes any folder for the data, and no command needs to be on the PATH."""
    first, *others = ("".join(cell["source"]) for cell in cells("code"))
    assert "\nDATA = SHAPES\n" in first
    own = tmp_path / "own"
    (own / "val").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first.replace("DATA = SHAPES", f"DATA = Path({str(own)!r})"), names)
    assert [path.name for path in own.iterdir()] == ["val"]
    assert names["BALANCED_D2"] == f'"{sys.executable}" -m balanced_d2'
    commands = re.findall("^!(.*)", "\n".join(others), re.MULTILINE)
    assert len(commands) == 4 and all(c.startswith("{BALANCED_D2} ") for c in commands)


@pytest.mark.slow
def test_it_runs(tmp_path):
    program = BEFORE + "\n".join(as_python("".join(cell["source"])) for cell in cells("code"))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "output" / "tutorial"
    for name in ("training/model_final.pth", "training/training.png", "exported/model.ts"):
        assert (folder / name).is_file()
    # The exported file finds what the model finds.
    trained, exported = re.findall(r"\[[\d, ]+\]", result.stdout)[-2:]
    assert trained == exported and max(json.loads(trained)) > 0
