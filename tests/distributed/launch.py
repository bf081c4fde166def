"""Start N gloo processes of one script, without a port race, and collect what each rank has to say.

The launching process hosts the rendezvous store on a port the system picks, as torchrun's agent does, so many launches can
run side by side. Each rank's output goes to a file of its own; when one rank fails the others are ended at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def launch(script: Path, world_size: int, folder: Path, arguments: dict[str, Any], timeout: float = 300.0) -> list[Any]:
    """Run `python script <folder>` on `world_size` ranks; returns what each rank wrote to `<folder>/result-<rank>.json`.

    `arguments` reach the ranks as `<folder>/arguments.json`. Raises AssertionError with the logs when a rank fails or the
    time is up.
    """
    from torch.distributed import TCPStore

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent), os.environ.get("PYTHONPATH", "")]),
        }
        with open(logs[rank], "wb") as log:
            processes.append(subprocess.Popen([sys.executable, str(script), str(folder)], env=environment, stdout=log, stderr=log, cwd=folder))
    try:
        _wait(processes, logs, time.monotonic() + timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen[bytes]], logs: list[Path], deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    states = [process.poll() for process in processes]
    if any(state != 0 for state in states):
        tails = "\n".join(f"--- rank {rank} (exit {state}): {log}\n{log.read_text(errors='replace')[-6000:]}" for rank, (state, log) in enumerate(zip(states, logs)))
        raise AssertionError(f"a rank failed or the time was up\n{tails}")
