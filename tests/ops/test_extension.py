"""The loader tells why there is no library, in a sentence with the remedy, and never raises."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_r1
from megatron_r1.ops import extension


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    for function in (extension.missing, extension.build_info):
        function.cache_clear()
    yield
    for function in (extension.missing, extension.build_info):
        function.cache_clear()


def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(extension.KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(extension, "INSTALLED", tmp_path / "kernels.so")
    assert "was not built" in str(extension.missing())
    assert "tools/build_csrc.py" in str(extension.missing())
    assert extension.build_info() == {}
    assert extension.absent("cpu") == extension.absent("cuda") == extension.missing()


def test_another_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(extension.KERNELS_VARIABLE, str(tmp_path / "gone.so"))
    assert extension.KERNELS_VARIABLE in str(extension.missing())
    assert "gone.so" in str(extension.missing())


def test_a_file_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.so").write_bytes(b"not a library")
    monkeypatch.setenv(extension.KERNELS_VARIABLE, str(tmp_path / "kernels.so"))
    assert "does not load" in str(extension.missing())
    assert "rebuild" in str(extension.missing())


def test_the_library_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports every module of the package (as documentation tools do) must not meet a file that Python cannot import."""
    package = tmp_path / "imitation"
    installed = package / extension.INSTALLED.relative_to(Path(megatron_r1.__file__).parent)
    installed.parent.mkdir(parents=True)
    installed.touch()
    (package / "__init__.py").touch()
    assert not list(pkgutil.walk_packages([str(package)]))


def test_which_devices_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": "none"})
    assert extension.absent("cpu") is None
    assert "MEGATRON_R1_BUILD_CUDA=1" in str(extension.absent("cuda"))
    assert "'mps'" in str(extension.absent("mps"))
    monkeypatch.setattr(extension, "build_info", lambda: {"cuda": "sm_80,sm_90a"})
    assert extension.absent("cuda") is None
