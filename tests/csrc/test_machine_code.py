"""What nvcc made of the kernels: no spills, registers within bounds, 16-byte accesses and tensor cores where they are meant.

Nothing here needs a GPU. The objects looked at are those of the library itself (tools/build_csrc.py, cached in build/csrc), for
every architecture it is built for. Needs nvcc, and cuobjdump with nvdisasm (packages nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).

A kernel that is in no row of ROOMS is an error, so is a row that fits no kernel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SM80, SM90 = "sm_80", "sm_90a"


@dataclass(frozen=True)
class Expect:
    """What is expected of the kernels whose demangled name `kernel` (a regular expression) is found in.

    registers: at most so many a thread. stack: bytes of stack frame allowed. has: opcodes (regular expressions) that must occur.
    Spills and local memory (LDL, STL) are never allowed, unless a stack frame is.
    """

    kernel: str
    registers: int = 128
    stack: int = 0
    has: tuple[str, ...] = ()
    architectures: tuple[str, ...] = (SM80, SM90)


LOAD16, STORE16 = r"LDG\.E\.128", r"STG\.E\.128"
# room -> rows; a kernel is judged by the first row that fits its name and architecture.
ROOMS: dict[str, list[Expect]] = {
    "qk_norm_rope": [
        # Several heads in flight per thread cost registers; with gains (fp32 sums over tokens in registers) more.
        Expect(r"::forward_kernel<", registers=120, has=(LOAD16, STORE16)),
        Expect(r"::backward_kernel<.*, true, \d>", registers=152, has=(LOAD16, STORE16)),
        Expect(r"::backward_kernel<.*, false, \d>", registers=120, has=(LOAD16, STORE16)),
        # Any size of heads and any alignment, element by element.
        Expect(r"::plain_(forward|backward)_kernel<", registers=80),
        Expect(r"::gain_kernel<", registers=40),
    ],
    "influence": [
        # Hopper's own: tensor cores, fed by TMA. 3 warpgroups of 128 threads share 64 Ki registers. Older ones get an empty body.
        Expect(r"wgrad_dot_kernel", registers=168, has=(r"HGMMA\.64x128x16\.F32", r"UTMALDG", STORE16), architectures=(SM90,)),
        Expect(r"wgrad_dot_kernel", registers=16, architectures=(SM80,)),
        Expect(r"row_dot_kernel<.*, [48]>", registers=48, has=(LOAD16,)),
        Expect(r"row_dot_kernel<.*, 1>", registers=40),
        Expect(r"add_and_dot_kernel<.*, 4>", registers=80, has=(LOAD16, STORE16)),
        Expect(r"add_and_dot_kernel<.*, 1>"),
        Expect(r"(document_sum|sum_scores|add_partial|add_parts)_kernel", registers=40),
    ],
    "row_loss": [
        # 1024 threads on an SM with 64 registers each hide the memory's latency; fp64 is for tests.
        Expect(r"row_stats_kernel<double", registers=96, has=(LOAD16,)),
        Expect(r"row_stats_kernel", registers=64, has=(LOAD16,)),
        Expect(r"softmax_grad_kernel<double", registers=96, has=(LOAD16, STORE16)),
        Expect(r"softmax_grad_kernel", registers=64, has=(LOAD16, STORE16)),
    ],
}


# ------------------------------------------------------------------------------------------------ tools


def _load_build_csrc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_csrc_for_machine_code", ROOT / "tools" / "build_csrc.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


csrc = _load_build_csrc()


@lru_cache(maxsize=1)
def toolchain():  # skips where CUDA can not be compiled
    try:
        return csrc.find_toolchain("require")
    except csrc.ToolMissing as error:
        pytest.skip(f"expected {error.expected}; found {error.found}")


@lru_cache(maxsize=1)
def disassembler() -> tuple[str, str]:
    """(cuobjdump, PATH for it: it calls nvdisasm)."""
    packages = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    folders = [f"{site}/nvidia/cu13/bin" for site in packages] + [str(toolchain().cuda_home / "bin"), *os.environ.get("PATH", "").split(":")]
    for folder in folders:
        if all(os.access(f"{folder}/{name}", os.X_OK) for name in ("cuobjdump", "nvdisasm")):
            return f"{folder}/cuobjdump", f"{folder}:{os.environ.get('PATH', '')}"
    pytest.skip("expected cuobjdump and nvdisasm (pip packages nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm); found none")


# ------------------------------------------------------------------------------------------------ reading what was compiled


@dataclass
class Kernel:
    """One kernel for one architecture: the assembler's report and the opcodes of its machine code."""

    name: str
    architecture: str
    registers: int = -1
    stack: int = -1
    spills: int = -1
    opcodes: list[str] = field(default_factory=list)

    def complaints(self, rows: list[Expect]) -> list[str]:
        """What is not as expected; empty when all is."""
        where = f"{self.name} ({self.architecture})"
        row = next((row for row in rows if self.architecture in row.architectures and re.search(row.kernel, self.name)), None)
        if row is None:
            return [f"{where}: in no row of ROOMS; say there what is expected of it"]
        found = []
        if self.spills != 0:
            found.append(f"{where}: {self.spills} bytes of registers spilled")
        if not 0 <= self.stack <= row.stack:
            found.append(f"{where}: stack frame of {self.stack} bytes, {row.stack} allowed")
        if not 0 < self.registers <= row.registers:
            found.append(f"{where}: {self.registers} registers, {row.registers} allowed")
        if not self.opcodes:
            found.append(f"{where}: no machine code found")
        for pattern in row.has:
            if not any(re.match(pattern, opcode) for opcode in self.opcodes):
                found.append(f"{where}: no {pattern} in {len(self.opcodes)} instructions")
        local = sorted({opcode for opcode in self.opcodes if re.match(r"(LDL|STL)\b", opcode)})
        if local and not row.stack:
            found.append(f"{where}: local memory is used: {', '.join(local)}")
        return found


