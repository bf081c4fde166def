"""A training process that kills itself where it is told to: python train_victim.py <folder> <shards> <when> [grpo | probe PATH | teacher PATH].

when: `step N` SIGKILL after the backward pass of step N; `save N` SIGKILL while the checkpoint of step N is written; `chunk N` SIGKILL
while chunk N of the teacher's cache is; `none` run to the end. With a probe documents are scored, with a teacher its cached top k is learnt; with
`grpo` it trains on rewards.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from train_toys import CACHE_TOKENS, CACHED, REWARDED, SCORED, reopen, resumable, train

from megatron_r1.parallel import checkpoint
from megatron_r1.train import loop, teacher_cache, topk_cache


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
    if kind == "chunk":
        save = topk_cache.save_file

        def half_saved(tensors, path):
            save(tensors, path)
            if f"chunk-{number:06d}" in path.name:
                path.write_bytes(path.read_bytes()[: 1 << 10])
                die()

        topk_cache.save_file = half_saved


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, _, number = sys.argv[3].partition(" ")
    arm(kind, int(number or 0))
    teacher_cache.CHUNK_TOKENS = CACHE_TOKENS
    what, path = [*sys.argv[4:], "", ""][:2]
    given = {what: reopen(Path(path))} if path else {}
    train(Path(sys.argv[1]), resumable(**{"": {}, "grpo": REWARDED, "probe": SCORED, "teacher": CACHED}[what]), shards=reopen(Path(sys.argv[2])), **given)
