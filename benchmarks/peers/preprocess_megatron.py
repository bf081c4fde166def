"""JSON lines to .bin/.idx in the manner of Megatron-LM: a pool of processes encodes lines with Hugging Face tokenizers, the parent adds them to
megatron-core's dataset builder. Written from the description of its preprocessing, for benchmarks/bench_preprocess.py."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer

state: dict[str, Any] = {}


def begin(path: str, end: int) -> None:
    """Of every process of the pool."""
    state.update(tokenizer=Tokenizer.from_file(path), end=end)


def encode(line: str) -> list[int]:
    """Ids of the document in a line."""
    ids = state["tokenizer"].encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(state["end"])
    return ids


def main() -> None:
    """Entry point; prints the seconds, imports left out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("tokenizer")
    parser.add_argument("end", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("prefix")
    parser.add_argument("workers", type=int)
    options = parser.parse_args()
    began = time.perf_counter()
    builder = IndexedDatasetBuilder(options.prefix + ".bin", dtype=DType.optimal_dtype(options.size))
    with multiprocessing.Pool(options.workers, begin, (options.tokenizer, options.end)) as pool, open(options.input, encoding="utf-8") as lines:
        for ids in pool.imap(encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(options.prefix + ".idx")
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
