"""JSON lines to Megatron's .bin/.idx, with the flags Megatron users know.

    python tools/preprocess_data.py --input data/*.jsonl --json-keys text --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer.json --output-prefix out/web --append-eod --workers 8

writes out/web_text_document.bin and .idx (one pair per key), which stock megatron.core reads, and .crc files with checksums.
Bad lines go to out/web_text_document.bad.jsonl with byte offset and reason. For splits, deduplication, decontamination and
resuming, use the corpus stage (`megatron-r1 corpus`), of which this is the smallest part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from megatron_r1.corpus.config import CorpusConfig, SourceConfig, TokenizerConfig
from megatron_r1.corpus.direct import Done, write_dataset
from megatron_r1.corpus.files import describe
from megatron_r1.corpus.tokenizers import make
from megatron_r1.data.tiktoken_ranks import ENCODINGS
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import ConfigError, R1Error
from megatron_r1.utils.logging import get_logger
from megatron_r1.utils.machine import usable_cores

log = get_logger("preprocess_data")
TYPES = {
    "HuggingFaceTokenizer": "huggingface", "SentencePieceTokenizer": "sentencepiece", "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece", "TikTokenizer": "tiktoken", "R1Tokenizer": "folder",
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
    group.add_argument("--tokenizer-model", required=True, help="tokenizer.json or its folder, *.model, a tiktoken rank file, or the tokenizer folder of a shards artifact (R1Tokenizer)")
    group.add_argument("--tokenizer-library", default="auto", choices=("auto", "plain", "gigatoken"), help="auto: gigatoken where it is installed and gives the same ids")
    group.add_argument("--tiktoken-encoding", choices=tuple(ENCODINGS), help="TikTokenizer: the published encoding of the rank file")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path of the output without _<key>_document.bin")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=None, help="processes that read and tokenise; by default all cores. A compressed file is one process's work")
    group.add_argument("--log-interval", type=int, default=10000, help="documents between two progress lines")
    group.add_argument("--partitions", type=int, default=1, help="only 1: processes share the work of one file")
    group.add_argument("--max-bad-ratio", type=float, default=0.01, help="share of bad lines above which nothing is written")
    return parser.parse_args(argv)


def open_tokenizer(args: argparse.Namespace, folder: Path) -> Tokenizer:
    """The tokenizer the flags ask for. Raises ConfigError or DataError."""
    if args.tokenizer_type not in TYPES:
        raise ConfigError(expected=f"--tokenizer-type among {', '.join(TYPES)}", found=args.tokenizer_type, fix="export the tokenizer as a Hugging Face tokenizer.json and use HuggingFaceTokenizer")
    kind = TYPES[args.tokenizer_type]
    if kind == "folder":
        return Tokenizer.load(args.tokenizer_model)
    if (kind == "tiktoken") != (args.tiktoken_encoding is not None):
        raise ConfigError(
            expected="--tiktoken-encoding together with --tokenizer-type TikTokenizer", found="one without the other",
            fix=f"name the rank file's encoding ({', '.join(ENCODINGS)}); for others use the corpus stage, tokenizer.pattern",
        )
    config = CorpusConfig(
        sources={"unused": SourceConfig(kind="jsonl", path=args.input[0], domain="web")},
        tokenizer=TokenizerConfig(kind=kind, path=args.tokenizer_model, encoding=args.tiktoken_encoding),  # type: ignore[arg-type]
    )
    return make(config, None, (), folder)


def write_key(args: argparse.Namespace, key: str, tokenizer: Tokenizer) -> Done:
    """Write one field of all inputs. Raises DataError when too much is bad."""
    prefix = Path(f"{args.output_prefix}_{key}_document")
    source = SourceConfig(kind="jsonl", path="-", text_field=key, domain="web")
    began, said, done = time.monotonic(), 0, Done()
    for done in write_dataset(
        prefix, source, describe(args.input), tokenizer.folder, args.tokenizer_library, args.append_eod, args.workers or usable_cores(), args.max_bad_ratio
    ):
        if done.documents - said >= args.log_interval:
            seconds, said = time.monotonic() - began, done.documents
            log.info("%s: %d documents (%.0f/s, %.1f MB/s)", key, done.documents, done.documents / seconds, done.bytes / 1e6 / seconds)
    log.info("%s: %d documents, %d tokens by %s, %d bad lines -> %s.bin, .idx", key, done.documents, done.tokens, done.library, done.bad, prefix)
    return done


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0 when everything was written."""
    args = arguments(argv)
    try:
        if args.split_sentences:
            raise ConfigError(expected="documents as they are", found="--split-sentences", fix="leave it out: sentence splitting serves BERT-style training, which this project does not do")
        if not 0 <= args.max_bad_ratio <= 1:
            raise ConfigError(expected="--max-bad-ratio from 0 to 1", found=str(args.max_bad_ratio), fix="give the share of bad lines that is bearable, such as 0.01")
        if args.workers is not None and args.workers < 1:
            raise ConfigError(expected="--workers of 1 or more", found=str(args.workers), fix="leave it out for all cores")
        if args.partitions != 1:
            raise ConfigError(expected="--partitions 1", found=str(args.partitions), fix="leave it out: processes share the work of a file (--workers), and the corpus stage resumes per source")
        describe(args.input)
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
