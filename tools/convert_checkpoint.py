"""Convert between a megatron_r1 checkpoint and a Hugging Face folder.

    python tools/convert_checkpoint.py --load runs/quickstart/sft-1a2b3c4d --save out/model --target hf
    python tools/convert_checkpoint.py --load runs/quickstart/sft            --save out/model --target hf --dtype bfloat16
    python tools/convert_checkpoint.py --load out/model/hf --save out/imported --target mcore

To `hf` the result is an export artifact: the model in <save>/hf and the parity proof in <save>/parity.json. To `mcore` it is
a checkpoint artifact, as a train step makes one.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from megatron_r1.artifacts.base import MANIFEST, Artifact, open_artifact, open_workspace
from megatron_r1.utils import io
from megatron_r1.utils.errors import ArtifactError, ConfigError, R1Error


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, say where the result is. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="to hf: a checkpoint artifact, or <run folder>/<step name>; to mcore: a Hugging Face folder")
    parser.add_argument("--save", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--target", choices=("hf", "mcore"), required=True, help="what to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the stored weights (to hf)")
    options = parser.parse_args(arguments)
    command = shlex.join(["tools/convert_checkpoint.py", *(arguments if arguments is not None else sys.argv[1:])])
    try:
        if options.save.exists():
            raise ConfigError(expected="a folder that does not exist yet", found=f"{options.save} exists", fix="choose another folder or remove it")
        artifact = _to_hf(options, command) if options.target == "hf" else _to_mcore(options, command)
        artifact.path.rename(options.save)
    except R1Error as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.save / 'hf'}\nproof: {options.save / 'parity.json'}" if options.target == "hf" else options.save)
    return 0


def find_checkpoint(path: Path) -> Artifact:
    """A checkpoint artifact by its folder, or by <run folder>/<step name> (as the run's run.json says)."""
    if not (path / MANIFEST).is_file() and (path.parent / "run.json").is_file():
        steps = io.read_json(path.parent / "run.json")["steps"]
        if path.name not in steps:
            raise ArtifactError(expected=f"a step of the run {path.parent}", found=repr(path.name), fix="use one of " + ", ".join(steps))
        path = path.parent / steps[path.name]
    return open_artifact(path, "checkpoint", verify="full")


def _to_hf(options: argparse.Namespace, command: str) -> Artifact:
    from megatron_r1.export.config import ExportConfig
    from megatron_r1.export.run import run

    parent = find_checkpoint(options.load)
    config = ExportConfig.model_validate({"stage": "export", "seed": 1, "inputs": {"checkpoint": parent.name}, "dtype": options.dtype})
    work = open_workspace(options.save.absolute().parent, options.save.name, "export", config, {"checkpoint": parent}, command)
    return run(config, {"checkpoint": parent}, work)


def _to_mcore(options: argparse.Namespace, command: str) -> Artifact:
    from megatron_r1.export.from_hf import import_hf

    files = {path.name: io.sha256_file(path) for path in sorted(options.load.glob("*")) if path.suffix in (".json", ".safetensors", ".model")}
    work = open_workspace(options.save.absolute().parent, options.save.name, "checkpoint", {"stage": "import", "files": files}, {}, command)
    try:
        return import_hf(options.load, work)
    except R1Error:
        shutil.rmtree(work.path, ignore_errors=True)
        raise


if __name__ == "__main__":
    sys.exit(main())
