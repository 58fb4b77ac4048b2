"""Set-up: the installation of Detectron2, its failures, and the environment of ``make setup``.

The real downloads and installations are tested by every set-up of the project.
"""

import configparser
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

from .conftest import ROOT, assert_user_error, run_program

SCRIPT = ROOT / "tools" / "install_detectron2.py"
INSTALLATION = ROOT / "balanced_d2" / "installation"
sys.path.insert(0, str(INSTALLATION))  # the programs are stand-alone
import install_detectron2 as installer  # noqa: E402
import set_up  # noqa: E402

sys.path.remove(str(INSTALLATION))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Python in a new virtual environment, with pip and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture
def torch_only_python(bare_python, tmp_path):
    """The same, with dummies of the modules that the installer needs before it downloads."""
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
        [str(bare_python), "-c", "import balanced_d2.engine"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode != 0
    assert "run: balanced-d2 install-detectron2" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_does_nothing_where_detectron2_imports():
    result = run_program(SCRIPT)
    assert result.returncode == 0
    assert "already installed" in result.stdout and "downloading" not in result.stdout


def test_without_torch(bare_python):
    assert_user_error(run_installer(bare_python), "torch is not installed", "pip install torch")
    assert_not_installed(bare_python)


def test_wrong_checksum(torch_only_python, tmp_path):
    python, env = torch_only_python
    archive = tmp_path / "pb1-detectron2-0.6.tar.gz"
    archive.write_bytes(b"something else")
    result = run_installer(python, "--archive", archive, **env)
    assert_user_error(result, "wrong checksum", str(archive), installer.SHA256)
    assert_not_installed(python)


def test_wrong_checksum_from_the_index(torch_only_python, tmp_path):
    """If an index serves another archive, pip refuses it before anything in it runs."""
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
    assert_user_error(run_installer(python, **env), "wrong checksum", installer.SHA256)
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
    assert_user_error(result, "could not download", "is there a network?")
    assert_not_installed(python)


def test_missing_archive(torch_only_python, tmp_path):
    python, env = torch_only_python
    assert_user_error(
        run_installer(python, "--archive", tmp_path / "gone.tar.gz", **env), "gone.tar.gz"
    )


def test_substitutions_apply_exactly_or_are_named(tmp_path):
    source, modules = tmp_path / "source", tmp_path / "modules"
    (source / "package").mkdir(parents=True)
    (modules / "package").mkdir(parents=True)
    (source / "a.py").write_text("one two two")
    (source / "package" / "b.py").write_text("two")
    (modules / "package" / "b.py").write_text("ours")
    good = installer.Substitution("**/*.py", r"tw(o)\b", r"2\1", times=3)
    installer.adapt(source, [good], modules)
    assert (source / "a.py").read_text() == "one 2o 2o"
    assert (source / "package" / "b.py").read_text() == "ours"

    (modules / "gone.py").touch()
    wrong = [
        installer.Substitution("a.py", "one", "1", times=3),
        installer.Substitution("gone.py", "x", "y"),
    ]
    with pytest.raises(installer.InstallError) as error:
        installer.adapt(source, wrong, modules)
    assert "a.py: 'one' found 1 times, expected 3" in str(error.value)
    assert "gone.py: 'x' found 0 times, expected 1" in str(error.value)
    assert "gone.py: to be replaced, but does not exist" in str(error.value)


def test_the_installed_wheel_is_from_this_version():
    version, is_ours = installer.installed_detectron2()
    if not is_ours:
        pytest.skip("another Detectron2 is installed")
    assert version == installer.wheel_version()
    from detectron2 import __version__, model_zoo
    from detectron2.export import Caffe2Tracer, add_export_config

    assert __version__ == "0.6"
    assert add_export_config({}) == {}
    with pytest.raises(RuntimeError, match="TracingAdapter"):
        Caffe2Tracer({}, None, None)
    for name in ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "common/models/fcos.py"):
        assert model_zoo.get_config_file(name)