def demangled(names: set[str]) -> dict[str, str]:
    """Mangled -> demangled."""
    if not shutil.which("c++filt"):
        pytest.skip("expected c++filt (binutils); found none")
    ordered = sorted(names)
    done = subprocess.run(["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True)
    return dict(zip(ordered, done.stdout.splitlines(), strict=True))


def read_report(text: str) -> dict[tuple[str, str], Kernel]:
    """(mangled name, architecture) -> Kernel, from what `nvcc -Xptxas -v` printed."""
    kernels: dict[tuple[str, str], Kernel] = {}
    current: Kernel | None = None
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = kernels.setdefault(found.groups(), Kernel(*found.groups()))
        elif found := re.search(r"Function properties for (\w+)", line):
            # Device functions that were not inlined have properties, too; a kernel that calls one has a stack.
            name = found.group(1)
            current = current if current is not None and current.name == name else None
        elif current is not None and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            current.stack, current.spills = int(found.group(1)), int(found.group(2)) + int(found.group(3))
        elif current is not None and (found := re.search(r"Used (\d+) registers", line)):
            current.registers = int(found.group(1))
    return kernels


def read_machine_code(text: str) -> dict[str, list[str]]:
    """Mangled name -> opcodes, from `cuobjdump --dump-sass`."""
    code: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            current = code.setdefault(found.group(1), [])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]\s+)?([A-Z][\w.]*)", line):
            current.append(found.group(1))
    return code


def kernels_of(sources: dict[Path, Path], architectures: tuple[str, ...] = (SM80, SM90)) -> list[Kernel]:
    """Every kernel in these objects (source -> object, the report beside it)."""
    cuobjdump, path = disassembler()
    kernels: dict[tuple[str, str], Kernel] = {}
    for target in sources.values():
        here = read_report(target.with_suffix(".log").read_text())
        for architecture in architectures:
            done = subprocess.run([cuobjdump, "--dump-sass", "--gpu-architecture", architecture, str(target)], capture_output=True, text=True, env={**os.environ, "PATH": path})
            assert done.returncode == 0, done.stderr + done.stdout
            for name, opcodes in read_machine_code(done.stdout).items():
                here.setdefault((name, architecture), Kernel(name, architecture)).opcodes = opcodes
        kernels.update(here)
    names = demangled({kernel.name for kernel in kernels.values()})
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
    return sorted(kernels.values(), key=lambda kernel: (kernel.name, kernel.architecture))


