"""One rank of two: faults on the other rank alone, a signal to one rank alone, a disk that is full for one rank alone, and ranks that are killed
under torchrun, in a step and in saves.

`python guard_worker.py <folder>` runs all cases; `python guard_worker.py <folder> elastic` the last one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from train_toys import final_bytes, reopen, settings, train

from megatron_r1.artifacts.checkpoint import CheckpointSet
from megatron_r1.parallel import checkpoint, context
from megatron_r1.parallel.mcore import PlannedSave
from megatron_r1.train import loop
from megatron_r1.utils.errors import EnvironmentProblem

GUARD = {"skip": 1, "hold": 1, "recovery": 2, "hold_steps": "2 steps"}
CONFIG = {"model": {"preset": "nano", "num_kv_heads": 2}, "budget": "9 steps", "checkpoints": {"every": "2 steps", "keep": 3}, "guard": GUARD}
LAYOUTS = {"norm": [{}, {"distributed_optimizer": True}], "losses": [{}, {"distributed_optimizer": True}], "part": [{"tensor": 2}, {"pipeline": 2}]}
RANK = int(os.environ.get("RANK", "0"))


def wrong_norm(patch, steps, rank):
    """One rank computes a gradient norm that is not a number; nobody else sees anything wrong."""
    agree = loop.Trainer._agree

    def faulty(self, loss, norm):
        return agree(self, loss, float("nan") if rank == RANK and self.step + 1 in steps else norm)

    patch.setattr(loop.Trainer, "_agree", faulty)


def wrong_part(patch, steps, rank):
    """One rank's part of the gradients holds a number that is none, after the summing over model copies."""
    update = loop.Trainer._update

    def faulty(self, *arguments):
        if rank == RANK and self.step + 1 in steps:
            for chunk in self.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.view(-1)[-1] = float("nan")
        return update(self, *arguments)

    patch.setattr(loop.Trainer, "_update", faulty)


def wrong_losses(patch, steps, rank):
    """One model copy's losses are not numbers, and so its gradients before they are summed. (Tensor-parallel ranks can not differ in that.)"""
    output = loop.Objective.output

    def faulty(self, chunk, batch, arrays):
        found = output(self, chunk, batch, arrays)
        return found * float("nan") if rank == RANK and int(arrays["first_sample"]) // 4 + 1 in steps else found

    patch.setattr(loop.Objective, "output", faulty)


def result(artifact):
    found = CheckpointSet.open(artifact)
    return {"journal": found.journal(), "ledger": found.ledger(), "metrics": found.metrics(), "skipped": found.manifest.skipped_steps}


def cases(folder: Path, shards, rank=1) -> dict:
    results = {}
    for name, fault, steps in (("norm", wrong_norm, (3,)), ("losses", wrong_losses, (5, 6, 7)), ("part", wrong_part, (5, 6, 7))):
        for layout in LAYOUTS[name] if "RANK" in os.environ else [{}]:
            with pytest.MonkeyPatch.context() as patch:
                fault(patch, steps, rank)
                label = f"{name}-{'-'.join(layout) or 'plain'}"
                results[label] = result(train(folder / "runs", settings(**CONFIG, layout=layout), label, shards=shards))
    return results


def signalled(folder: Path, shards) -> list:
    update = loop.Trainer._update

    def asked(self, *arguments):
        if RANK == 1 and self.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", asked)
        with pytest.raises(SystemExit) as stopped:
            train(folder / "runs", settings(**CONFIG), "signalled", shards=shards)
    steps = sorted(path.name for path in (folder / "runs").rglob("step-*") if "signalled" in str(path))
    context.current().barrier()
    straight = train(folder / "runs", settings(**CONFIG), "straight", shards=shards)
    again = train(folder / "runs", settings(**CONFIG), "signalled", shards=shards)
    return [stopped.value.code, steps, final_bytes(again) == final_bytes(straight)]


SHARDED = {**CONFIG, "layout": {"distributed_optimizer": True}}


def full_disk(folder: Path, shards) -> list:
    """Rank 1 can not write its part of the second checkpoint. The same command then goes on from the first one."""
    write, calls = PlannedSave.write, []

    def failing(self):
        calls.append(1)
        if RANK == 1 and len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedSave, "write", failing)
        with pytest.raises(EnvironmentProblem) as caught:
            train(folder / "runs", settings(**SHARDED), "full", shards=shards)
    context.current().barrier()
    steps = sorted(path.name for path in (folder / "runs").rglob("step-*") if "full" in str(path) and not path.name.startswith("."))
    context.current().barrier()
    straight = train(folder / "runs", settings(**SHARDED), "sharded", shards=shards)
    again = train(folder / "runs", settings(**SHARDED), "full", shards=shards)
    return [caught.value.found, steps, final_bytes(again) == final_bytes(straight)]


def elastic(folder: Path, shards) -> dict:
    """Rank 1 is killed in step 4 of the first attempt and, with half a file written, in the save of step 6 of the second; rank 0, in the third,
    between the last file of step 8's checkpoint and its name. The fourth ends in the bytes of a run without a kill. Each rank writes its own part of
    the optimizer's state."""
    update, write, replace = loop.Trainer._update, PlannedSave.write, checkpoint._replace
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def dying(self, *arguments):
        if attempt == "0" and RANK == 1 and self.step + 1 == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *arguments)

    def dying_write(self):
        written = write(self)
        folder = Path(self._writer.path)
        if attempt == "1" and RANK == 1 and "step-00000006" in str(folder):
            tensors = folder / "__1_0.distcp"
            os.truncate(tensors, tensors.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def dying_replace(partial, path):
        if attempt == "2" and path.name == "step-00000008":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(partial, path)

    began = []
    start = loop.Trainer._start

    def note(self):
        began.append(self.step)
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", dying)
        patch.setattr(PlannedSave, "write", dying_write)
        patch.setattr(checkpoint, "_replace", dying_replace)
        patch.setattr(loop.Trainer, "_start", note)
        killed = train(folder / "runs", settings(**SHARDED), "killed", shards=shards)
    straight = train(folder / "runs", settings(**SHARDED), "straight", shards=shards)
    return {"attempt": attempt, "began": began, "same": final_bytes(killed) == final_bytes(straight)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    shards = reopen(Path(arguments["shards"]))
    if sys.argv[2:] == ["elastic"]:
        found = elastic(folder, shards)
    else:
        found = {"cases": cases(folder, shards), "signalled": signalled(folder, shards), "full": full_disk(folder, shards)}
    (folder / f"result-{RANK}.json").write_text(json.dumps(found))
    context.shutdown()
