"""Configs, in YAML and in Python: the project's keys, loading and checks."""

import balanced_d2.modeling  # noqa: F401  # registers the names in configs

# isort: split
from balanced_d2.config.defaults import CONFIG_KEYS, add_balanced_config
from balanced_d2.config.yaml_config import load_config

__all__ = ["CONFIG_KEYS", "add_balanced_config", "load_config"]
