"""The package. Everything that is data stands in setup() below; pyproject.toml names the build tools.

The compiled library `megatron_r1/lib/kernels.so` is made by tools/build_csrc.py where torch and a C++ compiler are, which with pip
means `--no-build-isolation`; elsewhere one line says why not and the package is pure Python, whose operations are plain torch.
MEGATRON_R1_BUILD_EXT=1 makes that an error, =0 skips on purpose; MEGATRON_R1_BUILD_CUDA=1 requires nvcc, =0 does without.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import lru_cache
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.build import build

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit("expected: setuptools >= 77\n   found: an older one\n      do: pip install -U setuptools") from None

ROOT = Path(__file__).resolve().parent


def _load_build_csrc():  # tools/ is not a package, and nothing of it is installed
    spec = importlib.util.spec_from_file_location("build_csrc", ROOT / "tools" / "build_csrc.py")
    module = sys.modules["build_csrc"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


csrc = _load_build_csrc()


def requirements(name: str) -> list[str]:
    """Lines of a requirements file, without comments and pip options."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


@lru_cache(maxsize=1)
def kernels_skipped() -> str | None:
    """None when the library is to be built, else why not. Stops with the error when that was forbidden."""
    try:
        setting = csrc.ext_setting()
        if setting == "skip":
            return f"{csrc.EXT_VARIABLE}=0"
        csrc.find_toolchain(csrc.cuda_setting())
    except csrc.ToolMissing as error:
        # Asking for CUDA by name is asking for the library.
        if setting == "require" or csrc.cuda_setting() == "require":
            raise SystemExit(f"\n{error}\n") from None
        return f"expected {error.expected}; found {error.found}"
    except csrc.BuildError as error:
        raise SystemExit(f"\n{error}\n") from None
    return None


class BuildKernels(Command):
    """A part of `build`: compiles csrc/ into megatron_r1/lib/kernels.so, in an editable installation beside the sources."""

    description = "compile csrc/ into megatron_r1/lib/kernels.so"
    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def _target(self) -> Path:
        return csrc.LIBRARY if self.editable_mode else Path(self.build_lib) / csrc.LIBRARY.relative_to(ROOT)

    def run(self) -> None:
        reason = kernels_skipped()
        if reason is not None:
            print(f"[csrc] not built: {reason}; operations are plain torch", flush=True)
            if not self.editable_mode:
                self._target().unlink(missing_ok=True)  # of an earlier build in the same folder
            return
        try:
            csrc.build(self._target(), csrc.cuda_setting(), say=lambda line: print(line, flush=True))
        except csrc.BuildError as error:
            raise SystemExit(f"\n{error}\n") from None

    def get_source_files(self) -> list[str]:
        found = [path for path in csrc.CSRC.rglob("*") if path.is_file()]
        return [path.relative_to(ROOT).as_posix() for path in (*found, ROOT / "tools" / "build_csrc.py")]

    def get_outputs(self) -> list[str]:
        return [str(self._target())] if kernels_skipped() is None else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class Package(Distribution):
    """With the library the package belongs to a platform, without it to all."""

    def has_ext_modules(self) -> bool:
        return kernels_skipped() is None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library has no Python symbols and keeps to torch's stable ABI: one wheel for every Python of a platform."""
        platform = super().get_tag()[2]
        return "py3", "none", platform if kernels_skipped() is None else "any"


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
        # Tokenises some fifty times faster where its ids are the plain library's; tiktoken proves the import of its rank files.
        "fast": ["gigatoken>=0.10,<0.11", "tiktoken>=0.12"],
        # The corpus stage on many machines (tools/preprocess_cluster.py).
        "cluster": ["datatrove>=0.10", "ray>=2.40"],
        "gpu": ["transformer-engine[pytorch]", "nvidia-dali-cuda120"],
        "warc": ["fastwarc>=2.0", "resiliparse>=2.0"],
        "stores": ["s3fs", "aiohttp"],  # s3:// and https://; hf:// comes with transformers
        "tests": requirements("tests.txt"),
    },
    entry_points={"console_scripts": ["megatron-r1=megatron_r1.cli:main"]},
    distclass=Package,
    cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