@cache
def room(name: str) -> list[Kernel]:
    """The kernels of a room, compiled for all architectures of the library."""
    if not list((ROOT / "csrc" / name).glob("*.cu")):
        pytest.skip(f"csrc/{name} has no CUDA source")
    tools = toolchain()
    disassembler()
    return kernels_of(csrc.compile_objects(tools, (name,), jobs=1, suffixes=(".cu",)))


# ------------------------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("name", ROOMS)
def test_kernels_are_compiled_as_meant(name: str) -> None:
    complaints = [line for kernel in room(name) for line in kernel.complaints(ROOMS[name])]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("name", ROOMS)
def test_every_row_fits_a_kernel(name: str) -> None:
    kernels = room(name)
    idle = [
        f"{row.kernel} ({architecture})"
        for row in ROOMS[name]
        for architecture in row.architectures
        if not any(kernel.architecture == architecture and re.search(row.kernel, kernel.name) for kernel in kernels)
    ]
    assert not idle, f"rows that fit no kernel: {idle}"


def test_every_room_with_kernels_is_listed() -> None:
    assert set(ROOMS) == set(csrc.ROOMS)
    assert {path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")} <= set(csrc.ROOMS)


# ------------------------------------------------------------------------------------------------ the checks can fail

TOY = """
#include <cuda_runtime.h>
extern "C" __global__ void wide(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void narrow(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void local(const int* x, int* y) {
  int table[32];
  for (int i = 0; i < 32; ++i) table[i] = x[i] * i;
  for (int i = 0; i < 32; ++i) y[i] = table[x[i] & 31];
}
// More values alive at once than two blocks of 1024 threads have registers for.
extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i)
#pragma unroll
    for (int j = 0; j < 96; j += 7) v[i] = v[i] * v[j] + v[95 - i];
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = v[i];
}
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    tools = toolchain()
    disassembler()
    folder = tmp_path_factory.mktemp("toy")
    source, target = folder / "toy.cu", folder / "toy.o"
    source.write_text(TOY)
    command = [str(tools.nvcc), "-ccbin", tools.cxx.split()[0], *csrc.NVCC_FLAGS, "-gencode", "arch=compute_80,code=sm_80"]
    done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    target.with_suffix(".log").write_text(done.stdout + done.stderr)
    return {kernel.name: kernel for kernel in kernels_of({source: target}, (SM80,))}


@pytest.mark.parametrize(
    ("kernel", "row", "complaint"),
    [
        ("wide", Expect("wide", has=(LOAD16, STORE16)), None),
        ("narrow", Expect("narrow"), None),
        ("narrow", Expect("narrow", has=(LOAD16,)), "no LDG"),
        ("wide", Expect("wide", registers=4), "registers, 4 allowed"),
        ("wide", Expect("wide", architectures=(SM90,)), "in no row"),
        ("wide", Expect("narrow"), "in no row"),
        ("local", Expect("local"), "stack frame of 128 bytes, 0 allowed"),
        ("local", Expect("local"), "local memory is used: LDL"),
        ("local", Expect("local", stack=128), None),
        ("spilling", Expect("spilling", stack=4096), "bytes of registers spilled"),
    ],
)
def test_the_checks_can_fail(kernel: str, row: Expect, complaint: str | None, toys: dict[str, Kernel]) -> None:
    found = toys[kernel].complaints([row])
    if complaint is None:
        assert not found
    else:
        assert any(complaint in line for line in found), found


def test_a_report_or_machine_code_that_was_not_found_is_a_complaint() -> None:
    rows = [Expect("k")]
    assert len(Kernel("k", SM80).complaints(rows)) == 4
    assert not Kernel("k", SM80, registers=8, stack=0, spills=0, opcodes=["EXIT"]).complaints(rows)
