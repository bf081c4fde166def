"""One rank of influence runs over several processes: `python influence_worker.py <folder>`."""

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
    saved: list[list[object]] = []
    save = jobs.Job.save

    def noting(self: jobs.Job, step: int, partition: jobs.Partition, scores: object, copy: int = 0) -> None:
        saved.append([step, partition.source, partition.number])
        save(self, step, partition, scores, copy)

    jobs.Job.save = noting
    results = []
    for number, changes in enumerate(arguments["runs"]):
        config = influence_config(**changes)
        found = run(config, inputs, open_workspace(folder, f"influence{number}", "influence", config, inputs))
        results.append({"saved": saved[:], "artifact": str(found.path) if found else None})
        saved.clear()
    (folder / f"result-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
