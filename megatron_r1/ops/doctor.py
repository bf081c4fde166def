"""`megatron-r1 doctor`: what this machine has, which implementation each op would take here, and why not a better one.

Importable, and of some use, without torch: what is installed is looked up without importing it, except torch itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from megatron_r1.utils.errors import EnvironmentProblem, R1Error
from megatron_r1.utils.machine import describe, usable_cores

# What is used when it is there: module (a dotted one is looked up as a folder), distributions it may come from, what for.
# The distribution "apex" of the package index is another project: it has no apex.optimizers.
OPTIONAL = (
    ("transformer_engine", ("transformer-engine", "transformer_engine", "transformer-engine-cu13", "transformer-engine-cu12"), "layers and FP8 on GPUs"),
    ("apex.optimizers", ("apex",), "fused optimizer on GPUs"),
    ("nvidia.dali", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "data loading on GPUs"),
    ("flash_attn_interface", ("flash-attn-3", "flash_attn_3"), "FlashAttention-3"),
    ("flash_attn.cute", ("flash-attn-4", "flash_attn_4"), "FlashAttention-4"),
)
Row = tuple[str, ...]


def locate(module: str) -> Path | None:
    """Folder or file of a module, without importing it or its parents; None when it is not installed."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else Path(next(iter(spec.submodule_search_locations or [])))
    for base in spec.submodule_search_locations or []:
        target = Path(base, *rest)
        if target.is_dir() or target.with_suffix(".py").exists():
            return target
    return None


def version_of(distributions: Iterable[str]) -> str:
    """Version of the first distribution that is installed, else an empty string."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _first_line(command: list[str], pattern: str) -> str | None:
    """What `pattern`'s group finds in the output of a command; None when it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout)
    return found.group(1) if found and not done.returncode else None


def compilers() -> list[Row]:
    """(what, version and place or that there is none) of the C++ compiler and nvcc."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    version = _first_line([*cxx.split(), "--version"], r"(.+)") if cxx else None
    rows = [("c++", f"{version} ({cxx})" if version else f"{cxx} does not run" if cxx else "none: the library can not be built here")]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = next((p for p in [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"] if p and os.access(p, os.X_OK)), None)
    version = _first_line([nvcc, "--version"], r"release [\d.]+, V?([\d.]+)") if nvcc else None
    rows.append(("nvcc", f"{version} ({nvcc})" if version else "none: CUDA kernels can not be built here"))
    return rows


def _gpus() -> tuple[list[str], str]:
    """(one line for each GPU torch can use, why there is none)."""
    import torch

    if torch.cuda.is_available():
        rows = []
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            rows.append(f"cuda:{index} {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
        return rows, ""
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} is a CPU-only build"
    return [], f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU or no driver"


def machine() -> list[Row]:
    """(what, value) of everything but the ops. Needs torch."""
    import torch

    facts = describe()
    gpus, why = _gpus()
    rows = [
        ("python", f"{facts['python']} ({sys.executable})"),
        ("torch", f"{torch.__version__} ({'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU only'})"),
        ("megatron-core", version_of(["megatron-core", "megatron_core"]) or "not installed: needed to train"),
        *compilers(),
        ("processor", f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, vectors {torch.backends.cpu.get_cpu_capability()}"),
        ("GPU", gpus[0] if gpus else f"none: {why}"),
        *[("", gpu) for gpu in gpus[1:]],
        ("threads", f"{torch.get_num_threads()} of {usable_cores()} cores (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})"),
    ]
    return rows + _library()


def _library() -> list[Row]:
    from megatron_r1.ops import extension
    from megatron_r1.ops.dispatch import OPS_VARIABLE

    if reason := extension.missing():
        rows = [("library", f"none: {reason}")]
    else:
        info = extension.build_info()
        kernels = "C++" if info.get("cuda") == "none" else f"C++ and CUDA for {info.get('cuda', 'unknown').replace(',', ', ')}"
        rows = [("library", f"{extension.path()}"), ("", f"{kernels}; built with torch {info.get('torch', 'unknown')}, sources {info.get('sources', 'unknown')}")]
        if stale := _stale(extension.path()):
            rows.append(("", stale))
    return [*rows, (OPS_VARIABLE, os.environ.get(OPS_VARIABLE) or "unset: the best that works")]


def _stale(library: Path) -> str | None:
    """In a checkout: that csrc/ changed after the library was built."""
    script = Path(__file__).parents[2] / "tools" / "build_csrc.py"
    if not script.exists():
        return None
    done = subprocess.run([sys.executable, str(script), "--check", "--out", str(library)], capture_output=True, text=True)
    return None if done.returncode == 0 else "OLDER than the sources in csrc/: run `python tools/build_csrc.py`"


def kinds() -> list[str]:
    """Kinds of device this machine has: `cpu`, and `cuda` where torch can use a GPU."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def choices() -> list[tuple[str, str, str, list[str]]]:
    """(op, device, implementation that would run or the error, why the better ones would not) for all ops and devices."""
    from megatron_r1.ops.dispatch import load_all

    rows = []
    for name, op in load_all().items():
        if not op.names():
            continue
        for device in kinds():
            try:
                chosen = op.choose(device=device).name
            except R1Error as error:
                rows.append((name, device, "ERROR", [f"{error.expected}; found {error.found}"]))
                continue
            better = op.names()[: op.names().index(chosen)]
            why = [f"{other}: {reason or 'available, not asked for'}" for other, reason in op.reasons(device).items() if other in better]
            rows.append((name, device, chosen, why))
    return rows


