"""JSON lines to .bin/.idx with datatrove, in its own environment, for benchmarks/bench_preprocess.py: its reader, its Megatron tokenizer
step, its local executor, with the defaults of each."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import metadata

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer


def main() -> None:
    """Entry point; prints the seconds, imports left out, and versions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="one file for each worker")
    parser.add_argument("tokenizer")
    parser.add_argument("end")
    parser.add_argument("output")
    parser.add_argument("workers", type=int)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as logs:
        LocalPipelineExecutor(
            [JsonlReader(options.folder), MegatronDocumentTokenizer(options.output, tokenizer_name_or_path=options.tokenizer, eos_token=options.end)],
            tasks=options.workers, workers=options.workers, logging_dir=logs,
        ).run()
    print(json.dumps({"seconds": time.perf_counter() - began, "versions": {name: metadata.version(name) for name in ("datatrove", "tokenizers")}}))


if __name__ == "__main__":
    main()
