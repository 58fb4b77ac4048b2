"""tools/install_detectron2.py: its table, its failures, and what the wheel does without operators.

The real download and installation are tested by every set-up of the project.
"""

import importlib.util
import io
import subprocess
import sys
import tarfile
import venv

import pytest
import torch

from .conftest import ROOT, assert_told, run_program

SCRIPT = ROOT / "tools" / "install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
installer = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = installer
spec.loader.exec_module(installer)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Python in a new virtual environment, with pip and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture
def torch_only_python(bare_python, tmp_path):
    """The same, with modules of the names that the installer needs before it downloads."""
    for name in ("torch", "setuptools"):
        (tmp_path / "modules" / name).mkdir(parents=True)
        (tmp_path / "modules" / name / "__init__.py").touch()
    return bare_python, {"PYTHONPATH": str(tmp_path / "modules")}


def run_installer(python, *arguments, **env):
    return subprocess.run(
        [str(python), str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def assert_not_installed(python):
    result = subprocess.run([str(python), "-m", "pip", "list"], capture_output=True, text=True)
    assert result.returncode == 0 and "detectron2" not in result.stdout


def test_package_without_detectron2_names_the_installer(bare_python):
    result = subprocess.run(
        [str(bare_python), "-c", "import balanced_d2"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode != 0
    assert "run: python tools/install_detectron2.py" in result.stderr.splitlines()[-1]


def test_does_nothing_where_detectron2_imports():
    result = run_program(SCRIPT)
    assert result.returncode == 0
    assert "already installed" in result.stdout and "downloading" not in result.stdout


def test_without_torch(bare_python):
    assert_told(run_installer(bare_python), "torch is not installed", "pip install torch")
    assert_not_installed(bare_python)


def test_wrong_checksum(torch_only_python, tmp_path):
    python, env = torch_only_python
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    result = run_installer(python, "--archive", archive, **env)
    assert_told(result, "wrong checksum", str(archive), installer.SHA256)
    assert_not_installed(python)


def test_wrong_checksum_from_the_index(torch_only_python, tmp_path):
    """An index that serves another archive: pip refuses before anything in it runs."""
    python, env = torch_only_python
    ran = tmp_path / "ran"
    content = f"open({str(ran)!r}, 'w')".encode()
    info = tarfile.TarInfo("pb1-detectron2-0.6/setup.py")
    info.size = len(content)
    links = tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / "pb1-detectron2-0.6.tar.gz", "w:gz") as tar:
        tar.addfile(info, io.BytesIO(content))
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_CONFIG_FILE": "/dev/null"}
    assert_told(run_installer(python, **env), "wrong checksum", installer.SHA256)
    assert not ran.exists()
    assert_not_installed(python)


def test_without_network(torch_only_python):
    python, env = torch_only_python
    env |= {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    result = run_installer(python, **env)
    assert_told(result, "could not download", "is there a network?")
    assert_not_installed(python)


def test_missing_archive(torch_only_python, tmp_path):
    python, env = torch_only_python
    assert_told(run_installer(python, "--archive", tmp_path / "gone.tar.gz", **env), "gone.tar.gz")


def test_substitutions_apply_exactly_or_are_named(tmp_path):
    (tmp_path / "detectron2" / "utils").mkdir(parents=True)
    (tmp_path / "a.py").write_text("one two two")
    good = installer.Substitution("a.py", "two", "2", times=2)
    installer.adapt(tmp_path, [good])
    assert (tmp_path / "a.py").read_text() == "one 2 2"
    assert (tmp_path / installer.PLACEHOLDER_PATH).is_file()

    wrong = [
        installer.Substitution("a.py", "one", "1", times=3),
        installer.Substitution("gone.py", "x", "y"),
    ]
    with pytest.raises(installer.InstallError) as error:
        installer.adapt(tmp_path, wrong)
    assert "a.py: 'one' found 1 times, expected 3" in str(error.value)
    assert "gone.py: 'x' found 0 times, expected 1" in str(error.value)


def test_missing_operators_explain_themselves():
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("this Detectron2 has its compiled operators")
    from detectron2 import layers, model_zoo

    assert model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    for ask in (
        lambda: layers.DeformConv(4, 4, 3),
        lambda: layers.ModulatedDeformConv(4, 4, 3),
        lambda: layers.ROIAlignRotated(7, 1.0, 2),
        lambda: layers.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5),
    ):
        with pytest.raises(RuntimeError, match="compile Detectron2 from source"):
            ask()
