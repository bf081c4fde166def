"""One rank of a two-process influence run: `python influence_worker.py <folder>`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "probe")]

from small_world import influence_config  # noqa: E402

from megatron_r1.artifacts.base import open_artifact, open_workspace  # noqa: E402
from megatron_r1.influence import job as jobs  # noqa: E402
from megatron_r1.influence.run import run  # noqa: E402


def main(folder: Path) -> None:
    """Score, and tell which partitions this rank computed."""
    arguments = json.loads((folder / "arguments.json").read_text())
    inputs = {role: open_artifact(path) for role, path in arguments["inputs"].items()}
    config = influence_config(**arguments["changes"])
    saved = []
    save = jobs.Job.save

    def noting(self: jobs.Job, step: int, partition: jobs.Partition, scores: object) -> None:
        saved.append([step, partition.source, partition.number])
        save(self, step, partition, scores)

    jobs.Job.save = noting
    found = run(config, inputs, open_workspace(folder, "influence", "influence", config, inputs))
    result = {"saved": saved, "artifact": str(found.path) if found else None}
    (folder / f"result-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
