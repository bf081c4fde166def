"""The library that csrc/ gives, and the packages setup.py makes of it: what they contain, what they depend on, what happens where
a tool is absent. The library is built with CUDA where nvcc is, without elsewhere; objects are cached in build/csrc."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


def _load_build_csrc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_csrc_for_build", ROOT / "tools" / "build_csrc.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


csrc = _load_build_csrc()


@cache
def toolchain():  # skips where nothing can be compiled
    try:
        return csrc.find_toolchain("auto")
    except csrc.ToolMissing as error:
        pytest.skip(f"expected {error.expected}; found {error.found}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rooms."""
    toolchain()
    return csrc.build(tmp_path_factory.mktemp("library") / "kernels.so", "auto", jobs=1)


def output(*command: str | Path, **options) -> str:
    if not shutil.which(str(command[0])):
        pytest.skip(f"expected {command[0]} (binutils); found none")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True, **options).stdout


def python(code: str, library: Path) -> str:
    """Output of a fresh process that uses this library."""
    environment = {**os.environ, "MEGATRON_R1_KERNELS": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------------------------------------------ what the library depends on


def test_needs_torch_and_the_system_alone(library: Path) -> None:
    """CUDA's runtime is inside: the file must load beside any CUDA a torch brings, and beside none."""
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", library))
    system = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux.*"
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not re.fullmatch(system, name)] == ["libtorch_cpu.so"]
    assert not re.search(r"\((RPATH|RUNPATH)\)", output("readelf", "-d", library)), "no path of the building machine"


def test_uses_no_python_and_only_the_stable_part_of_torch(library: Path) -> None:
    undefined = [line.split()[-1].split("@")[0] for line in output("nm", "-D", "--undefined-only", library).splitlines()]
    assert [name for name in undefined if name.startswith("aoti_torch_")], "nothing of torch is used?"
    python_symbols = [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]
    assert not python_symbols
    # C++ names of torch are not stable between releases; the stable ABI is C functions (aoti_torch_*, torch_*).
    unstable = [name for name in undefined if re.match(r"_Z\w*?(2at|3c10|5torch|6caffe2)", name)]
    assert not unstable
    assert not [name for name in undefined if re.match(r"cu[A-Z]|cuda|__cuda|nv", name)], "CUDA must be linked statically"


def test_shows_nothing_but_its_own_note(library: Path) -> None:
    """Symbols of other libraries (CUDA's static runtime above all) must not collide with another copy in the process."""
    defined = [line.split() for line in output("nm", "-D", "--defined-only", library).splitlines()]
    strong = {words[-1].split("@")[0] for words in defined if words[-2] in "TDBR"}
    assert strong - {"__bss_start", "_edata", "_end"} == {"mr1_build_info"}  # the linker's own marks
    assert not [words[-1] for words in defined if re.match(r"_?_?cuda|cu[A-Z]|_Z\w*?3mr1", words[-1])]


# ------------------------------------------------------------------------------------------------ what it offers


def test_loads_and_tells_what_it_is(library: Path) -> None:
    told = python("from megatron_r1.ops import extension as e; print(e.missing()); print(e.build_info())", library).splitlines()
    assert told[0] == "None"
    info = eval(told[1])
    assert info["torch"] == torch.__version__
    assert info["sources"] == csrc.source_hash()
    assert info["rooms"] == ",".join(csrc.ROOMS)
    cuda = "none"
    if toolchain().nvcc and csrc.sources()[1]:
        cuda = "sm_80,sm_90a,compute_90"
    assert info["cuda"] == cuda


def declared() -> dict[str, set[str]]:
    """Operator -> keys (CPU, CUDA) by the words of the bindings."""
    operators: dict[str, set[str]] = {}
    for path in (ROOT / "csrc").glob("*/binding.cpp"):
        text = path.read_text()
        for name in re.findall(r'm\.def\(\s*"(\w+)\(', text):
            operators.setdefault(name, set())
        for key, body in re.findall(r"STABLE_TORCH_LIBRARY_IMPL\(megatron_r1, (\w+), m\) \{(.*?)\n\}", text, re.DOTALL):
            for name in re.findall(r'm\.impl\(\s*"(\w+)"', body):
                operators.setdefault(name, set()).add(key)
    return operators


def test_every_operator_has_its_kernels(library: Path) -> None:
    operators = declared()
    assert operators, "no operator found in csrc/*/binding.cpp: has their style changed?"
    with_cuda = toolchain().nvcc is not None and bool(csrc.sources()[1])
    code = (
        "import torch\nfrom megatron_r1.ops import extension\nassert extension.missing() is None\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"for name in {sorted(operators)!r}: getattr(torch.ops.megatron_r1, name); print(name, *[k for k in ('CPU', 'CUDA') if has('megatron_r1::' + name, k)])\n"
    )
    registered = {line.split()[0]: set(line.split()[1:]) for line in python(code, library).splitlines()}
    for name, keys in operators.items():
        assert "CPU" in keys, f"{name} runs on every machine"
        assert registered[name] == keys if with_cuda else keys - {"CUDA"}, name


