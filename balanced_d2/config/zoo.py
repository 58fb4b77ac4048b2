"""Where the configs of this project are, in a clone and once it is installed."""

import difflib
import os
from pathlib import Path
from typing import List

from balanced_d2.utils.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """The folder ``configs``: inside the package once that is installed; in a clone, and where that
    is installed with ``pip install -e``, beside it."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def get_config_file(config_path: str) -> str:
    """The path of a config file of the model zoo.

    Args:
        config_path: in ``configs/``, such as
            ``"COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.yaml"``.

    Raises:
        UserError: if there is none of that name.
    """
    path = configs_folder() / config_path
    if path.is_file():
        return str(path)
    known = config_names()
    close = difflib.get_close_matches(config_path, known, n=3)
    meant = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(known)}"
    raise UserError(f"the model zoo has no {config_path}; {meant}")


def config_names() -> List[str]:
    """The names of all configs that describe a model, for :func:`get_config_file`."""
    folder = configs_folder()
    files = sorted([*folder.glob("*/*.yaml"), *folder.glob("*/*.py")])
    return [p.relative_to(folder).as_posix() for p in files if p.parent.name != "common"]


def find_config(file: str) -> str:
    """A config file as the user names it: a path or, where there is none, a name of the model zoo,
    with or without ``configs/``. What is neither is returned unchanged."""
    if not file or os.path.exists(file):
        return file
    of_zoo = configs_folder() / file.removeprefix("configs/")
    return str(of_zoo) if of_zoo.is_file() else file
