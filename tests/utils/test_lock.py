"""The lock of a folder: one owner, named; a dead one's is taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.utils.errors import EnvironmentProblem
from megatron_r1.utils.lock import only_process

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from megatron_r1.utils.lock import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_owner_is_named(holder, tmp_path: Path) -> None:
    before = (tmp_path / ".lock").read_text()
    with pytest.raises(EnvironmentProblem) as caught, only_process(tmp_path):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}, started 20" in caught.value.found
    assert str(tmp_path) in caught.value.expected
    assert (tmp_path / ".lock").read_text() == before, "a refused process changes nothing"


def test_a_killed_owners_lock_is_taken_over(holder, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid, "it could not clean up"
    with only_process(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(EnvironmentProblem), only_process(tmp_path):
            pass
    assert (tmp_path / ".lock").read_text() == ""
    with only_process(tmp_path):
        pass


@pytest.mark.parametrize("text", ["12345", "{", "[]", '{"pid": "x"}', "\x00\xff"])
def test_any_content_may_be_left(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text, encoding="utf-8")
    with only_process(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
