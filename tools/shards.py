"""Look into shards, check them, put them together and cut them up.

    python tools/shards.py inspect runs/quickstart/corpus-1a2b3c4d                       # what it holds
    python tools/shards.py inspect runs/quickstart/corpus-1a2b3c4d --document web_wiki:test:3
    python tools/shards.py inspect runs/quickstart/corpus-1a2b3c4d --id web_wiki:0042    # the document of that id
    python tools/shards.py stats runs/quickstart/corpus-1a2b3c4d --content --json        # lengths, duplicates, frequent tokens
    python tools/shards.py verify runs/quickstart/corpus-1a2b3c4d                        # any flipped bit is found
    python tools/shards.py merge runs/a/corpus-11111111 runs/b/corpus-22222222 --out runs/both
    python tools/shards.py split runs/quickstart/corpus-1a2b3c4d --source web_wiki --split train --parts 4 --out out/wiki

PATH is the folder of a shards artifact, or the prefix of a Megatron dataset (`out/web` for out/web.bin and out/web.idx), whoever wrote it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_r1.data.shard_checks import verify
from megatron_r1.data.shard_rewrite import (
    COLLISIONS_FILE,
    merge_artifacts,
    merge_datasets,
    split_dataset,
    split_documents,
    split_fractions,
    split_parts,
)
from megatron_r1.data.shard_stats import Statistics, shards_of, statistics
from megatron_r1.data.shards import Shard, ShardSet, find_document
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.utils.errors import ConfigError, R1Error

Shards = dict[tuple[str, str], Shard]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, several: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("path", metavar="PATH", nargs="+" if several else None, type=Path, help="folder of a shards artifact, or prefix of a .bin/.idx")
        return sub

    def chosen(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--source", help="only this source of an artifact")
        sub.add_argument("--split", help="only this split of an artifact")

    def written(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument("--out", required=True, type=Path, help=what)
        sub.add_argument("--force", action="store_true", help="replace what is there")

    sub = command("inspect", "what shards hold, or one document, decoded, with the place it came from")
    chosen(sub)
    sub.add_argument("--document", metavar="SOURCE:SPLIT:NUMBER", help="this document (of a .bin/.idx: NUMBER)")
    sub.add_argument("--id", help="the documents of this id")
    sub.add_argument("--tokenizer", type=Path, help="tokenizer folder to decode a .bin/.idx with")
    sub = command("stats", "tokens, documents, lengths")
    chosen(sub)
    sub.add_argument("--content", action="store_true", help="read the tokens too: duplicates and frequent tokens")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub = command("verify", "check every byte", several=True)
    sub = command("merge", "several artifacts, or several .bin/.idx, of one tokenizer into one", several=True)
    written(sub, "folder of the new artifact, or prefix of the new .bin/.idx")
    sub = command("split", "one split of one source, or a .bin/.idx, into several .bin/.idx")
    chosen(sub)
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--parts", type=int, help="so many runs of neighbours of about equal tokens")
    how.add_argument("--documents", type=int, help="runs of so many neighbours")
    how.add_argument("--fractions", type=float, nargs="+", help="shares that add up to 1; a document's part follows from its group (or id) and --seed alone")
    sub.add_argument("--seed", type=int, default=0, help="of --fractions")
    written(sub, "prefix of the new .bin/.idx: -00000-of-0000N is appended")
    return parser.parse_args(argv)


def opened(args: argparse.Namespace) -> tuple[Shards, Tokenizer | None]:
    """The shards named on the command line, and their tokenizer if it is known."""
    if args.path.is_dir():
        shards = ShardSet.open(args.path)
        return shards_of(shards, args.source, args.split), shards.tokenizer
    if args.source or args.split:
        raise ConfigError(expected="--source and --split with an artifact's folder", found=str(args.path), fix="leave them out: a .bin/.idx has neither")
    tokenizer = getattr(args, "tokenizer", None)
    return {(args.path.name, ""): Shard.at(args.path)}, Tokenizer.load(tokenizer) if tokenizer else None


def inspect(args: argparse.Namespace) -> int:
    """A table of what there is, or documents."""
    shards, tokenizer = opened(args)
    if not args.document and args.id is None:
        for (source, split), shard in shards.items():
            name = f"{source}:{split}" if split else source
            extra = ", ".join(what for what, there in (("masks", shard.masked), ("no docs.parquet", not shard.documented and len(shard)), ("no checksums", not shard.checked)) if there)
            print(f"{name:32s} {len(shard):>12,} documents {shard.n_tokens:>16,} tokens {shard.n_bytes:>16,} bytes  {shard.dtype} {extra}")
        if args.path.is_dir():
            for entry in ShardSet.open(args.path).missing:
                print(f"missing: {entry['name']} ({entry['reason']})")
        return 0
    for (source, split), shard, number in find_document(shards, args.document, args.id):
        tokens, mask = shard.tokens(number), shard.mask(number)
        row = shard.documents.row(number) if shard.documented else {}
        print(f"{source}:{split}:{number}  {len(tokens)} tokens  " + "  ".join(f"{key} {value}" for key, value in row.items() if key != "n_tokens"))
        for title, ids in (("", tokens), ("--- learnt:", None if mask is None else tokens[mask.astype(bool)])):
            if ids is not None:
                print(title + (tokenizer.decode(ids.tolist()) if tokenizer else " ".join(map(str, ids.tolist()))))
    return 0


def stats(args: argparse.Namespace) -> int:
    """Figures as a table or JSON."""
    shards, tokenizer = opened(args)
    rows = statistics(shards, args.content)
    if args.json:
        print(json.dumps([{**row.plain(), "mean": row.mean, "bytes_per_token": row.bytes_per_token} for row in rows], indent=2))
        return 0
    percents = list(next((row.percentiles for row in rows if row.documents), {}))
    view = Table(title=str(args.path))
    for heading in ("source", "split", "documents", "tokens", "bytes/token", "mean", "shortest", *(f"p{percent}" for percent in percents), "longest", "empty", "duplicates"):
        view.add_column(heading, justify="left" if heading in ("source", "split") else "right")
    for row in rows:
        if row.documents:
            view.add_row(*_cells(row, percents))
    Console(width=None if sys.stdout.isatty() else 250).print(view)
    if rows[-1].frequent is not None:
        for token, count in rows[-1].frequent:
            print(f"token {token}: {count:,} times {tokenizer.decode([token])!r}" if tokenizer else f"token {token}: {count:,} times")
    return 0


def _cells(row: Statistics, percents: list[int]) -> list[str]:
    duplicates = "-" if row.duplicates is None else f"{row.duplicates:,}"
    lengths = [f"{row.percentiles[percent]:,}" for percent in percents]
    size = f"{row.bytes_per_token:.2f}" if row.bytes else "-"
    return [row.source, row.split, f"{row.documents:,}", f"{row.tokens:,}", size, f"{row.mean:,.1f}", f"{row.shortest:,}", *lengths, f"{row.longest:,}", f"{row.empty:,}", duplicates]


def check(args: argparse.Namespace) -> int:
    """Verify; 1 when something is damaged."""
    worst = 0
    for path in args.path:
        verdict = verify(path)
        for error in verdict.damaged:
            print(f"DAMAGED\n{error}")
        for name in verdict.unprotected:
            print(f"no checksum: {name} (only contradictions can be found)")
        print(f"{path}: {len(verdict.damaged)} damaged, {verdict.files:,} files with {verdict.bytes:,} bytes read")
        worst = max(worst, bool(verdict.damaged))
    return worst


def merge(args: argparse.Namespace) -> int:
    """Several into one."""
    if all(path.is_dir() for path in args.path):
        artifact = merge_artifacts(args.path, args.out, args.force)
        count = artifact.manifest.summary["colliding_ids"]
        print(f"{artifact.path}: {len(artifact.manifest.summary['sources'])} sources, {count:,} ids of several documents" + (f", see {COLLISIONS_FILE}" if count else ""))
        return 0
    if any(path.is_dir() for path in args.path):
        raise ConfigError(expected="artifacts only, or .bin/.idx only", found="both", fix="split the artifact's source into a .bin/.idx first")
    record, found, count = merge_datasets(args.path, args.out, args.force)
    print(f"{args.out}: {record.documents:,} documents, {record.tokens:,} tokens, {count:,} ids of several documents")
    for entry in found[:10]:
        print(f"id {entry['id']}: " + ", ".join(f"{place} {number}" for place, _, number in entry["documents"]))
    return 0


def split(args: argparse.Namespace) -> int:
    """One into several."""
    shards, _ = opened(args)
    filled = {key: shard for key, shard in shards.items() if len(shard)}
    if len(filled) != 1:
        raise ConfigError(expected="one split of one source with documents", found=f"{len(filled)} of them", fix="name it with --source and --split")
    (shard,) = filled.values()
    if args.parts is not None:
        owner, parts = split_parts(shard, args.parts), args.parts
    elif args.documents is not None:
        owner = split_documents(shard, args.documents)
        parts = int(owner[-1]) + 1
    else:
        owner, parts = split_fractions(shard, args.fractions, args.seed), len(args.fractions)
    for number, record in enumerate(split_dataset(shard, owner, parts, args.out, args.force)):
        print(f"{args.out}-{number:05d}-of-{parts:05d}: {record.documents:,} documents, {record.tokens:,} tokens")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 when something is damaged or the request makes no sense."""
    args = arguments(argv)
    try:
        return {"inspect": inspect, "stats": stats, "verify": check, "merge": merge, "split": split}[args.command](args)
    except (R1Error, OSError) as error:
        print(f"shards.py: {type(error).__name__}\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
