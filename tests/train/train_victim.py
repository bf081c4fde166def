"""A training process that kills itself where it is told to: python train_victim.py <folder> <shards> <when> [probe | grpo].

when: `step N` SIGKILL after the backward pass of step N; `save N` SIGKILL while the checkpoint of step N is written;
`none` run to the end. With a probe documents are scored; with `grpo` it trains on rewards.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from train_toys import REWARDED, SCORED, reopen, resumable, train

from megatron_r1.parallel import checkpoint
from megatron_r1.train import loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int) -> None:
    if kind == "step":
        update = loop.Trainer._update

        def dying(self, *arguments):
            if self.step + 1 == number:
                for saver in self._savers():  # so that it does not depend on the machine which checkpoint was complete by then
                    saver.settle(self)
                die()
            return update(self, *arguments)

        loop.Trainer._update = dying
    if kind == "save":
        hashing = checkpoint._hash_own_files

        def half_written(folder, ctx):
            if f"step-{number:08d}" in folder.name:
                tensors = next((folder / "weights").glob("*.distcp"))
                tensors.write_bytes(tensors.read_bytes()[: 1 << 14])
                die()
            return hashing(folder, ctx)

        checkpoint._hash_own_files = half_written


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, _, number = sys.argv[3].partition(" ")
    arm(kind, int(number or 0))
    beside = sys.argv[4] if len(sys.argv) > 4 else ""
    probe = reopen(Path(beside)) if beside not in ("", "grpo") else None
    changes = REWARDED if beside == "grpo" else SCORED if probe else {}
    train(Path(sys.argv[1]), resumable(**changes), shards=reopen(Path(sys.argv[2])), probe=probe)
