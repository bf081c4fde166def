"""What a program in the sandbox can and can not do. Each program is one a small model might well write."""

from __future__ import annotations

import os
import tempfile
import time

import psutil
import pytest

from megatron_r1.evaluate import sandbox
from megatron_r1.evaluate.sandbox import LANDLOCK, NETWORK, guards, run_program

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the sandbox needs POSIX limits")


def run(source, timeout=5.0, memory=512):
    return run_program(source, timeout, memory)


@pytest.mark.parametrize("source", ["x = 1", "from typing import List\nimport math, re, collections, hashlib\nassert math.gcd(4, 6) == 2", "print('a' * 100)"])
def test_good_programs_pass(source):
    assert run(source).status == "passed"


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("assert 1 == 2", "AssertionError"), ("def f(:", "SyntaxError"), ("raise SystemExit(0)", "SystemExit"), ("import os; os._exit(0)", "left before its end"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"), ("input()", "EOFError"), ("import numpy", "ModuleNotFoundError"), ("\x00", "SyntaxError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "no network"), ("import socket; socket.socket()", "no network"),
    ],
)
def test_bad_programs_fail_and_say_why(source, detail):
    found = run(source)
    assert found.status == "failed"
    assert detail in found.detail or (source == "\x00" and "Error" in found.detail)


@pytest.mark.parametrize(("source", "timeout"), [("while True: pass", 1.0), ("import time\ntime.sleep(60)", 0.1)])
def test_endless_programs_are_stopped(source, timeout):
    began = time.monotonic()
    found = run(source, timeout=timeout)
    assert found.status == "timeout"
    assert "stopped after 1 s" in found.detail or "by the clock" in found.detail  # a busy machine may not give it a second
    assert time.monotonic() - began < 30


def test_memory_and_output_are_limited():
    assert "MemoryError" in run("x = [0] * 10**9", memory=256).detail
    assert run("print('x' * 10**7)").status == "failed"
    assert run("open('big', 'w').write('x' * 10**7)").status == "failed"


def test_a_forged_end_does_not_pass():
    """The mark of the end is unknown to the program: printing anything and leaving is not enough."""
    assert run("import sys, os\nprint('0' * 64, flush=True)\nos._exit(0)").status == "failed"


def test_environment_and_folder_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert run("import os\nassert not os.environ, os.environ\nassert os.listdir('.') == []\nopen('own', 'w').write('fine')").status == "passed"


def test_children_do_not_survive(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("import os, time\nos.fork()\ntime.sleep(60)", timeout=0.1).status in ("timeout", "failed")
    until = time.monotonic() + 5  # killed at once, but the system may take a moment to bury them
    while left := [p.pid for p in psutil.process_iter(["cwd"]) if str(p.info["cwd"] or "").startswith(str(tmp_path))]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def test_files_outside_are_safe(tmp_path):
    if LANDLOCK not in guards():
        pytest.skip("this kernel has no Landlock")
    victim = tmp_path / "victim"
    victim.write_text("here")
    for source in (f"import os; os.remove({str(victim)!r})", f"open({str(victim)!r}, 'w')", f"import os; os.mkdir({str(tmp_path / 'new')!r})", "import os; os.execv('/bin/sh', ['sh'])"):
        assert "PermissionError" in run(source).detail, source
    assert victim.read_text() == "here"
    assert list(tmp_path.iterdir()) == [victim]


def test_network_namespace_has_no_route():
    if NETWORK not in guards():
        pytest.skip("this kernel refuses user namespaces")
    assert "unreachable" in run("import _socket\n_socket.socket().connect(('127.0.0.1', 9))").detail


def test_root_without_landlock_is_refused(monkeypatch):
    if os.getuid() != 0:
        pytest.skip("not root")
    monkeypatch.setattr(sandbox, "_CHILD", sandbox._CHILD.replace("if landlock(libc):", "if False:"))
    with pytest.raises(sandbox.EnvironmentProblem, match="root without Landlock"):
        run("x = 1")
