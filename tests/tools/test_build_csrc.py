"""The build's own logic, with toy sources and toy compilers: what is absent is skipped, what is broken is an error, what is
unchanged is not compiled again. What the real sources give is looked at in tests/csrc."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_csrc_under_test", ROOT / "tools" / "build_csrc.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


csrc = _load()
compiler = pytest.mark.skipif(not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler here")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (csrc.EXT_VARIABLE, csrc.CUDA_VARIABLE, "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc/ of one room without torch: library.cpp and room/cpu.cpp, which includes room/args.h."""
    for folder in ("include/mr1", "room", "other", "emulator"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    (tmp_path / "csrc/library.cpp").write_text('extern "C" const char* info() { return MR1_BUILD_INFO; }\n')
    (tmp_path / "csrc/room/args.h").write_text("inline int one() { return 1; }\n")
    (tmp_path / "csrc/room/cpu.cpp").write_text('#include "room/args.h"\nextern "C" int answer() { return one(); }\n')
    monkeypatch.setattr(csrc, "ROOT", tmp_path)
    monkeypatch.setattr(csrc, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(csrc, "OBJECTS", tmp_path / "build")
    monkeypatch.setattr(csrc, "ROOMS", ("room",))
    return tmp_path


@pytest.fixture
def build(tree: Path) -> Callable[..., list[str]]:
    def run(**options: object) -> list[str]:
        said: list[str] = []
        csrc.build(tree / "out" / "k.so", "off", ("room",), 1, said.append, **options)
        return said

    return run


@compiler
def test_only_what_changed_is_compiled(tree: Path, build: Callable[..., list[str]]) -> None:
    first = build()
    assert [line.split(" in ")[0] for line in first[:-1]] == ["[csrc] compiled csrc/room/cpu.cpp", "[csrc] compiled csrc/library.cpp"]
    assert first[-1].startswith("[csrc] built k.so")
    assert build() == ["[csrc] k.so is up to date: C++ only"]
    # A header of the room: its objects, and the library's note of what it is made from.
    (tree / "csrc/room/args.h").write_text("inline int one() { return 2; }\n")
    assert len(build()) == 3
    # A header of another room: not this room's objects.
    (tree / "csrc/other/args.h").write_text("// new\n")
    assert [line.split(" in ")[0] for line in build()[:-1]] == ["[csrc] compiled csrc/library.cpp"]
    # The emulator is no part of the library.
    (tree / "csrc/emulator/emu.h").write_text("// new\n")
    assert build() == ["[csrc] k.so is up to date: C++ only"]
    # What was compiled before is taken from the cache.
    (tree / "csrc/room/args.h").write_text("inline int one() { return 1; }\n")
    assert [line.split(" in ")[0] for line in build()[:-1]] == ["[csrc] compiled csrc/library.cpp"]
    assert not [path for path in (tree / "out").iterdir() if path.name != "k.so"], "nothing half-written stays"


@compiler
def test_check_tells_whether_sources_changed(tree: Path, build: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tree / "out" / "k.so")]
    assert csrc.main(["--check", *out]) == 1
    assert "not built" in capsys.readouterr().out
    build()
    assert csrc.main(["--check", *out]) == 0
    (tree / "csrc/room/args.h").write_text("inline int one() { return 3; }\n")
    assert csrc.main(["--check", *out]) == 1
    assert "older than csrc/" in capsys.readouterr().out


@compiler
def test_broken_code_is_an_error_even_where_the_library_is_optional(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "csrc/room/cpu.cpp").write_text("int broken(\n")
    assert csrc.main(["--optional", "--cuda", "off", "--out", str(tree / "k.so")]) == 1
    printed = capsys.readouterr().err
    assert "cpu.cpp:" in printed, "the compiler's own words"
    assert csrc.EXT_VARIABLE in printed
    assert not (tree / "k.so").exists()


@compiler
def test_a_function_nobody_defined_fails_when_linking(tree: Path, build: Callable[..., list[str]]) -> None:
    (tree / "csrc/room/cpu.cpp").write_text('int nowhere();\nextern "C" int answer() { return nowhere(); }\n')
    with pytest.raises(csrc.BuildError, match="nowhere"):
        build()
    assert not list((tree / "out").iterdir())


@pytest.mark.parametrize(
    ("variable", "optional", "status"), [("", True, 0), ("", False, 1), ("1", True, 1), ("0", True, 0), ("0", False, 1)]
)
def test_an_absent_compiler(variable: str, optional: bool, status: int, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    if variable:
        monkeypatch.setenv(csrc.EXT_VARIABLE, variable)
    assert csrc.main(["--out", str(tree / "k.so"), *(["--optional"] if optional else [])]) == status
    captured = capsys.readouterr()
    if status == 0:
        assert captured.out.count("\n") == 1, "one line"
        assert ("MEGATRON_R1_BUILD_EXT=0" if variable else "no-such-compiler") in captured.out
        assert "plain torch" in captured.out
    else:
        for part in ("expected:", "found:", "do:", "no-such-compiler"):
            assert part in captured.err


def test_an_old_compiler_is_an_absent_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "g++", "echo '#define __GNUC__ 9'"))
    with pytest.raises(csrc.ToolMissing, match=r"g\+\+ 9"):
        csrc.find_toolchain("off")
    monkeypatch.setenv("CXX", script(tmp_path / "clang++", "echo '#define __GNUC__ 4'; echo '#define __clang_major__ 14'"))
    with pytest.raises(csrc.ToolMissing, match="clang 14"):
        csrc.find_toolchain("off")


