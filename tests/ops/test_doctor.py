"""The doctor tells what would run and why; `--require` turns a wish into an exit status; it says so where torch is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.cli import main
from megatron_r1.ops import attention, doctor, extension
from megatron_r1.ops.dispatch import OPS, OPS_VARIABLE, Op, load_all
from megatron_r1.utils.errors import EnvironmentProblem


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(OPS_VARIABLE, raising=False)
    before = load_all()  # what is imported once does not register again
    yield
    OPS.clear()
    OPS.update(before)


@pytest.fixture
def toy() -> Op:
    """`fast` never works, `special` does, `plain` comes last."""
    op = Op("toy")
    op.register("fast", None, lambda device: "the moon is full")
    op.register("special", None)
    op.register("plain", None)
    return op


def row(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_tells_machine_ops_and_packages(toy: Op, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    for what in ("python", "torch", "megatron-core", "c++", "nvcc", "processor", "GPU", "threads", "library", OPS_VARIABLE):
        assert re.search(rf"^{re.escape(what)}  +\S", captured.out, re.M), what
    assert re.search(r"toy\s+cpu\s+special\s+fast: the moon is full$", captured.out, re.M)
    for op in ("rms_norm", "swiglu"):
        assert row(captured.out, op)
    for module, _, _ in doctor.OPTIONAL:
        assert row(captured.out, module)
    assert "op toy" not in captured.err, "the table says it; the log need not"
    assert all(line == line.rstrip() and "\x1b" not in line for line in captured.out.splitlines()), "plain text for pipes"


def test_the_environment_is_heard(toy: Op, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPS_VARIABLE, "toy=plain")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"toy\s+cpu\s+plain\s+fast: the moon is full\n\s+special: available, not asked for$", out, re.M)
    assert "toy=plain" in row(out, OPS_VARIABLE)


def test_a_wish_that_can_not_be_met_is_shown(toy: Op, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPS_VARIABLE, "toy=fast")
    assert main(["doctor"]) == 0
    assert re.search(r"toy\s+cpu\s+ERROR\s.*the moon is full$", capsys.readouterr().out, re.M)


def test_require(toy: Op, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--require", "special"]) == 0
    assert main(["doctor", "--require", "special", "--require", "fast"]) == 1
    captured = capsys.readouterr()
    assert "toy on cpu takes special (fast: the moon is full)" in captured.err
    assert "--require fast" in captured.err
    assert "do:" in captured.err


def test_require_looks_at_choices_and_not_at_presence(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPS_VARIABLE, "toy=plain")
    assert doctor.unmet("special") == ["toy on cpu takes plain (special: available, not asked for)"]


def test_a_better_one_than_required_is_enough(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.unmet("plain") == []  # special is taken
    monkeypatch.setenv(OPS_VARIABLE, "toy=fast")
    (line,) = doctor.unmet("plain")
    assert line.startswith("toy on cpu takes ERROR")
    assert "the moon is full" in line


def test_require_of_nothing_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--require", "nosuch"]) == 2
    assert "'nosuch'" in capsys.readouterr().err
    with pytest.raises(EnvironmentProblem):
        doctor.unmet("nosuch")


def test_attention_cores_are_listed_with_reasons(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(attention, "cores", lambda device: {"flash9": "not invented yet", "math": None}, raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cpu\s+flash9\s+not invented yet$", out, re.M)
    assert re.search(r"cpu\s+math\s+available$", out, re.M)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(extension, "missing", lambda: "it was not built; build it")
    assert main(["doctor"]) == 0
    assert "none: it was not built; build it" in row(capsys.readouterr().out, "library")


def test_a_library_older_than_its_sources_is_told(tmp_path: Path) -> None:
    old = tmp_path / "kernels.so"
    old.write_bytes(b"cuda=none;torch=2.13;sources=0123456789abcdef;rooms=a\0")
    assert "OLDER" in str(doctor._stale(old))


def test_packages_are_found_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert doctor.locate("apex") == tmp_path / "apex" / "__init__.py"
    assert doctor.locate("apex.optimizers") is None
    assert "another project" in next(found for module, found, _ in doctor.optional_packages() if module == "apex.optimizers")
    (tmp_path / "apex" / "optimizers").mkdir()
    assert doctor.locate("apex.optimizers") == tmp_path / "apex" / "optimizers"
    assert next(found for module, found, _ in doctor.optional_packages() if module == "apex.optimizers") == "installed"
    assert doctor.locate("no_such_package") is None


def test_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'megatron'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from megatron_r1.cli import main\n"
        "raise SystemExit(main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in ("expected: torch", "found: no torch", "do: install torch"):
        assert part in done.stderr
    assert row(done.stdout, "torch").split() == ["torch", "none"]
