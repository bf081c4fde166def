"""The import rule of docs/architecture.md, enforced: file, line, edge and rule are named when it is broken."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_r1

ROOT = Path(megatron_r1.__file__).parent
LAYER = {
    "utils": 0, "config": 0, "artifacts": 0,
    "ops": 1, "parallel": 1,
    "model": 2, "data": 2,
    "corpus": 3, "probe": 3, "influence": 3, "mixture": 3, "train": 3, "evaluate": 3, "export": 3, "report": 3,
    "pipeline": 4, "recipes": 4,
    "cli": 5, "__main__": 5,
}  # fmt: skip
FOUNDATION = {"utils", "config", "artifacts"}
MEGATRON_OK = {"parallel", "model"}
TORCH_FREE_PACKAGES = {"utils", "config", "artifacts", "pipeline", "recipes", "cli", "__main__"}
FOUNDATION_MAY_IMPORT = {"numpy", "pydantic", "pydantic_core", "yaml", "rich", "psutil", "pyarrow", "omegaconf"}


def modules() -> list[tuple[str, Path, ast.Module]]:
    """(package inside megatron_r1, file, syntax tree) of every module."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        package = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        found.append((package, path, ast.parse(path.read_text("utf-8"))))
    return found


def imports(tree: ast.Module) -> list[tuple[str, int]]:
    """(dotted module, line) of every import statement, at the top or inside functions; those under TYPE_CHECKING count too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.module, node.lineno))
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names if node.module == "megatron_r1"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((f"relative import level {node.level}", node.lineno))
    return found


def test_every_package_has_a_layer() -> None:
    unknown = {package for package, _, _ in modules() if package not in LAYER and package != "__init__"}
    assert not unknown, f"give these packages a layer in docs/architecture.md and here: {unknown}"


def test_import_rule() -> None:
    broken = []
    for package, path, tree in modules():
        if package == "__init__":
            continue
        for name, line in imports(tree):
            where = f"{path.relative_to(ROOT.parent)}:{line}: {package} -> {name}"
            if name.startswith("relative import"):
                broken.append(f"{where}: imports are absolute")
            if name.startswith("megatron.training"):
                broken.append(f"{where}: megatron.training is never imported")
            if name.split(".")[0] == "megatron" and package not in MEGATRON_OK:
                broken.append(f"{where}: megatron.core is imported only in parallel/ and model/")
            if name.startswith("torch.distributed") and package != "parallel":
                broken.append(f"{where}: torch.distributed is used only in parallel/")
            if package in FOUNDATION and name.split(".")[0] not in {*FOUNDATION_MAY_IMPORT, "megatron_r1", *sys.stdlib_module_names}:
                broken.append(f"{where}: the foundation imports the standard library, numpy, pydantic, yaml, rich, psutil and pyarrow only")
            if package in TORCH_FREE_PACKAGES and name.split(".")[0] in {"torch", "megatron"}:
                broken.append(f"{where}: {package} is free of torch")
            if path.stem == "config" and name.split(".")[0] in {"torch", "megatron", "transformers"}:
                broken.append(f"{where}: modules named config are free of torch")
            parts = name.split(".")
            if parts[0] != "megatron_r1" or len(parts) < 2 or parts[1] == package:
                continue
            target = parts[1]
            if target not in LAYER:
                continue
            same_layer = LAYER[target] == LAYER[package]
            if LAYER[target] > LAYER[package]:
                broken.append(f"{where}: an import points up (L{LAYER[package]} -> L{LAYER[target]})")
            elif same_layer and LAYER[package] not in (0, 4, 5):
                broken.append(f"{where}: packages of layer L{LAYER[package]} do not know each other")
    assert not broken, "\n" + "\n".join(broken)


def test_words_of_the_device_stay_in_their_rooms() -> None:
    broken = []
    for package, path, tree in modules():
        relative = path.relative_to(ROOT).as_posix()
        if package == "ops" or relative == "parallel/device.py":
            continue
        for node in ast.walk(tree):
            text = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value if " " not in node.value else None
            if text and "cuda" in text.lower():
                broken.append(f"{relative}:{getattr(node, 'lineno', '?')}: {text!r} belongs in parallel/device.py or ops/")
    assert not broken, "\n" + "\n".join(broken)


def test_nothing_inside_imports_what_is_outside() -> None:
    outside = {"tools", "examples", "benchmarks", "tests"}
    broken = [f"{path.name}:{line}: {name}" for _, path, tree in modules() for name, line in imports(tree) if name.split(".")[0] in outside]
    assert not broken, broken


@pytest.mark.slow
def test_every_module_imports_without_gpu_or_optional_packages() -> None:
    names = [info.name for info in pkgutil.walk_packages(megatron_r1.__path__, "megatron_r1.") if not info.name.endswith("__main__")]
    assert len(names) > 40
    optional = ["transformer_engine", "apex", "nvidia.dali", "flash_attn", "modelopt", "gguf", "accelerate"]
    code = (
        "import sys, importlib\n"
        f"for name in {optional!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["recipes"], ["run", "quickstart", "--dry-run"], ["run", "quickstart", "--explain", "steps.pretrain1.lr.peak"], ["plan", "quickstart", "--gpus", "8"], ["steps", "quickstart"]],
    ids=["help", "recipes", "dry-run", "explain", "plan", "steps"],
)
def test_the_face_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'transformers'): sys.modules[name] = None\n"
        "from megatron_r1.cli import main\n"
        f"raise SystemExit(main({arguments!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_stage_packages_look_alike() -> None:
    for stage in (name for name, layer in LAYER.items() if layer == 3):
        assert (ROOT / stage / "config.py").exists(), f"{stage}/config.py"
        assert (ROOT / stage / "run.py").exists(), f"{stage}/run.py"
        config = importlib.import_module(f"megatron_r1.{stage}.config")
        assert hasattr(config, f"{stage.capitalize()}Config"), stage
        assert hasattr(config, "describe"), stage
