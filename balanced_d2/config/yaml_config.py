"""YAML configs, with errors that name the key."""

import difflib
import re
from typing import Any, FrozenSet, Iterator, Mapping, Sequence, Tuple

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from balanced_d2.config.checks import check_names
from balanced_d2.config.defaults import CONFIG_KEYS, add_balanced_config
from balanced_d2.config.pixels import complete_pixels
from balanced_d2.utils.errors import UserError, raise_user_errors

# Exceptions from yacs and the YAML parser for mistakes in a config.
MISTAKES = (AssertionError, KeyError, TypeError, ValueError, yaml.YAMLError)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CN:
    """Load the defaults of Detectron2, this project and ``CONFIG_KEYS``, a YAML file, and then
    ``KEY VALUE`` pairs.

    Raises:
        UserError: naming the file or key that is wrong.
    """
    cfg = get_cfg()
    add_balanced_config(cfg)
    for _, add_keys in CONFIG_KEYS:
        add_keys(cfg)

    def explain(error: Exception) -> str:
        return _explain(error, cfg)

    if config_file:
        with raise_user_errors(f"config file {config_file}", *MISTAKES, explain=explain):
            cfg.merge_from_file(config_file, allow_unsafe=False)
    if len(opts) % 2:
        raise UserError(f"config options come as KEY VALUE pairs; {opts[-1]!r} has no value")
    with raise_user_errors("command line", *MISTAKES, explain=explain):
        cfg.merge_from_list(list(opts))
    check_names(cfg)
    complete_pixels(cfg)
    return cfg


def set_by_hand(config_file: str, opts: Sequence[str] = ()) -> FrozenSet[str]:
    """The keys that stand in a YAML file, in its ``_BASE_`` files or in the options, and so have no
    defaults. For what :func:`load_config` has accepted."""
    content = CN.load_yaml_with_base(config_file) if config_file else {}
    return frozenset((*(key for key, _ in flat(content)), *opts[::2]))


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Keys such as ``MODEL.ROI_HEADS.NUM_CLASSES``, with their values."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _explain(error: Exception, cfg: CN) -> str:
    """The error of yacs or the YAML parser, reworded for the user."""
    if isinstance(error, yaml.YAMLError):
        return " ".join(f"not valid YAML: {error}".split())
    message = str(error.args[0]) if error.args else type(error).__name__
    unknown = re.match(r"Non-existent (?:config )?key: (\S+)", message)
    if unknown:
        close = difflib.get_close_matches(unknown[1], _keys(cfg), n=1)
        return f"there is no key {unknown[1]}" + (f"; did you mean {close[0]}?" if close else "")
    mismatch = re.match(
        r"Type mismatch \(<class '(\w+)'> vs. <class '(\w+)'>\) with values \((.*) vs. (.*)\) "
        r"for config key: (\S+)",
        message,
        re.DOTALL,
    )
    if mismatch:
        expected, got, old, new, key = mismatch.groups()
        message = f"{key} is {new} ({got}), but it has to be of type {expected}, such as {old}"
        if key.startswith("DATASETS.") and (expected, got) == ("tuple", "str"):
            message += f"; write ('{new}',), with the comma"
    return message


def _keys(node: CN, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{key}.")
