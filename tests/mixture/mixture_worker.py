"""One rank: the mixture stage as every rank of a torchrun job enters it, by methods that need a model and that do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_r1.artifacts.base import open_artifact, open_workspace
from megatron_r1.mixture.config import MixtureConfig
from megatron_r1.mixture.run import run
from megatron_r1.utils.logging import is_main_rank


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = json.loads((folder / "arguments.json").read_text())
    made = {}
    for name, plain in arguments["configs"].items():
        config = MixtureConfig.model_validate(plain)
        inputs = {role: open_artifact(path) for role, path in arguments["inputs"].items() if role == "shards" or role in plain["inputs"]}
        artifact = run(config, inputs, open_workspace(folder, name, "mixture", config, inputs))
        assert (artifact is not None) == is_main_rank()
        made[name] = None if artifact is None else str(artifact.path)
    rank = 0 if is_main_rank() else 1
    (folder / f"result-{rank}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
