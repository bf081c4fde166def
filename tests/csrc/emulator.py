"""Build and run the emulator's harnesses: programs that launch the CUDA kernels of csrc/ on a CPU (docs/emulator.md).

    exe = build("selftest")                                   # csrc/emulator/run_selftest.cpp
    y, = run(exe, [np.array([3, 4]), x], seed=0, dtypes=[np.float32])

`build(..., sanitize=True)` adds the address and undefined-behaviour sanitizers, `races=True` the race detector, and
`mutate={"row_loss/kernel.cuh": (old, new)}` compiles a copy of csrc/ with that one replacement: a mutant, which tests
expect to fail. Programs are cached under build/emulator by the content of every file they were made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
SOURCES = {".h", ".cuh", ".cpp", ".cu"}
Replacements = tuple[str, str] | list[tuple[str, str]]

# Variables that nobody set hold a pattern (a huge float), not what an earlier thread left on the stack.
FLAGS = ("-std=c++20", "-O1", "-g", "-DMR1_EMULATE", "-ftrivial-auto-var-init=pattern", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Only the instrumentation of the thread sanitizer: its functions are those of csrc/emulator/races.h, not its library's.
# memcpy stays a call, which the linker leads there too: written out by the compiler it would not be instrumented.
RACES = (
    "-DMR1_EMU_RACES", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-threadsafe-statics", "-fno-pie",
    "-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset",
)  # fmt: skip
RACES_LINK = ("-no-pie", "-Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset")


class EmulatorFailed(AssertionError):
    """A harness ended with an error; the message holds all it printed."""


class MutantError(AssertionError):
    """A mutant can not be made: the text to replace must occur exactly once in the file."""


@functools.lru_cache
def compiler() -> str:
    """The C++ compiler; skips the test that asks where there is none."""
    found = os.environ.get("CXX") or shutil.which("g++")
    if not found:
        pytest.skip("the emulator needs g++ (12 or newer), and there is none on PATH nor in CXX")
    return found


@functools.lru_cache
def _missing(flags: tuple[str, ...]) -> str | None:
    """Why programs with these flags can not be built and run here; None if they can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [compiler(), *flags, str(source), "-o", str(source.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and "-c" not in flags:
            done = subprocess.run([str(source.with_suffix(""))], capture_output=True, text=True)
        return None if done.returncode == 0 else (done.stdout + done.stderr).strip()[-500:] or f"exit status {done.returncode}"


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _content(root: Path, files: Sequence[str]) -> str | None:
    """Hash of what `files` hold, None if one is gone."""
    digest = hashlib.sha256()
    for name in files:
        try:
            digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
        except OSError:
            return None
    return digest.hexdigest()[:12]


def _mutant(folder: Path, mutate: Mapping[str, Replacements]) -> Path:
    """A copy of csrc/ in `folder` with the replacements made."""
    copy = folder / "csrc"
    for path in CSRC.rglob("*"):
        if path.suffix in SOURCES:
            target = copy / path.relative_to(CSRC)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for name, pairs in mutate.items():
        text = (copy / name).read_text()
        for old, new in [pairs] if isinstance(pairs, tuple) else pairs:
            if text.count(old) != 1:
                raise MutantError(f"{name}: the text to replace must occur once, it occurs {text.count(old)} times: {old!r}")
            text = text.replace(old, new)
        (copy / name).write_text(text)
    return copy


def build(
    harness: str, *, sanitize: bool = False, races: bool = False, mutate: Mapping[str, Replacements] | None = None, define: Sequence[str] = ()
) -> Path:
    """The program of csrc/emulator/run_<harness>.cpp, compiled if anything it is made from has changed.

    mutate: {file relative to csrc/: (old, new)}, or a list of such pairs: mutants of different kernels can share one
    program. Each `old` must occur exactly once: MutantError if not. define: macros, "NAME" or "NAME=value".
    Raises EmulatorFailed with the compiler's words. Skips the calling test where g++ or a sanitizer is missing.
    """
    if sanitize and races:
        raise ValueError("one kind of instrumentation at a time: sanitize or races")
    extra, link = (SANITIZE, ()) if sanitize else (RACES, RACES_LINK) if races else ((), ())
    if sanitize and (why := _missing(SANITIZE)):
        pytest.skip(f"this compiler has no address and undefined-behaviour sanitizers: {why}")
    if races and (why := _missing((*RACES, "-c"))):
        pytest.skip(f"this compiler can not instrument memory accesses (g++ 12 or newer can): {why}")
    command = [compiler(), *FLAGS, *extra, *(f"-D{d}" for d in define)]
    source = f"emulator/run_{harness}.cpp"
    kind = "races" if races else "sanitized" if sanitize else "plain"
    stem = f"{harness}-{kind}-{_key(command, link, source, sorted((mutate or {}).items()))}"
    with _alone(stem):
        return _build(stem, source, command, link, mutate or {})


@contextlib.contextmanager
def _alone(stem: str) -> Iterator[None]:
    """Tests run side by side, and several may want the same program: one compiles it, the others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(stem: str, source: str, command: list[str], link: tuple[str, ...], mutate: Mapping[str, Replacements]) -> Path:
    record = CACHE / f"{stem}.json"
    try:
        known = json.loads(record.read_text())
        exe = CACHE / known["exe"]
        if exe.exists() and known["content"] == _content(CSRC, known["files"]):
            return exe
    except (OSError, ValueError, KeyError):
        pass
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        root = _mutant(folder, mutate) if mutate else CSRC
        depends = folder / "depends"
        made = folder / "exe"
        # Dependencies first, by content: a file changed while the compiler runs must not count as compiled.
        include = [f"-I{root}", f"-I{root / 'include'}"]
        _compile([*command, *include, "-MM", "-MF", str(depends), str(root / source)])
        words = depends.read_text().replace("\\\n", " ").split()[1:]
        files = sorted({str(Path(w).resolve().relative_to(root.resolve())) for w in words})
        content = _content(CSRC, files)
        if link:  # by hand: the compiler's driver would add the thread sanitizer's library
            _compile([*command, *include, "-c", str(root / source), "-o", f"{made}.o"])
            _compile([compiler(), f"{made}.o", "-o", str(made), *link])
        else:
            _compile([*command, *include, str(root / source), "-o", str(made)])
        name = f"{stem}-{content}"
        os.replace(made, CACHE / name)
        part = folder / "record"
        part.write_text(json.dumps({"exe": name, "content": content, "files": files}))
        os.replace(part, record)
    for old in CACHE.glob(f"{stem}-*"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return CACHE / name


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulatorFailed(f"$ {shlex.join(command)}\n{done.stderr[-6000:]}")


def _bytes(array: object) -> bytes:
    if hasattr(array, "detach"):  # a torch tensor, bf16 too
        import torch

        array = array.detach().cpu().contiguous()
        array = array.view(torch.int16).numpy() if array.dtype == torch.bfloat16 else array.numpy()
    return np.ascontiguousarray(array).tobytes()


def run(
    exe: Path, arrays: Sequence[object], seed: int = 0, expect_failure: bool = False, dtypes: Sequence[object] | None = None, timeout: float = 300.0
) -> list[np.ndarray] | str:
    """Run a harness on `arrays` (numpy, or torch including bf16) in the thread order that `seed` stands for.

    Returns the arrays it gave, one-dimensional, as uint8 or as `dtypes` say ("bf16" gives float32). With
    expect_failure: returns what it printed, and it must have failed with a report, of the emulator or of a sanitizer.
    Raises EmulatorFailed with what it printed, if it ended otherwise than expected.
    """
    environment = dict(os.environ)
    # Leaks are no kernel's business; and the leak check does not work under ptrace, as in some containers.
    environment["ASAN_OPTIONS"] = "detect_leaks=0:exitcode=71:detect_stack_use_after_return=0"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1:exitcode=71"
    with tempfile.TemporaryDirectory() as folder:
        into, out = Path(folder) / "in.bin", Path(folder) / "out.bin"
        with into.open("wb") as file:
            for array in arrays:
                body = _bytes(array)
                file.write(np.uint64(len(body)).tobytes() + body)
        try:
            done = subprocess.run([str(exe), str(into), str(out), str(seed)], capture_output=True, text=True, errors="replace", env=environment, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise EmulatorFailed(f"{exe.name} seed {seed}: no end after {timeout:g} s (a loop that waits without wait_until?)") from None
        said = done.stdout + done.stderr
        if expect_failure:
            if done.returncode not in (70, 71):
                raise EmulatorFailed(f"{exe.name} seed {seed}: expected a report, found exit status {done.returncode}\n{said}")
            return said
        if done.returncode:
            raise EmulatorFailed(f"{exe.name} seed {seed}: exit status {done.returncode}\n{said[-8000:]}")
        return _split(out.read_bytes(), dtypes)


def _split(blob: bytes, dtypes: Sequence[object] | None) -> list[np.ndarray]:
    arrays, at = [], 0
    while at < len(blob):
        n = int(np.frombuffer(blob, np.uint64, 1, at)[0])
        arrays.append(np.frombuffer(blob, np.uint8, n, at + 8).copy())
        at += 8 + n
    if dtypes is None:
        return arrays
    if len(dtypes) != len(arrays):
        raise EmulatorFailed(f"the harness gave {len(arrays)} arrays, {len(dtypes)} were expected")
    return [from_bf16(a.view(np.uint16)) if d == "bf16" else a.view(d) for a, d in zip(arrays, dtypes)]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the 16 bits of the nearest bf16 (ties to even, NaN stays NaN), as uint16."""
    wide = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((wide + np.uint32(0x7FFF) + ((wide >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    nan = (wide & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, ((wide >> 16) | np.uint32(0x40)).astype(np.uint16), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 numbers (uint16) -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def outcome(exe: Path, arrays: Sequence[object], seed: int, dtypes: Sequence[object]) -> list[np.ndarray] | str:
    """What `run` returns, or the text of its failure: for mutants, which may do either."""
    try:
        return run(exe, arrays, seed, dtypes=dtypes)
    except EmulatorFailed as error:
        return str(error)


def nvcc() -> str:
    """Path of nvcc; skips the test that asks where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    found = next((c for c in [*candidates, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"] if c and os.access(c, os.X_OK)), None)
    if found is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in the usual place")
    return found
