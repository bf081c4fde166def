"""One process of one of two machines under torchrun: that of machine 1 is killed once, that of machine 0 hangs meanwhile, as it would in NCCL.

`python elastic_node_worker.py <folder>`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from megatron_r1.parallel import context

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["GROUP_RANK"])
    ctx = context.initialize()
    began = folder / f"began-{rank}"
    if not began.exists():
        began.touch()
        ctx.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    total = ctx.all_reduce_sum(torch.tensor(float(ctx.rank + 1)), over="world")
    (folder / f"result-{rank}.json").write_text(json.dumps([os.environ["TORCHELASTIC_RESTART_COUNT"], float(total)]))
    context.shutdown()