@pytest.fixture
def site_packages(tmp_path):
    """A new virtual environment without pip: its Python, and its folder of packages."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    (folder,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    return python, folder


def write_package(folder, name, content="", version=None):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(content)
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


MISSING_LIBRARY = (
    "raise ImportError('libxcb.so.1: cannot open shared object file: No such file or directory')"
)


def test_a_failing_import_names_the_package_that_fails(site_packages):
    python, folder = site_packages
    write_package(folder, "detectron2", "import fvcore\n__version__ = '0.6'", version="0.6")
    write_package(folder, "fvcore", "import cv2")
    write_package(folder, "cv2", MISSING_LIBRARY)
    result = run_installer(python)
    assert_user_error(result, "cv2 fails", "libxcb.so.1", "pip install opencv-python-headless")
    (folder / "cv2" / "__init__.py").write_text("import nowhere")
    assert_user_error(run_installer(python), "requirement of cv2", "No module named 'nowhere'")
    (folder / "cv2" / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)")
    assert_user_error(run_installer(python), "detectron2 fails", "signal 11")
    (folder / "cv2" / "__init__.py").write_text("")
    result = run_installer(python)
    assert result.returncode == 0 and "0.6 is already installed" in result.stdout


def test_a_wheel_of_another_version_of_the_program_is_replaced(site_packages):
    python, folder = site_packages
    write_package(folder, "detectron2", version="0.6+pure.r00000000")
    assert_user_error(run_installer(python), "pip is not installed")  # it has started to install
    assert (folder / "detectron2").exists()


MARKER = "install_detectron2_unfinished"


def test_leftovers_of_an_interrupted_installation_are_removed(site_packages):
    python, folder = site_packages
    write_package(folder, "detectron2", version="0.6+pure.r00000000")
    write_package(folder, "other", version="1.0")
    (folder / MARKER).touch()
    result = run_installer(python)
    assert "removing the leftovers of an interrupted installation" in result.stdout
    assert_user_error(result, "pip is not installed")
    assert sorted(path.name for path in folder.iterdir()) == ["other", "other-1.0.dist-info"]


@pytest.fixture
def half_installed(tmp_path, monkeypatch):
    """A folder of packages in which pip has failed to install the wheel, after some of its files,
    the last of which is not complete."""
    folder, wheel = tmp_path / "packages", tmp_path / "detectron2-0.6+pure.r1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("__init__", "structures", "layers"):
            archive.writestr(f"detectron2/{name}.py", "a = 1  # a line")

    def fail(*arguments, **environment):
        write_package(folder, "detectron2", "a = 1  # a line")
        (folder / "detectron2" / "structures.py").write_text("a = 1  #")
        return subprocess.CompletedProcess(arguments, 1, "", "ERROR: no space")

    monkeypatch.setattr(installer.sysconfig, "get_path", lambda name: str(folder))
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(installer.InstallError, match="no space"):
        patch.setattr(installer, "pip", fail)
        installer.install(wheel)
    return folder


def test_leftovers_without_metadata_are_recognized(half_installed):
    (half_installed / "detectron2" / "__pycache__").mkdir()
    (half_installed / "detectron2" / "__pycache__" / "a.cpython-311.pyc").touch()
    installer.remove_leftovers()
    assert not list(half_installed.iterdir())


@pytest.mark.parametrize("kind", ["installed", "without metadata", "changed", "earlier marker"])
def test_another_detectron2_is_not_removed_for_leftovers(half_installed, kind):
    """One that the user has installed after an installation of ours had failed."""
    package = half_installed / "detectron2"
    if kind == "installed":
        (half_installed / "detectron2-0.6.dist-info").mkdir()
    elif kind == "without metadata":
        (package / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    elif kind == "changed":
        (package / "layers.py").write_text("a = 1  # a longer line")
    else:
        (half_installed / MARKER).write_text("")
    before = sorted(half_installed.rglob("*"))
    assert half_installed / MARKER in before
    installer.remove_leftovers()
    assert sorted([*half_installed.rglob("*"), half_installed / MARKER]) == before


def test_without_pip(site_packages):
    """As in an environment of uv."""
    python, _ = site_packages
    assert_user_error(run_installer(python), "pip is not installed", "-m ensurepip", "uv pip")


# --- The environment of `make setup` ---------------------------------------------------------


def write_wheel(folder, name, content, version="5.0"):
    """A wheel of the package ``cv2``."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(
        folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w"
    ) as zip:
        zip.writestr("cv2/__init__.py", content)
        zip.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        zip.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        names = ["cv2/__init__.py", *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD"))]
        zip.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))


@pytest.fixture
def opencv_index(bare_python, tmp_path, monkeypatch):
    """A folder of wheels to install from, and the Python to install into."""
    for variable, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(variable, value)
    pip = [str(bare_python), "-m", "pip"]
    yield tmp_path, bare_python, [*pip, "install", "-q"]
    subprocess.run([*pip, "uninstall", "-q", "-y", "opencv-python", "opencv-python-headless"])


def distributions(python):
    result = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True)
    return {line.split()[0] for line in result.stdout.splitlines()[2:]}


