"""The package's parts import only from lower levels: CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import balanced_d2

from .conftest import run_program

PACKAGE = Path(balanced_d2.__file__).parent
LEVELS = (
    {"utils"},
    {"layers", "checkpoint"},
    {"modeling"},
    {"config", "data"},
    {"evaluation", "analysis", "export"},
    {"visualization"},
    {"engine"},
    {"detection", "model_zoo", "benchmark"},
    {"commands"},
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
APART = {"installation"}  # runs before the package can be imported


def imports(file: Path):
    """Names of the modules that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_of_imports(part: str):
    files = [*(PACKAGE / part).rglob("*.py"), *PACKAGE.glob(f"{part}.py")]
    for file in sorted(files):
        for name in imports(file):
            package, _, rest = name.partition(".")
            if package == "balanced_d2" and rest:
                yield file, rest.partition(".")[0]


def test_every_part_has_a_level():
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    parts |= {path.stem for path in PACKAGE.glob("[!_]*.py")}
    assert parts == LEVEL.keys() | APART


def test_parts_import_only_from_lower_levels():
    for part, level in LEVEL.items():
        for file, imported in parts_of_imports(part):
            assert imported == part or LEVEL[imported] < level, f"{file} imports {imported}"


def test_messages_name_commands_not_scripts():
    """Who has installed the wheel has ``balanced-d2``, but not the scripts that call it."""
    named = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.is_relative_to(PACKAGE / "installation"):  # of a clone
            continue
        tree = ast.parse(file.read_text())
        nodes = list(ast.walk(tree))
        unseen = [node.value for node in nodes if isinstance(node, ast.Expr)]  # docstrings
        if file.parent.name == "commands" and file.name != "__init__.py":
            unseen.remove(tree.body[0].value)  # but --help shows it
        named += [
            f"{file.name}:{node.lineno}: {node.value}"
            for node in nodes
            if isinstance(node, ast.Constant) and node not in unseen
            if re.search(r"tools/|train_net\.py|demo\.py", str(node.value))
        ]
    assert not named


def test_what_runs_alone_imports_nothing_of_the_package():
    for part in APART:
        assert not list(parts_of_imports(part))
    runner = PACKAGE / "export" / "run_exported.py"
    assert not [name for name in imports(runner) if name.startswith("balanced_d2")]


def test_parts_check_first_for_detectron2():
    """Before they import it, so that the message is ours, and the import quiet."""
    for part in LEVEL.keys() - {"utils", "layers", "commands"}:
        file = PACKAGE / part / "__init__.py"
        file = file if file.is_file() else PACKAGE / f"{part}.py"
        needed = (n for n in imports(file) if n.partition(".")[0] in ("balanced_d2", "detectron2"))
        first = next(needed)
        assert first in ("balanced_d2.utils.requirements", "balanced_d2.modeling"), file


def test_layers_need_no_detectron2():
    for file in sorted((PACKAGE / "layers").rglob("*.py")):
        assert not [name for name in imports(file) if name.startswith("detectron2")], file


def test_the_package_without_detectron2():
    """The layers work; parts that need Detectron2 say how to install it."""
    program = (
        "import sys\n"
        "sys.modules['detectron2'] = None\n"
        "import torch, balanced_d2.layers\n"
        "assert len(balanced_d2.layers.sample_iou_balanced(torch.rand(9), 4)) == 4\n"
        "import balanced_d2.{}\n"
    )
    for part in ("checkpoint", "config", "data", "engine", "modeling"):
        result = run_program("-W", "error", "-c", program.format(part))
        message = result.stderr.splitlines()[-1]
        assert "Detectron2 is not installed; run: balanced-d2 install-detectron2" in message
