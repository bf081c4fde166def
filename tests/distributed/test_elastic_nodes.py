"""Two machines under torchrun, as examples/launch/multi_node.sh starts them: one process dies, all meet again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def exported() -> dict[str, str]:
    """What the launch script puts into torchrun's environment."""
    script = (ROOT / "examples/launch/multi_node.sh").read_text()
    return dict(re.findall(r"^export (\w+)=(\S+)", script, re.MULTILINE))


@pytest.mark.slow
def test_machines_whose_torchruns_count_restarts_differently_meet_again(tmp_path: Path) -> None:
    """The torchrun whose process died counts a restart, the other one, whose process only hangs, counts none: TORCHELASTIC_RESTART_COUNT is no
    name under which they would find each other."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False).port  # free again once it is collected
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--monitor-interval", "0.2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | exported()
    logs = [tmp_path / f"machine-{number}.log" for number in range(2)]
    machines = []
    for number, log in enumerate(logs):
        with open(log, "wb") as stream:
            whole = [*command, "--node-rank", str(number), str(HERE / "elastic_node_worker.py"), str(tmp_path)]
            machines.append(subprocess.Popen(whole, env=environment, stdout=stream, stderr=stream, cwd=tmp_path))
    try:
        codes = [machine.wait(timeout=240) for machine in machines]
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait()
    assert codes == [0, 0], "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
    results = [json.loads((tmp_path / f"result-{number}.json").read_text()) for number in range(2)]
    assert sorted(count for count, _ in results) == ["0", "1"]
    assert [total for _, total in results] == [3.0, 3.0]