@pytest.mark.slow
def test_opencv_without_its_libraries_is_replaced_by_headless(opencv_index, capsys):
    folder, python, pip = opencv_index
    write_wheel(folder, "opencv-python", MISSING_LIBRARY)
    write_wheel(folder, "opencv-python-headless", "")
    subprocess.run([*pip, "opencv-python"], check=True)
    set_up.install_opencv(python, pip, "5.0")
    assert "opencv-python-headless" in distributions(python) - {"opencv-python"}
    assert "opencv-python" not in distributions(python)
    (line,) = capsys.readouterr().out.splitlines()
    for part in ("libxcb.so.1", "demo.py without --output", "--webcam", "apt-get install libgl1"):
        assert part in line
    # If it comes back, for example as a requirement of another package, it is replaced again.
    subprocess.run([*pip, "opencv-python"], check=True)
    set_up.install_opencv(python, pip, "5.0")
    assert "opencv-python" not in distributions(python)
    assert installer.import_failure(python, "cv2") is None
    # If it imports, nothing changes.
    set_up.install_opencv(python, pip, "5.0")
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.slow
def test_if_no_opencv_imports_the_message_says_what_to_install(opencv_index):
    folder, python, pip = opencv_index
    write_wheel(folder, "opencv-python", MISSING_LIBRARY)
    write_wheel(folder, "opencv-python-headless", MISSING_LIBRARY)
    subprocess.run([*pip, "opencv-python"], check=True)
    with pytest.raises(installer.InstallError) as error:
        set_up.install_opencv(python, pip, "5.0")
    assert "apt-get install libgl1 libglib2.0-0 libxcb1" in str(error.value)
    assert "libxcb.so.1" in str(error.value) and "\n" not in str(error.value)


def test_opencv_that_fails_otherwise_is_left_alone(opencv_index):
    folder, python, pip = opencv_index
    write_wheel(folder, "opencv-python", "import numpy_is_missing")
    subprocess.run([*pip, "opencv-python"], check=True)
    with pytest.raises(installer.InstallError, match="No module named 'numpy_is_missing'"):
        set_up.install_opencv(python, pip, "5.0")
    assert "opencv-python" in distributions(python)


@pytest.fixture
def steps(monkeypatch):
    """The steps of set-up, which are recorded instead of run, and the steps that fail."""
    done, fail_at = [], []

    def run_step(what, command):
        if what in fail_at:
            raise installer.InstallError(f"could not {what}")
        done.append(what)
        if "create the virtual environment" in what:
            venv.create(command[-1])

    monkeypatch.setattr(set_up, "run_step", run_step)
    monkeypatch.setattr(set_up, "import_failure", lambda python, module: None)
    return done, fail_at


def test_an_interrupted_set_up_starts_again(steps, tmp_path):
    done, fail_at = steps
    folder = tmp_path / "with a space" / ".venv"
    fail_at.append("install Detectron2")
    with pytest.raises(installer.InstallError):
        set_up.set_up(folder, [])
    assert not (folder / ".ready").exists()
    (folder / "half").touch()
    fail_at.clear()
    set_up.set_up(folder, [])
    assert (folder / ".ready").exists() and not (folder / "half").exists()
    assert done.count("create the virtual environment") == 2
    # An environment that is ready is updated in place.
    (folder / "mine").touch()
    done.clear()
    set_up.set_up(folder, [])
    assert "create the virtual environment" not in done and "install the project" in done
    assert (folder / ".ready").exists() and (folder / "mine").exists()


def test_a_users_environment_is_left_alone(steps, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(installer.InstallError, match="not from a set-up of this project"):
        set_up.set_up(tmp_path, [])
    assert (tmp_path / "mine").exists() and not steps[0]


@pytest.mark.slow
def test_ctrl_c_and_failures_of_set_up_are_one_line(tmp_path):
    """With pip arguments that make the first download fail, or hang until Ctrl-C."""
    command = [sys.executable, str(INSTALLATION / "set_up.py"), "--venv", str(tmp_path / "env")]
    environment = {
        **os.environ,
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    result = subprocess.run(
        [*command, "--pip-args=--index-url http://127.0.0.1:9/simple --no-cache-dir"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("set-up: error:")]
    assert len(errors) == 1 and "could not install requirements.txt" in errors[0]
    assert (tmp_path / "env" / set_up.UNFINISHED).exists()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        process = subprocess.Popen(
            [*command, f"--pip-args=--index-url {index} --no-cache-dir"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            # Where the tests run in the background, it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "set-up: interrupted" in error
    assert "Traceback" not in error


def test_set_up_refuses_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    with pytest.raises(installer.InstallError, match=r"3\.10\.1; use another one"):
        set_up.check_python()


@pytest.mark.parametrize("extra", ["docs", "onnx", "pretrained", "study", "test"])
def test_requirements_have_the_extras(extra):
    """No test is skipped in the environment of set-up for a package that an extra names."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    names = {name: set(re.findall(r"^[\w-]+", extras[name], re.MULTILINE)) for name in extras}
    assert names[extra]
    for name in names[extra]:
        assert set_up.pinned_version(ROOT / "requirements.txt", name)
    assert names["onnx"] <= names["test"]


def test_requirements_have_the_pins_that_set_up_needs():
    assert set_up.pinned_version(ROOT / "requirements.txt", "opencv-python").count(".") >= 2
    names = (ROOT / "requirements.txt").read_text()
    # It would install opencv-python again, beside opencv-python-headless.
    assert "\nlvis" not in names
