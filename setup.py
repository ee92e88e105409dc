"""Packages of the distribution; everything else is in pyproject.toml.

The configuration files stay in conf/, where users of a checkout edit them, and are installed as lora_one/conf/.
``lora_one.config.defaults.configuration_folder`` finds them in both places.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["lora_one*", "hydra_plugins*"]), "lora_one.conf"],
    package_dir={"lora_one.conf": "conf"},
    package_data={"lora_one": ["assets/**/*", "reports/templates/*"], "lora_one.conf": ["**/*.yaml"]},
)