def test_a_room_includes_its_own_headers_and_the_shared_ones() -> None:
    """The build compiles a room anew when these change, and no others."""
    broken = []
    for room in csrc.ROOMS:
        for path in (ROOT / "csrc" / room).iterdir():
            for name in re.findall(r'^\s*#\s*include\s+"(.+?)"', path.read_text(), re.M):
                if name.split("/")[0] not in (room, "mr1"):
                    broken.append(f"{path.relative_to(ROOT)}: {name}")
    assert not broken


def test_cuda_sources_are_free_of_torch() -> None:
    """So that nvcc needs no torch, and the emulator can run them."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh")]
    broken = [str(path.relative_to(ROOT)) for path in files if re.search(r"#\s*include\s+[<\"](torch|ATen|c10|mr1/torch_glue)", path.read_text())]
    assert files
    assert not broken


# ------------------------------------------------------------------------------------------------ packages


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as setup.py sees it, with a csrc/ that compiles in a moment."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copytree(ROOT / "megatron_r1", folder / "megatron_r1", ignore=ignore)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "build_csrc.py", folder / "tools")
    for name in ("library.cpp", "include/mr1/types.h", "include/mr1/torch_glue.h"):
        (folder / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "csrc" / name, folder / "csrc" / name)
    return folder


def setup(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in (csrc.EXT_VARIABLE, csrc.CUDA_VARIABLE)}
    return subprocess.run([sys.executable, "setup.py", "-q", *arguments], capture_output=True, text=True, cwd=project, env={**clean, **environment}, timeout=120)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.fixture(autouse=True)
def _setuptools(request: pytest.FixtureRequest) -> None:
    if "project" in request.fixturenames and importlib.util.find_spec("setuptools") is None:
        pytest.skip("expected setuptools; found none")


def test_wheel_with_the_library_serves_every_python(project: Path, tmp_path: Path) -> None:
    toolchain()
    done = setup(project, "bdist_wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    wheel = only_file(tmp_path)
    assert re.fullmatch(r"megatron_r1-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "megatron_r1/lib/kernels.so" in names
    assert not [name for name in names if name.split("/")[0] not in ("megatron_r1",) and ".dist-info/" not in name], "the package alone"
    assert not (project / "megatron_r1" / "lib" / "kernels.so").exists(), "building a wheel leaves the sources as they are"


@pytest.mark.parametrize("how", ["skipped", "no compiler"])
def test_wheel_without_the_library_serves_every_machine(how: str, project: Path, tmp_path: Path) -> None:
    environment = {csrc.EXT_VARIABLE: "0"} if how == "skipped" else {"CXX": "no-such-compiler"}
    done = setup(project, "bdist_wheel", "-d", str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    wheel = only_file(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    (line,) = [line for line in done.stdout.splitlines() if "[csrc]" in line]
    assert "not built" in line
    assert (csrc.EXT_VARIABLE if how == "skipped" else "no-such-compiler") in line


@pytest.mark.parametrize("variable", ["MEGATRON_R1_BUILD_EXT", "MEGATRON_R1_BUILD_CUDA"])
def test_what_was_required_is_not_skipped(variable: str, project: Path, tmp_path: Path) -> None:
    done = setup(project, "bdist_wheel", "-d", str(tmp_path), CXX="no-such-compiler", **{variable: "1"})
    assert done.returncode != 0
    for part in ("expected:", "found:", "do:", "no-such-compiler"):
        assert part in done.stderr
    assert not list(tmp_path.iterdir())


def test_broken_code_is_no_reason_to_skip(project: Path, tmp_path: Path) -> None:
    toolchain()
    library = project / "csrc" / "library.cpp"
    text = library.read_text()
    library.write_text(text + "\nint broken(\n")
    try:
        done = setup(project, "bdist_wheel", "-d", str(tmp_path))
    finally:
        library.write_text(text)
    assert done.returncode != 0
    assert "library.cpp:" in done.stderr
    assert not list(tmp_path.iterdir())


def test_editable_puts_the_library_beside_the_sources(project: Path, tmp_path: Path) -> None:
    toolchain()
    library = project / "megatron_r1" / "lib" / "kernels.so"
    try:
        done = setup(project, "editable_wheel", "-d", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert library.exists()
        assert csrc.build_info(toolchain(), ()).split(";")[1].encode() in library.read_bytes()
    finally:
        library.unlink(missing_ok=True)


def test_sdist_can_build_what_it_carries(project: Path, tmp_path: Path) -> None:
    toolchain()
    done = setup(project, "sdist", "-d", str(tmp_path / "sdist"))
    assert done.returncode == 0, done.stderr
    with tarfile.open(only_file(tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = only_file(tmp_path / "unpacked")
    for name in ("csrc/library.cpp", "csrc/include/mr1/types.h", "tools/build_csrc.py", "requirements/core.txt", "LICENSE"):
        assert (unpacked / name).exists(), name
    assert not list(unpacked.rglob("*.so"))
    done = setup(unpacked, "bdist_wheel", "-d", str(tmp_path / "wheel"), **{csrc.EXT_VARIABLE: "1"})
    assert done.returncode == 0, done.stderr
    assert "megatron_r1/lib/kernels.so" in zipfile.ZipFile(only_file(tmp_path / "wheel")).namelist()
