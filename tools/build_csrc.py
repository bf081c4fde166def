"""Build csrc/ with g++ (and nvcc when present): no setuptools, no ninja, no torch build helpers.

    python tools/build_csrc.py                        megatron_r1/_kernels.so, CUDA when nvcc is found
    python tools/build_csrc.py --cuda off --out x.so  C++ only
    python tools/build_csrc.py --only qk_norm_rope    one room (for development)

setup.py calls `build` below, so an installed package and this command make the same file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import shlex
import shutil
import subprocess
import sys

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ROOMS = ("qk_norm_rope", "influence", "row_loss")
# The oldest torch whose ABI is used: one file serves this release and every later one.
TORCH_TARGET = "0x020b000000000000"
# sm_80 for A100, sm_90a for H100/H200 (wgmma and TMA), PTX for whatever comes later.
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "--expt-relaxed-constexpr", "-lineinfo")


class BuildError(RuntimeError):
    """The extension can not be built here; the message says what was run and what it printed."""


@dataclass(frozen=True)
class Toolchain:
    """What builds: paths of the compilers, torch's headers and libraries. `nvcc` None means C++ only."""

    cxx: str
    nvcc: str | None
    torch: Path
    torch_version: str
    notes: list[str] = field(default_factory=list)


def find_nvcc() -> str | None:
    """CUDA_HOME's nvcc, the one on PATH or the usual place; None when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [found for found in [shutil.which("nvcc")] if found] + ["/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def find_toolchain(cuda: str = "auto") -> Toolchain:
    """Raises BuildError naming what is missing. cuda: `auto`, `off` or `require`."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not cxx:
        raise BuildError("expected: a C++ compiler (g++ 12 or newer)\n   found: neither g++ nor c++ on PATH\n      do: install one, or set CXX")
    try:
        import torch
    except ImportError as error:
        raise BuildError(f"expected: torch, whose headers the bindings need\n   found: {error}\n      do: install torch >= 2.11 first, and build with --no-build-isolation") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        raise BuildError(f"expected: torch >= 2.11 (its stable ABI)\n   found: {torch.__version__}\n      do: upgrade torch")
    nvcc = None if cuda == "off" else find_nvcc()
    if cuda == "require" and nvcc is None:
        raise BuildError("expected: nvcc, because CUDA kernels were required\n   found: none on PATH, in CUDA_HOME or /usr/local/cuda\n      do: install the CUDA toolkit, or build with --cuda auto")
    return Toolchain(cxx, nvcc, Path(torch.__file__).parent, torch.__version__)


def sources(rooms: tuple[str, ...] = ROOMS) -> tuple[list[Path], list[Path]]:
    """(C++ files, CUDA files) of the library."""
    cxx, cuda = [CSRC / "library.cpp"], []
    for room in rooms:
        cxx += sorted((CSRC / room).glob("*.cpp"))
        cuda += sorted((CSRC / room).glob("*.cu"))
    return cxx, cuda


def source_hash(of: Path | None = None) -> str:
    """Hash of what the library, or one object of it, is made from: the source, its room's and the shared headers, the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"} and "emulator" not in p.parts):
        header = path.suffix in {".h", ".cuh"} and path.parts[len(CSRC.parts)] in {"include", of.parent.name if of else ""}
        if of is None or path == of or header:
            digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str], log: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    log.append("$ " + shlex.join(command) + "\n" + done.stdout + done.stderr)
    if done.returncode:
        raise BuildError(f"expected: this command to succeed\n   found: exit status {done.returncode}\n{shlex.join(command)}\n{(done.stdout + done.stderr)[-4000:]}\n      do: mend what the compiler names")
    return done.stdout + done.stderr


def compile_commands(tools: Toolchain, rooms: tuple[str, ...] = ROOMS) -> list[tuple[Path, list[str]]]:
    """(source, command without output) for every file."""
    cxx_files, cuda_files = sources(rooms)
    if tools.nvcc is None:
        cuda_files = []
    include = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    torch_include = [f"-isystem{tools.torch / 'include'}", f"-isystem{tools.torch / 'include/torch/csrc/api/include'}"]
    define = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"] + (["-DMR1_WITH_CUDA"] if cuda_files else [])
    if cuda_files:
        define.append("-DUSE_CUDA")
        torch_include.append(f"-isystem{Path(tools.nvcc).resolve().parent.parent / 'include'}")
    info = f"cuda={','.join(a.split('code=')[1] for a in ARCHITECTURES) if cuda_files else 'none'};torch={tools.torch_version};sources={source_hash()}"
    commands = []
    for path in cxx_files:
        extra = [f'-DMR1_BUILD_INFO="{info}"'] if path.name == "library.cpp" else []
        commands.append((path, [tools.cxx, *CXX_FLAGS, *define, *extra, *include, *torch_include, "-c", str(path)]))
    for path in cuda_files:
        arches = [part for a in ARCHITECTURES for part in ("-gencode", a)]
        commands.append((path, [tools.nvcc, *NVCC_FLAGS, *arches, *include, "-c", str(path)]))
    return commands


def build(out: Path, cuda: str = "auto", rooms: tuple[str, ...] = ROOMS, jobs: int | None = None, say=print) -> Path:
    """Compile what changed and link `out`. Returns it. Raises BuildError with the compiler's words."""
    tools = find_toolchain(cuda)
    objects_dir = ROOT / "build" / "csrc"
    objects_dir.mkdir(parents=True, exist_ok=True)
    log: list[str] = []
    objects, todo = [], []
    for path, command in compile_commands(tools, rooms):
        name = hashlib.sha256((source_hash(path) + shlex.join(command)).encode()).hexdigest()[:12]
        target = objects_dir / f"{path.parent.name}-{path.stem}-{name}.o"
        objects.append(target)
        if not target.exists():
            todo.append((path, command, target))

    def one(job: tuple[Path, list[str], Path]) -> None:
        path, command, target = job
        temporary = target.with_suffix(f".{os.getpid()}.tmp.o")
        printed = _run([*command, "-o", str(temporary)], log)
        target.with_suffix(".log").write_text(printed)
        os.replace(temporary, target)
        say(f"[csrc] compiled {path.relative_to(ROOT)}")

    with concurrent.futures.ThreadPoolExecutor(jobs or min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(one, todo))
    link = [tools.cxx, "-shared", *map(str, objects), f"-L{tools.torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-Wl,--exclude-libs,ALL", "-ldl", "-lpthread", "-lrt"]
    if any(path.suffix == ".cu" for path, _ in compile_commands(tools, rooms)):
        home = Path(tools.nvcc).resolve().parent.parent
        library = next((p for p in (home / "lib64", home / "lib", *home.glob("targets/*/lib")) if (p / "libcudart_static.a").exists()), None)
        if library is None:
            raise BuildError(f"expected: libcudart_static.a under {home}\n   found: none\n      do: install the CUDA runtime's development files, or build with --cuda off")
        link += [str(library / "libcudart_static.a")]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    _run([*link, "-o", str(temporary)], log)
    os.replace(temporary, out)
    say(f"[csrc] built {out} ({out.stat().st_size / 1e6:.1f} MB; CUDA {'yes' if tools.nvcc else 'no'})")
    return out


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "megatron_r1" / "_kernels.so")
    parser.add_argument("--cuda", choices=("auto", "off", "require"), default="auto")
    parser.add_argument("--only", action="append", choices=ROOMS, help="build this room only; can be given several times")
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args()
    try:
        build(options.out, options.cuda, tuple(options.only or ROOMS), options.jobs)
    except BuildError as error:
        print(f"BuildError\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
