"""Look into a shards artifact: what it holds, whether it is whole, and what a document says.

    python tools/inspect_shards.py runs/quickstart/corpus-1a2b3c4d                       # table of sources
    python tools/inspect_shards.py runs/quickstart/corpus-1a2b3c4d --verify              # check every byte
    python tools/inspect_shards.py runs/quickstart/corpus-1a2b3c4d --show web_wiki:test:3  # one document
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from megatron_r1.data.shards import SPLITS, ShardSet
from megatron_r1.utils.errors import DataError, R1Error


def table(shards: ShardSet) -> Table:
    """Tokens and documents per source and split."""
    view = Table(title=f"{shards.path.name}: tokenizer of {shards.tokenizer.vocab_size} ids")
    for heading in ("source", "domain", "format", *(f"{split} tokens (docs)" for split in SPLITS), "bytes/token", "dropped"):
        view.add_column(heading, justify="left" if heading in ("source", "domain", "format", "dropped") else "right")
    for name, record in shards.sources.items():
        entries = [record.splits[split] for split in SPLITS]
        tokens, size = sum(entry.tokens for entry in entries), sum(entry.bytes for entry in entries)
        view.add_row(
            name, record.domain, record.format, *(f"{entry.tokens:,} ({entry.documents:,})" for entry in entries), f"{size / max(tokens, 1):.2f}",
            ", ".join(f"{count} {reason}" for reason, count in record.dropped.items()),
        )
    return view


def show(shards: ShardSet, where: str, console: Console) -> None:
    """Print document source:split:number with its learnt tokens marked."""
    parts = where.split(":")
    if len(parts) != 3 or not parts[2].isdigit():
        raise DataError(expected="SOURCE:SPLIT:NUMBER, such as web_wiki:train:0", found=where, fix="correct --show")
    shard, number = shards.split(parts[0], parts[1]), int(parts[2])
    if number >= len(shard):
        raise DataError(expected=f"a document number below {len(shard)}", found=parts[2], fix="correct --show")
    tokens, mask = shard.tokens(number), shard.mask(number)
    console.print(f"id {shard.ids[number]}  group {shard.groups[number]}  {len(tokens)} tokens", markup=False)
    console.print(shards.tokenizer.decode(tokens), markup=False, highlight=False)
    if mask is not None:
        console.print("--- learnt:", markup=False)
        console.print(shards.tokenizer.decode(tokens[mask.astype(bool)]), markup=False, highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 when the artifact is damaged or the request makes no sense."""
    parser = argparse.ArgumentParser(prog="inspect_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of a shards artifact")
    parser.add_argument("--verify", action="store_true", help="check the checksum of every block")
    parser.add_argument("--show", metavar="SOURCE:SPLIT:NUMBER", help="print one document")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        shards = ShardSet.open(args.folder)
        if args.show:
            show(shards, args.show, console)
        else:
            console.print(table(shards))
            for entry in shards.missing:
                console.print(f"missing: {entry['name']} ({entry['reason']})", markup=False)
        if args.verify:
            for source in shards.sources:
                for split in SPLITS:
                    shards.split(source, split).verify()
            console.print("every block has its checksum")
    except R1Error as error:
        print(f"inspect_shards.py: {type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
