"""The wheel and the source archive, built and used as people do: from another folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from omegaconf import DictConfig

import balanced_d2
from balanced_d2 import load_config, model_zoo
from balanced_d2.__main__ import main
from balanced_d2.config.zoo import find_config
from balanced_d2.engine import argument_parser, run
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, run_program

FOLDERS = ("balanced_d2", "configs", "tools")
YAML = "COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.yaml"
LAZY = "COCO-Detection/balanced_retinanet_R_50_FPN_1x.py"


def checked_run(*command, **kwargs) -> subprocess.CompletedProcess:
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **kwargs
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result


def build_wheel(source: Path, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    checked_run(
        *pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheel, the source archive, and the wheel built from that."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, source)
    build = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    checked_run(sys.executable, "-W", "ignore", "-c", build, folder, cwd=source)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    build_wheel(source, folder)
    build_wheel(next((folder / "unpacked").iterdir()), folder / "again")
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The wheel installed in a folder of its own; gives a function that runs a command with it,
    and that folder."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
    checked_run(*pip, "--no-index", "--target", folder, next(dist.glob("*.whl")))
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run_installed(*command):
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        return checked_run(*command, cwd=elsewhere, env=env)

    return run_installed, folder


@pytest.mark.slow
def test_the_wheel_is_complete(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        described = wheel.read(metadata).decode()
        for path in (ROOT / "configs").rglob("*.*"):
            if "__pycache__" not in path.parts:
                name = f"balanced_d2/{path.relative_to(ROOT)}"
                assert wheel.read(name) == path.read_bytes()
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "balanced_d2").rglob("*.py")}
    configs = {name for name in names if name.startswith("balanced_d2/configs/")}
    assert names - configs == ours | {"balanced_d2/py.typed"}
    assert f"\nVersion: {balanced_d2.__version__}\n" in described
    assert "opencv" not in described.partition("Provides-Extra")[0].lower()
    with zipfile.ZipFile(next((dist / "again").glob("*.whl"))) as again:
        assert {name for name in again.namelist() if ".dist-info/" not in name} == names


@pytest.mark.slow
def test_train_and_detect_with_the_wheel(installed, tiny_coco, tmp_path):
    run_installed, folder = installed
    command = folder / "bin" / "balanced-d2"
    assert "install-detectron2" in run_installed(command, "--help").stdout
    version = run_installed(sys.executable, "-m", "balanced_d2", "--version").stdout
    assert version.strip() == balanced_d2.__version__

    images = tiny_coco.parent / "images"
    output = tmp_path / "output"
    run_installed(
        *(command, "train", "--config-file", TINY_CONFIG, "--register", "own", tiny_coco, images),
        *TINY_MODEL,
        *("DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "()", "MODEL.WEIGHTS", ""),
        *("SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", output),
    )
    result = run_installed(
        *(command, "detect", "--config-file", output / "config.yaml", "--input", images / "1.jpg"),
        *("--output", tmp_path / "pictures", "--confidence-threshold", "0"),
        *("MODEL.WEIGHTS", output / "model_final.pth"),
    )
    assert "1 of 1 input(s)" in result.stdout and (tmp_path / "pictures" / "1.jpg").is_file()


@pytest.mark.slow
def test_the_zoo_in_the_wheel(installed):
    run_installed, folder = installed
    program = (
        "from balanced_d2 import model_zoo\n"
        f"print(model_zoo.get_config_file({YAML!r}))\n"
        f"print(model_zoo.get_config({LAZY!r}).model.num_classes)\n"
    )
    path, number = run_installed(sys.executable, "-W", "ignore", "-c", program).stdout.split()
    assert Path(path) == folder / "balanced_d2" / "configs" / YAML and number == "80"


def test_the_zoo_in_a_clone():
    assert Path(model_zoo.get_config_file(YAML)) == ROOT / "configs" / YAML
    cfg = model_zoo.get_config(YAML)
    assert isinstance(cfg, CfgNode) and cfg == load_config(str(ROOT / "configs" / YAML))
    assert isinstance(model_zoo.get_config(LAZY), DictConfig)
    configs = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.*")}
    of_models = {p.as_posix() for p in configs if len(p.parts) == 2 and p.parts[0] != "common"}
    assert set(model_zoo.config_names()) == of_models
    with pytest.raises(UserError, match="did you mean COCO-Detection/balanced_faster_rcnn"):
        model_zoo.get_config_file(YAML.replace("rcnn", "rcn"))
    with pytest.raises(UserError, match="no trained weights"):
        model_zoo.get(YAML, trained=True)


@pytest.mark.parametrize("name", [YAML, LAZY])
def test_models_of_the_zoo(name, monkeypatch):
    loaded = []
    monkeypatch.setattr(model_zoo, "start_from", lambda model, path: loaded.append(path))
    model = model_zoo.get(name, device="cpu")
    assert model.training and {p.device.type for p in model.parameters()} == {"cpu"}
    assert loaded == [model_zoo.get_config(YAML).MODEL.WEIGHTS]


def test_a_config_is_found_by_path_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_zoo = str(ROOT / "configs" / YAML)
    assert find_config(YAML) == find_config(f"configs/{YAML}") == of_zoo
    assert find_config("") == "" and find_config("nothing.yaml") == "nothing.yaml"
    (tmp_path / "configs" / "COCO-Detection").mkdir(parents=True)
    (tmp_path / "configs" / YAML).touch()  # the user's own comes first
    assert find_config(f"configs/{YAML}") == f"configs/{YAML}"


WITHOUT_DETECTRON2 = """
import runpy, sys
sys.modules["detectron2"] = None
import balanced_d2
assert balanced_d2.__version__
sys.argv = ["balanced-d2", *sys.argv[1:]]
runpy.run_module("balanced_d2", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run-exported", "--help"], ["install-detectron2", "--help"]]
)
def test_without_detectron2(arguments):
    result = run_program("-W", "error", "-c", WITHOUT_DETECTRON2, *arguments)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["train", "detect", "analyze"])
