"""One rank: the whole train stage under every layout asked for, one after the other, in one process start."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from train_toys import reopen, settings, train

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.parallel import context


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = json.loads((folder / "arguments.json").read_text())
    results = {}
    for name, case in arguments["cases"].items():
        started = time.monotonic()
        inputs = {role: reopen(Path(path)) for role, path in case.get("inputs", {}).items()}
        artifact = train(folder / "runs", settings(**case["settings"]), name, shards=reopen(Path(case["shards"])), **inputs)
        found = CheckpointSet.open(artifact)
        results[name] = {"metrics": found.metrics(), "ledger": found.ledger(), "cursors": found.manifest.plain()["data_cursors"], "path": str(artifact.path)}
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    (folder / f"result-{context.current().rank}.json").write_text(json.dumps(results))
    context.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