@pytest.fixture
def fake_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = script(tmp_path / "g++", "echo '#define __GNUC__ 13'")
    monkeypatch.setenv("CXX", path)
    return path


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


def test_torch_is_looked_for_and_not_imported(tmp_path: Path, fake_cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(tmp_path, "2.12.1+cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    tools = csrc.find_toolchain("off")
    assert (tools.torch, tools.torch_version, tools.nvcc) == (tmp_path / "torch", "2.12.1+cpu", None)
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.0'\n")
    with pytest.raises(csrc.ToolMissing, match=r"torch 2\.10\.0"):
        csrc.find_toolchain("off")


def test_without_torch(tmp_path: Path, fake_cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(csrc.ToolMissing, match="no-build-isolation"):
        csrc.find_toolchain("off")


def test_cuda_is_taken_when_it_is_there(tmp_path: Path, fake_cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(tmp_path, "2.13.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = script(tmp_path / "bin" / "nvcc", f"echo 'release 12.4, V12.4.1'; echo '#$ TOP={tmp_path}/bin/..'")
    assert csrc.find_toolchain("auto").nvcc == nvcc
    assert csrc.find_toolchain("require").cuda_home == tmp_path
    assert csrc.find_toolchain("off").nvcc is None
    monkeypatch.setattr(csrc, "gpu_visible", lambda: False)
    assert csrc.find_toolchain("visible").nvcc is None
    monkeypatch.setattr(csrc, "gpu_visible", lambda: True)
    assert csrc.find_toolchain("visible").nvcc == nvcc
    script(tmp_path / "bin" / "nvcc", "echo 'release 11.8, V11.8.0'")
    assert csrc.find_toolchain("auto").nvcc is None
    with pytest.raises(csrc.ToolMissing, match=r"11\.8"):
        csrc.find_toolchain("require")


def test_an_absent_nvcc_that_was_required(tree: Path, fake_cxx: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(csrc, "find_nvcc", lambda: None)
    monkeypatch.setenv(csrc.CUDA_VARIABLE, "1")
    for arguments in (["--optional"], ["--optional", "--cuda", "visible"], []):
        assert csrc.main([*arguments, "--out", str(tree / "k.so")]) == 1
        assert "nvcc" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["MEGATRON_R1_BUILD_EXT", "MEGATRON_R1_BUILD_CUDA"])
def test_a_wrong_setting_is_an_error(variable: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(variable, "yes")
    assert csrc.main(["--optional", "--out", str(tree / "k.so")]) == 1
    assert variable in capsys.readouterr().err


def test_nvcc_uses_the_same_compiler(tmp_path: Path, tree: Path) -> None:
    (tree / "csrc/room/launch.cu").write_text("")
    (tree / "csrc/room/binding.cpp").write_text("")
    tools = csrc.Toolchain("ccache /opt/g++-13", str(tmp_path / "nvcc"), tmp_path, "2.13.0")
    script(tmp_path / "nvcc", "true")
    commands = dict(csrc.compile_commands(tools, ("room",)))
    nvcc = commands[tree / "csrc/room/launch.cu"]
    assert nvcc[nvcc.index("-ccbin") + 1] == "/opt/g++-13"
    cxx = commands[tree / "csrc/room/cpu.cpp"]
    assert cxx[:2] == ["ccache", "/opt/g++-13"]
    assert "-DMR1_WITH_CUDA" in commands[tree / "csrc/room/binding.cpp"]
    # For C++ alone there is no CUDA in the flags.
    off = csrc.Toolchain("g++", None, tmp_path, "2.13.0")
    assert not [word for _, command in csrc.compile_commands(off, ("room",)) for word in command if "CUDA" in word]


def test_kernels_are_compiled_once_for_every_torch(tmp_path: Path, tree: Path) -> None:
    (tree / "csrc/room/launch.cu").write_text("")
    (tree / "csrc/room/binding.cpp").write_text("")
    script(tmp_path / "nvcc", "true")
    with_cuda = dict(csrc.compile_commands(csrc.Toolchain("g++", str(tmp_path / "nvcc"), tmp_path, "2.13.0"), ("room",)))
    without = dict(csrc.compile_commands(csrc.Toolchain("g++", None, tmp_path / "other", "2.12.0"), ("room",)))
    kernels, binding = tree / "csrc/room/cpu.cpp", tree / "csrc/room/binding.cpp"
    assert with_cuda[kernels] == without[kernels]
    assert with_cuda[binding] != without[binding]
