"""All but this is in setup.cfg, which cannot say that a folder beside the package belongs to it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["balanced_d2*"]), "balanced_d2.configs"],
    package_dir={"balanced_d2.configs": "configs"},
)
