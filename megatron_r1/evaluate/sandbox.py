"""Running a short program a model wrote, in a separate process with limits.

A guard, not a security boundary: it stops endless loops, floods of memory and disk, deleted files and network calls by
naive code. Code that means harm can still read what this user may read and might know a hole in the kernel. Evaluate
untrusted models inside a virtual machine without secrets; that is why running code must be allowed in the recipe.

What the process gets: an isolated interpreter (no site packages, no user settings), an empty environment, an empty
temporary folder to work in, no input, and hard limits on processor time, address space, file size, open files and (for
users other than root) processes. Where the kernel can, also: Landlock (nothing outside the folder can be written, removed
or executed) and an own network namespace without interfaces. `guards()` says which of the two hold; root without
Landlock is refused, because a stray `os.remove` would then be root's.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_r1.utils.errors import EnvironmentProblem

Status = Literal["passed", "failed", "timeout"]
OUTPUT_LIMIT = 1 << 16
WALL_FACTOR = 10
LANDLOCK, NETWORK = "landlock", "network namespace"

# Runs in the child before anything of the program. Limits are hard ones, so the program can not raise them again.
_CHILD = '''
import ctypes, os, resource, struct, sys
program_path, nonce, seconds, memory, output = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
with open(program_path, encoding="utf-8") as stream:
    source = stream.read()
root = os.getuid() == 0

def landlock(libc):
    """Write, remove and execute nothing outside the working directory (system calls 444 to 446, all architectures)."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    changes = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12) + ((14,) if version >= 3 else ()))
    ruleset = libc.syscall(444, struct.pack("Q", changes | 1), 8, 0)
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    allowed = libc.syscall(445, ruleset, 1, struct.pack("=Qi", changes, here), 0) == 0
    return ruleset >= 0 and allowed and libc.syscall(446, ruleset, 0) == 0

held = []
try:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which Landlock asks for
    if landlock(libc):
        held.append("landlock")
    if libc.unshare(0x10000000 | 0x40000000) == 0:  # CLONE_NEWUSER | CLONE_NEWNET
        held.append("network namespace")
except (OSError, AttributeError):
    pass
for name, value in (("CPU", seconds), ("AS", memory), ("DATA", memory), ("FSIZE", output), ("NOFILE", 16), ("NPROC", 0), ("CORE", 0)):
    limit = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value + (name == "CPU")))  # a soft limit ends with SIGXCPU, which tells why
print(",".join(held), flush=True)
if root and "landlock" not in held:
    os._exit(97)
import socket
def refuse(*args, **kwargs):
    raise PermissionError("no network in this process")
class Refused(socket.socket):
    __init__ = refuse
socket.socket = socket.SocketType = Refused
socket.create_connection = socket.getaddrinfo = refuse
del ctypes, resource, struct, landlock, held, root
os.environ.clear()
sys.argv = ["program"]
try:
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
except BaseException as error:
    print(type(error).__name__ + ": " + str(error)[:500], file=sys.stderr, flush=True)
    os._exit(1)
print("\\n" + nonce, flush=True)
'''
_REFUSED = 97


@dataclass(frozen=True)
class Execution:
    """How a program ended. `detail`: the last line it wrote to its error stream, empty when it passed."""

    status: Status
    detail: str
    guards: tuple[str, ...]


@cache
def guards() -> tuple[str, ...]:
    """Kernel guards that hold on this machine, of "landlock" and "network namespace".

    Raises EnvironmentProblem for root without Landlock.
    """
    return run_program("pass", timeout_seconds=10.0, memory_mib=512).guards


def run_program(source: str, timeout_seconds: float, memory_mib: int) -> Execution:
    """Run `source`; "passed" only when it ran to its end without an exception.

    `timeout_seconds` (rounded up) is processor time, so that a busy machine does not change the verdict; the wall clock
    stops a program that only sleeps after several times as long. A program that leaves early (`os._exit(0)`) has not reached its end and counts as failed.
    Raises EnvironmentProblem for root without Landlock.
    """
    nonce = hashlib.sha256(b"reached the end" + os.urandom(16)).hexdigest()
    with tempfile.TemporaryDirectory(prefix="megatron_r1_sandbox_") as folder:
        program, work = Path(folder) / "program.py", Path(folder) / "work"
        program.write_text(source, encoding="utf-8", errors="replace")
        work.mkdir()
        output, errors = Path(folder) / "out", Path(folder) / "err"
        seconds = max(1, math.ceil(timeout_seconds))
        arguments = [str(program), nonce, str(seconds), str(memory_mib << 20), str(OUTPUT_LIMIT)]
        with open(output, "wb") as out, open(errors, "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _CHILD, *arguments], cwd=work, env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"}, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True, close_fds=True,
            )
            try:
                code = process.wait(WALL_FACTOR * timeout_seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill_group(process)
        if code == _REFUSED:
            raise EnvironmentProblem(
                expected="a user other than root, or a kernel with Landlock (Linux 5.13), to run generated code",
                found="root without Landlock", fix="run as another user, or set allow_code_execution to false",
            )
        held = tuple(name for name in output.open(encoding="utf-8", errors="replace").readline().strip().split(",") if name in (LANDLOCK, NETWORK))
        if code is None:
            return Execution("timeout", f"stopped after {WALL_FACTOR * timeout_seconds:g} s by the clock", held)
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return Execution("timeout", f"stopped after {seconds} s of processor time", held)
        if code == 0 and _tail(output).rstrip().endswith(nonce):
            return Execution("passed", "", held)
        last = _tail(errors).strip().split("\n")[-1][:500]
        return Execution("failed", last or ("left before its end" if code == 0 else f"ended with status {code}"), held)


def _kill_group(process: subprocess.Popen) -> None:
    """End the program and whatever it started (its own session, so nothing else is in the group)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _tail(path: Path, size: int = 4096) -> str:
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - size))
        return stream.read().decode("utf-8", "replace")