def test_detectron2_is_missing(command):
    result = run_program("-c", WITHOUT_DETECTRON2, command, "--help")
    assert result.returncode == 2
    expected = "error: Detectron2 is not installed; run: balanced-d2 install-detectron2\n"
    assert result.stderr == expected


def test_importing_the_package_is_light():
    program = (
        "import sys, balanced_d2, balanced_d2.__main__\n"
        "assert not {'torch', 'detectron2', 'numpy', 'cv2'} & sys.modules.keys()\n"
        "assert 'load_config' in dir(balanced_d2)\n"
        "try: balanced_d2.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError\n"
    )
    result = run_program("-W", "error", "-c", program)
    assert result.returncode == 0, result.stderr


def test_unknown_and_missing_commands():
    result = run_program("-m", "balanced_d2", "trian")
    assert result.returncode == 2 and "'trian'" in result.stderr and "'train'" in result.stderr
    assert "balanced-d2 COMMAND" in run_program("-m", "balanced_d2").stdout


@pytest.mark.parametrize("name", ["run-exported", "install-detectron2", "check"])
def test_usage_says_what_was_typed(name, monkeypatch, capsys):
    """Also of the programs that are files which run alone."""
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code
    assert capsys.readouterr().out.startswith(f"usage: balanced-d2 {name} [-h] ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    "program, named",
    [
        ("balanced-d2 train", "-m balanced_d2 train"),
        ("/home/me/balanced-d2 x/train_net.py", "/home/me/balanced-d2 x/train_net.py"),
    ],
)
def test_the_command_names_itself_for_torchrun(program, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--num-gpus", "2"])
    args = argument_parser().parse_args()
    assert run(lambda args: None, args) == 2
    assert f"--nproc-per-node 2 {named} ..." in capsys.readouterr().err


def test_every_command_and_script_is_one_program():
    """Each script is its command, and says its name."""
    from balanced_d2.__main__ import ALONE, COMMANDS

    for name, command in COMMANDS.items():
        file = {"train": "train_net", "detect": "demo"}.get(command.module)
        path = ROOT / (f"{file}.py" if file else f"tools/{command.module}.py")
        text = path.read_text()
        assert f"from balanced_d2.commands.{command.module} import main, parse_args" in text
        assert name == "evaluate" or f"``balanced-d2 {name}``" in text
        assert (Path(balanced_d2.__file__).parent / "commands" / f"{command.module}.py").is_file()
    for command in ALONE.values():
        script = ROOT / "tools" / Path(command.module).name
        assert f'"balanced_d2/{command.module}"' in script.read_text()


def test_clean_keeps_trainings(tmp_path):
    """docs/install.md and set-up ask for ``make clean setup``."""
    made = (".venv/bin", "output/demo", "site", "datasets/balanced_shapes/train")
    kept = ("output/mine", "datasets/mine")
    for folder in made + kept:
        (tmp_path / folder).mkdir(parents=True)
    checked_run("make", "-f", ROOT / "Makefile", "clean", cwd=tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"output", "datasets", *kept}
