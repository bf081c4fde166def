"""The package. Everything that is data stands in setup() below; pyproject.toml names the build tools."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Lines of a requirements file, without comments and pip options."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


setup(
    name="megatron-r1",
    version=re.search(r'__version__ = "(.+?)"', (ROOT / "megatron_r1" / "__init__.py").read_text()).group(1),
    description="Train sub-billion reasoning models by the MobileLLM-R1 recipe, on megatron-core",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_r1", "megatron_r1.*"]),
    package_data={"megatron_r1.recipes": ["*.yaml", "parts/*.yaml"], "megatron_r1.report": ["templates/*"]},
    install_requires=requirements("core.txt"),
    extras_require={
        # torch and megatron-core stay out of install_requires: the right build of torch depends on the machine.
        "train": ["torch>=2.11", "megatron-core>=0.16.1,<0.20"],
        "gpu": ["transformer-engine[pytorch]", "nvidia-dali-cuda120"],
        "tests": requirements("tests.txt"),
    },
    entry_points={"console_scripts": ["megatron-r1=megatron_r1.cli:main"]},
)
