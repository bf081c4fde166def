"""Build csrc/ with g++ (and nvcc when present): no setuptools, no ninja, no torch build helpers.

    python tools/build_csrc.py                        megatron_r1/lib/kernels.so, CUDA when nvcc is found
    python tools/build_csrc.py --cuda off --out x.so  C++ only
    python tools/build_csrc.py --only qk_norm_rope    one room (for development)
    python tools/build_csrc.py --optional             where a tool is absent, say so and succeed (setup_env.sh)
    python tools/build_csrc.py --check                is the library made from the sources as they are now?

setup.py calls `build` below, so an installed package and this command make the same file. torch is looked for and not
imported: only its headers and libraries are needed.

Environment: MEGATRON_R1_BUILD_EXT 0 skip, 1 whatever stands in the way is an error, unset: absent tools skip where that was
allowed (`--optional`, setup.py), a compile that fails is an error. MEGATRON_R1_BUILD_CUDA 0 C++ only, 1 CUDA is required, unset:
CUDA when nvcc is found (setup_env.sh: and a GPU is visible). CXX the C++ compiler, CUDA_HOME the CUDA toolkit, MAX_JOBS
compilers at a time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
LIBRARY = ROOT / "megatron_r1" / "lib" / "kernels.so"
OBJECTS = ROOT / "build" / "csrc"
ROOMS = ("qk_norm_rope", "influence", "row_loss")
EXT_VARIABLE, CUDA_VARIABLE = "MEGATRON_R1_BUILD_EXT", "MEGATRON_R1_BUILD_CUDA"
# The oldest torch whose ABI is used: one file serves this release and every later one.
TORCH_MINIMUM, TORCH_TARGET = (2, 11), "0x020b000000000000"
# sm_80 for A100, sm_90a for H100/H200 (wgmma and TMA), PTX for whatever comes later.
ARCHITECTURES = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90")
CXX_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall", "-Wextra")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "--expt-relaxed-constexpr")
# z,defs: a function that is declared and nowhere defined fails here and not when the library is loaded.
LINK_FLAGS = ("-shared", "-Wl,--as-needed", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL")
# g++ 12 and clang 15 are the first with _Float16 in C++; CUDA 12 is the first with sm_90a.
GCC_MINIMUM, CLANG_MINIMUM, CUDA_MINIMUM = 12, 15, 12


class BuildError(RuntimeError):
    """The library can not be built. Three parts: what was expected, what was found (with a compiler's words), what to do."""

    def __init__(self, expected: str, found: str, fix: str) -> None:
        self.expected, self.found, self.fix = expected, found, fix
        super().__init__(f"expected: {expected}\n   found: {found}\n      do: {fix}")


class ToolMissing(BuildError):
    """Nothing is broken, but this machine has not what building takes."""


@dataclass(frozen=True)
class Toolchain:
    """What builds: the compilers, torch's folder (headers, libraries) and version. `nvcc` None means C++ only."""

    cxx: str
    nvcc: str | None
    torch: Path
    torch_version: str

    @cached_property
    def cuda_home(self) -> Path:
        """The toolkit nvcc belongs to, in its own words: the file on PATH may be a script that calls the real one."""
        printed = subprocess.run([str(self.nvcc), "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", printed.stderr + printed.stdout, re.M)
        return Path(top.group(1).strip() if top else str(Path(str(self.nvcc)).resolve().parent.parent)).resolve()


def find_nvcc() -> str | None:
    """CUDA_HOME's nvcc, the one on PATH or the usual place; None when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [found for found in [shutil.which("nvcc")] if found] + ["/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _checked_nvcc() -> tuple[str | None, str]:
    """(nvcc or None, why None)."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None, "none on PATH, in CUDA_HOME or /usr/local/cuda"
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if not release or int(release.group(1)) < CUDA_MINIMUM:
        return None, f"{nvcc} of CUDA {'.'.join(release.groups()) if release else 'unknown'}"
    return nvcc, ""


def _find_cxx() -> str:
    """The C++ compiler's command line; CXX may hold arguments or a launcher (`ccache g++`). Raises ToolMissing."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if not cxx or not shutil.which(shlex.split(cxx)[0]):
        raise ToolMissing(f"a C++ compiler (g++ {GCC_MINIMUM} or newer)", f"CXX={cxx}, which is not there" if cxx else "no g++, c++ or clang++ on PATH", "install g++, or set CXX")
    done = subprocess.run([*shlex.split(cxx), "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True)
    macros = dict(re.findall(r"#define (__GNUC__|__clang_major__) (\d+)", done.stdout))
    name, least = ("clang", CLANG_MINIMUM) if "__clang_major__" in macros else ("g++", GCC_MINIMUM)
    version = int(macros.get("__clang_major__", macros.get("__GNUC__", 0)))
    if version < least:
        raise ToolMissing(f"g++ {GCC_MINIMUM} or clang {CLANG_MINIMUM}, or newer (C++20 with _Float16)", f"{cxx}: {name} {version or 'that does not run: ' + done.stderr.strip()[-200:]}", "install a newer one, or set CXX")
    return cxx


def _find_torch() -> tuple[Path, str]:
    """(torch's folder, version), without importing it. Raises ToolMissing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise ToolMissing(
            "torch, whose headers the bindings need", f"no torch for {sys.executable}",
            "install torch >= 2.11 first, then build with pip's option --no-build-isolation",
        )  # fmt: skip
    folder = Path(next(iter(spec.submodule_search_locations)))
    written = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", (folder / "version.py").read_text(), re.M)
    version = written.group(1) if written else "0.0"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_MINIMUM:
        raise ToolMissing(f"torch >= {'.'.join(map(str, TORCH_MINIMUM))} (its stable ABI)", f"torch {version}", "upgrade torch")
    return folder, version


def find_toolchain(cuda: str = "auto") -> Toolchain:
    """What this machine builds with. Raises ToolMissing.

    cuda: `auto` (when there is an nvcc), `visible` (when there is an nvcc and a GPU), `off` or `require`.
    """
    if not sys.platform.startswith("linux"):
        raise ToolMissing("Linux", sys.platform, "use the plain torch implementations here; nothing else is needed")
    cxx, (torch, version) = _find_cxx(), _find_torch()
    nvcc, why = (None, "") if cuda == "off" or (cuda == "visible" and not gpu_visible()) else _checked_nvcc()
    if cuda == "require" and nvcc is None:
        raise ToolMissing(
            f"nvcc of CUDA {CUDA_MINIMUM} or newer, because CUDA kernels were required", why,
            f"install the CUDA toolkit, set CUDA_HOME, or build without (--cuda off, {CUDA_VARIABLE}=0)",
        )  # fmt: skip
    return Toolchain(cxx, nvcc, torch, version)


def gpu_visible() -> bool:
    """Whether the NVIDIA driver shows a device to this machine or container."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def cuda_setting(environment: Mapping[str, str] = os.environ) -> str:
    """MEGATRON_R1_BUILD_CUDA as `auto`, `off` or `require`. Raises BuildError for anything but unset, auto, 0 and 1."""
    return _setting(environment, CUDA_VARIABLE, {"": "auto", "auto": "auto", "0": "off", "1": "require"})


def ext_setting(environment: Mapping[str, str] = os.environ) -> str:
    """MEGATRON_R1_BUILD_EXT as `auto`, `skip` or `require`. Raises BuildError for anything but unset, auto, 0 and 1."""
    return _setting(environment, EXT_VARIABLE, {"": "auto", "auto": "auto", "0": "skip", "1": "require"})


def _setting(environment: Mapping[str, str], variable: str, meanings: dict[str, str]) -> str:
    value = environment.get(variable, "").strip()
    if value not in meanings:
        raise BuildError(f"{variable} to be 0, 1 or unset", repr(value), f"correct {variable}")
    return meanings[value]


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
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"} and "emulator" not in p.relative_to(CSRC).parts):
        header = path.suffix in {".h", ".cuh"} and path.relative_to(CSRC).parts[0] in {"include", of.parent.name if of else ""}
        if of is None or path == of or header:
            digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_info(tools: Toolchain, rooms: tuple[str, ...] = ROOMS) -> str:
    """What the library says about itself; equal strings mean equal libraries (`--check`, and no link when nothing changed)."""
    cuda = ",".join(a.split("code=")[1] for a in ARCHITECTURES) if tools.nvcc and sources(rooms)[1] else "none"
    return f"cuda={cuda};torch={tools.torch_version};sources={source_hash()};rooms={','.join(rooms)}"


def compile_commands(tools: Toolchain, rooms: tuple[str, ...] = ROOMS) -> list[tuple[Path, list[str]]]:
    """(source, command without output) for every file."""
    cxx_files, cuda_files = sources(rooms)
    if tools.nvcc is None:
        cuda_files = []
    cxx = shlex.split(tools.cxx)
    include = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    torch_include = [f"-isystem{tools.torch / 'include'}", f"-isystem{tools.torch / 'include/torch/csrc/api/include'}"]
    define = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"] + (["-DMR1_WITH_CUDA"] if cuda_files else [])
    if cuda_files:
        define.append("-DUSE_CUDA")
        torch_include.append(f"-isystem{tools.cuda_home / 'include'}")
    commands = []
    for path in cxx_files:
        # Only bindings see torch and know of CUDA: the kernels' objects serve every torch, with CUDA and without.
        extra = [*define, *torch_include] if path.name in ("binding.cpp", "library.cpp") else []
        extra += [f'-DMR1_BUILD_INFO="{build_info(tools, rooms)}"'] if path.name == "library.cpp" else []
        commands.append((path, [*cxx, *CXX_FLAGS, *extra, *include, "-c", str(path)]))
    host = next((word for word in cxx if Path(word).name not in {"ccache", "sccache", "distcc"}), cxx[0])
    for path in cuda_files:
        arches = [part for a in ARCHITECTURES for part in ("-gencode", a)]
        commands.append((path, [str(tools.nvcc), "-ccbin", host, *NVCC_FLAGS, *arches, *include, "-c", str(path)]))
    return commands


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError("this command to succeed", f"exit status {done.returncode}\n{shlex.join(command)}\n{(done.stdout + done.stderr)[-4000:]}", f"mend what the compiler names, or do without the library ({EXT_VARIABLE}=0)")
    return done.stdout + done.stderr


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: two that want the same object must not both compile it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_objects(
    tools: Toolchain,
    rooms: tuple[str, ...] = ROOMS,
    jobs: int | None = None,
    say: Callable[[str], None] = print,
    suffixes: tuple[str, ...] = (".cpp", ".cu"),
) -> dict[Path, Path]:
    """Source -> object, compiling what has no object yet. What the compiler printed is kept beside it (`.log`). Raises BuildError."""
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[Path, list[str]]) -> tuple[Path, Path]:
        path, command = job
        # nvcc itself reads these variables, e.g. NVCC_APPEND_FLAGS=-lineinfo for a profiler.
        flags = [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS") if path.suffix == ".cu"]
        name = hashlib.sha256((source_hash(path) + shlex.join([*command, *flags])).encode()).hexdigest()[:12]
        target = OBJECTS / f"{path.parent.name}-{path.stem}-{name}.o"
        if target.exists():
            return path, target
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                began, temporary = time.monotonic(), target.with_suffix(".tmp.o")
                printed = _run([*command, "-o", str(temporary)])
                target.with_suffix(".log").write_text(printed)
                os.replace(temporary, target)
                say(f"[csrc] compiled {path.relative_to(ROOT)} in {time.monotonic() - began:.1f} s")
        return path, target

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS") or min(cores, 8))) as pool:
        # What takes longest first: kernels, then the rest.
        work = sorted((job for job in compile_commands(tools, rooms) if job[0].suffix in suffixes), key=lambda job: (job[0].stem != "cpu", job[0].suffix != ".cu"))
        return dict(pool.map(one, work))


def _static_cudart(tools: Toolchain) -> Path:
    """CUDA's runtime as a static library, so that the file does not depend on which CUDA a torch brings."""
    for folder in (tools.cuda_home / "lib64", tools.cuda_home / "lib", *tools.cuda_home.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return folder / "libcudart_static.a"
    raise ToolMissing(f"libcudart_static.a under {tools.cuda_home}", "none", f"install the CUDA runtime's development files, or build without (--cuda off, {CUDA_VARIABLE}=0)")


def up_to_date(out: Path, tools: Toolchain, rooms: tuple[str, ...] = ROOMS) -> bool:
    """Whether `out` was made from these sources, with these flags, for this torch."""
    return out.exists() and build_info(tools, rooms).encode() + b"\0" in out.read_bytes()


def build(out: Path = LIBRARY, cuda: str = "auto", rooms: tuple[str, ...] = ROOMS, jobs: int | None = None, say: Callable[[str], None] = print) -> Path:
    """Compile what changed and link `out`. Returns it. Raises BuildError with the compiler's words, ToolMissing when a tool is absent.

    cuda: see `find_toolchain`.
    """
    tools = find_toolchain(cuda)
    note = ""
    if cuda == "visible" and tools.nvcc is None and find_nvcc():
        # One with more in it, from an earlier build, is as good.
        full = find_toolchain("auto")
        tools = full if up_to_date(out, full, rooms) else tools
        note = "" if tools is full else f"; no GPU is visible, so CUDA was left out ({CUDA_VARIABLE}=1 builds it)"
    architectures = build_info(tools, rooms).split(";")[0].removeprefix("cuda=")
    what = ("C++ only" if architectures == "none" else f"C++ and CUDA for {architectures.replace(',', ', ')}") + note
    if up_to_date(out, tools, rooms):
        say(f"[csrc] {out.name} is up to date: {what}")
        return out
    began = time.monotonic()
    static = [str(_static_cudart(tools))] if architectures != "none" else []
    objects = compile_objects(tools, rooms, jobs, say)
    # The C++ library before torch's: torch happens to export pieces of the former, which another release of it need not.
    libraries = [*static, "-lstdc++", f"-L{tools.torch / 'lib'}", "-ltorch_cpu", "-ldl", "-lpthread", "-lrt"]
    link = [*shlex.split(tools.cxx), *LINK_FLAGS, *map(str, objects.values()), *libraries]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _run([*link, "-o", str(temporary)])
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    say(f"[csrc] built {out.name} in {time.monotonic() - began:.0f} s: {what} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Status 0 built or rightly skipped, 1 not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=LIBRARY)
    parser.add_argument("--cuda", choices=("auto", "visible", "off", "require"), help=f"default: {CUDA_VARIABLE}, else auto; the variable decides over `visible`, too")
    parser.add_argument("--only", action="append", choices=ROOMS, help="build this room only; can be given several times")
    parser.add_argument("--jobs", type=int, help="compilers at a time")
    parser.add_argument("--optional", action="store_true", help="an absent tool is said and no error")
    parser.add_argument("--check", action="store_true", help="build nothing: status 0 when the library is made from the present sources")
    options = parser.parse_args(arguments)
    rooms, cuda = tuple(options.only or ROOMS), ""
    try:
        cuda = options.cuda or cuda_setting()
        if cuda == "visible" and cuda_setting() != "auto":
            cuda = cuda_setting()
        if options.check:
            # Which toolchain built it is of no matter here, only from what.
            same = options.out.exists() and f"sources={source_hash()};".encode() in options.out.read_bytes()
            print(f"[csrc] {options.out.name} is {'made from the present sources' if same else 'older than csrc/' if options.out.exists() else 'not built'}")
            return 0 if same else 1
        if options.optional and ext_setting() == "skip":
            print(f"[csrc] not built, because {EXT_VARIABLE}=0{_stays(options.out)}")
            return 0
        build(options.out, cuda, rooms, options.jobs)
    except ToolMissing as error:
        # Asking for CUDA by name is asking for the library.
        if options.optional and ext_setting() != "require" and cuda != "require":
            print(f"[csrc] not built: expected {error.expected}; found {error.found}{_stays(options.out)}")
            return 0
        print(f"{type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    except BuildError as error:
        print(f"{type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    return 0


def _stays(out: Path) -> str:
    return f"; {out.name} of an earlier build stays in use" if out.exists() else "; operations are plain torch"


if __name__ == "__main__":
    raise SystemExit(main())
