"""JSON lines to Megatron's .bin/.idx, with the flags Megatron users know.

    python tools/preprocess_data.py --input data/*.jsonl --json-keys text --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer.json --output-prefix out/web --append-eod --workers 8

writes out/web_text_document.bin and .idx (one pair per key), which stock megatron.core reads, and .crc files with checksums.
Bad lines go to out/web_text_document.bad.jsonl with byte offset and reason. For splits, deduplication, decontamination and
resuming, use the corpus stage (`megatron-r1 corpus`), of which this is the smallest part.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_r1.corpus.config import CorpusConfig, SourceConfig, TokenizerConfig
from megatron_r1.corpus.files import describe
from megatron_r1.corpus.readers import Bad, read
from megatron_r1.corpus.tokenise import BATCH_BYTES, BATCH_DOCUMENTS, use_threads
from megatron_r1.corpus.tokenizers import make
from megatron_r1.data.document import Document
from megatron_r1.data.indexed import IndexedWriter, token_dtype
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import ConfigError, DataError, R1Error
from megatron_r1.utils.io import disk_errors
from megatron_r1.utils.logging import get_logger

log = get_logger("preprocess_data")
TYPES = {
    "HuggingFaceTokenizer": "huggingface", "SentencePieceTokenizer": "sentencepiece", "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece", "R1Tokenizer": "folder",
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input")
    group.add_argument("--input", required=True, nargs="+", help="JSON-lines files or URLs (.gz, .bz2, .xz, .zst too)")
    group.add_argument("--json-keys", nargs="+", default=["text"], help="fields to write, one dataset each")
    group.add_argument("--split-sentences", action="store_true", help="not supported (BERT-style data)")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help="one of " + ", ".join(TYPES))
    group.add_argument("--tokenizer-model", required=True, help="tokenizer.json or its folder, *.model, or the tokenizer folder of a shards artifact (R1Tokenizer)")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path of the output without _<key>_document.bin")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=None, help="threads that tokenise; by default all cores")
    group.add_argument("--log-interval", type=int, default=10000, help="documents between two progress lines")
    group.add_argument("--partitions", type=int, default=1, help="only 1: threads share the work of one file")
    group.add_argument("--max-bad-ratio", type=float, default=0.01, help="share of bad lines above which nothing is written")
    return parser.parse_args(argv)


def open_tokenizer(args: argparse.Namespace, folder: Path) -> Tokenizer:
    """The tokenizer the flags ask for. Raises ConfigError or DataError."""
    if args.tokenizer_type not in TYPES:
        raise ConfigError(expected=f"--tokenizer-type among {', '.join(TYPES)}", found=args.tokenizer_type, fix="export the tokenizer as a Hugging Face tokenizer.json and use HuggingFaceTokenizer")
    kind = TYPES[args.tokenizer_type]
    if kind == "folder":
        return Tokenizer.load(args.tokenizer_model)
    config = CorpusConfig(
        sources={"unused": SourceConfig(kind="jsonl", path=args.input[0], domain="web")}, tokenizer=TokenizerConfig(kind=kind, path=args.tokenizer_model),  # type: ignore[arg-type]
    )
    return make(config, None, (), folder)


def write_key(args: argparse.Namespace, key: str, tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Write one field of all inputs; returns documents, tokens, bad lines. Raises DataError when too many are bad."""
    prefix = Path(f"{args.output_prefix}_{key}_document")
    with disk_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
    source = SourceConfig(kind="jsonl", path="-", text_field=key, domain="web")
    end = [tokenizer.eos_id] if args.append_eod else []
    documents = tokens = bad = size = 0
    began, batch, waiting = time.monotonic(), [], 0
    quarantine = prefix.with_name(prefix.name + ".bad.jsonl")
    quarantine.unlink(missing_ok=True)
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:

        def flush() -> int:
            written = 0
            for ids in tokenizer.encode_batch(batch):
                writer.add(np.asarray(ids + end, np.int64))
                written += len(ids) + len(end)
            batch.clear()
            return written

        for made, length in read(key, source, describe(args.input)):
            size += length
            if isinstance(made, Bad):
                bad += 1
                with disk_errors(quarantine), open(quarantine, "a", encoding="utf-8") as sink:
                    sink.write(json.dumps(made.record(), ensure_ascii=False) + "\n")
                continue
            assert isinstance(made, Document)
            batch.append(made.text or "")
            documents, waiting = documents + 1, waiting + length
            if waiting >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                tokens, waiting = tokens + flush(), 0
            if documents % args.log_interval == 0:
                seconds = time.monotonic() - began
                log.info("%s: %d documents (%.0f/s, %.1f MB/s)", key, documents, documents / seconds, size / 1e6 / seconds)
        tokens += flush()
        if bad > args.max_bad_ratio * (bad + documents):
            raise DataError(
                expected=f"at most {args.max_bad_ratio:.2%} bad lines", found=f"{bad} of {bad + documents}, listed in {quarantine}", fix="mend them, or raise --max-bad-ratio"
            )
    log.info("%s: %d documents, %d tokens, %d bad lines -> %s.bin, .idx", key, documents, tokens, bad, prefix)
    return documents, tokens, bad


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 when everything was written."""
    args = arguments(argv)
    try:
        if args.split_sentences:
            raise ConfigError(expected="documents as they are", found="--split-sentences", fix="leave it out: sentence splitting serves BERT-style training, which this project does not do")
        if args.partitions != 1:
            raise ConfigError(expected="--partitions 1", found=str(args.partitions), fix="leave it out: threads share the work of a file, and the corpus stage resumes per source")
        describe(args.input)
        use_threads(args.workers)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = open_tokenizer(args, Path(folder) / "tokenizer")
            if args.append_eod and tokenizer.eos_id is None:
                raise ConfigError(expected="a tokenizer with an end-of-document token for --append-eod", found="none among the usual names", fix="leave --append-eod out, or use a tokenizer that has one")
            for key in args.json_keys:
                write_key(args, key, tokenizer)
    except R1Error as error:
        print(f"preprocess_data.py: {type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