def cores() -> list[Row]:
    """(device, attention core, `available` or why not), best first, where ops.attention tells."""
    from megatron_r1.ops import attention

    listing: Callable[[str], dict[str, str | None]] | None = getattr(attention, "cores", None)
    if listing is None:
        return []
    return [(device, name, reason or "available") for device in kinds() for name, reason in listing(device).items()]


def optional_packages() -> list[Row]:
    """(module, what for, version or `not installed`)."""
    rows = []
    for module, distributions, purpose in OPTIONAL:
        found = (version_of(distributions) or "installed") if locate(module) else "not installed"
        if module == "apex.optimizers" and found == "not installed" and locate("apex"):
            found = "not installed (the package named apex here is another project)"
        rows.append((module, found, purpose))
    return rows


def table(rows: Iterable[Row], indent: str = "  ") -> str:
    """Aligned columns; the last one is as wide as it is."""
    rows = list(rows)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(max(map(len, rows), default=0))]
    return "\n".join((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip() for row in rows)


def unmet(required: str) -> list[str]:
    """Why an implementation is not taken: a line for each op and device that has it and would take a worse one.

    Raises EnvironmentProblem when no op has one of that name.
    """
    from megatron_r1.ops.dispatch import load_all

    ops = load_all()
    if not any(required in op.names() for op in ops.values()):
        names = sorted({name for op in ops.values() for name in op.names()})
        raise EnvironmentProblem(expected=f"--require to name an implementation: {', '.join(names)}", found=repr(required), fix="correct the name")
    lines = []
    for name, device, chosen, why in choices():
        names = ops[name].names()
        if required not in names or (chosen in names and names.index(chosen) <= names.index(required)):
            continue
        reason = next((line for line in why if line.startswith(f"{required}:")), "; ".join(why))
        lines.append(f"{name} on {device} takes {chosen} ({reason})")
    return lines


def _speak_only_here() -> Callable[[], None]:
    """Keep the ops from logging what the tables below say. Returns what undoes it."""
    import logging

    logger = logging.getLogger("megatron_r1.ops.dispatch")
    before, logger.disabled = logger.disabled, True

    def undo() -> None:
        logger.disabled = before

    return undo


def run(require: list[str]) -> int:
    """Print everything. Status 0; 1 when torch is missing or an implementation in `require` would not be used.

    Raises EnvironmentProblem when a name in `require` is none.
    """
    if locate("torch") is None:
        rows = [("python", f"{sys.version.split()[0]} ({sys.executable})"), ("torch", "none"), *compilers()]
        print(table(rows, indent=""))
        error = EnvironmentProblem(
            expected="torch, which every operation needs",
            found=f"no torch for {sys.executable}",
            fix="install torch >= 2.11 (for this machine's device) and megatron-core, or `source examples/setup_env.sh` in a checkout",
        )
        print(f"\n{type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    undo = _speak_only_here()
    try:
        print(table(machine(), indent=""), flush=True)
        print("\nops")
        heading = ("op", "device", "takes", "why not a better one")
        rows = [heading]
        for op, device, chosen, why in choices():
            rows += [(op, device, chosen, why[0] if why else ""), *[("", "", "", line) for line in why[1:]]]
        print(table(rows), flush=True)
        if attention := cores():
            print(f"\nattention cores\n{table(attention)}")
        print(f"\noptional packages\n{table(optional_packages())}", flush=True)
        lines = {name: found for name in require if (found := unmet(name))}
    finally:
        undo()
    for name, found in lines.items():
        error = EnvironmentProblem(
            expected=f"every op that has an implementation {name} to use it or a better one (--require {name})",
            found="; ".join(found),
            fix="see the reasons; for csrc: build the library (`python tools/build_csrc.py`, or reinstall with --no-build-isolation)",
        )
        print(f"\n{type(error).__name__}\n{error}", file=sys.stderr)
    return 1 if lines else 0
