"""What a training phase has read, from its artifact alone.

    python tools/ledger.py runs/quickstart/pretrain2-1a2b3c4d             # proof over it and the phases it continues: nothing lost, nothing repeated
    python tools/ledger.py runs/quickstart/pretrain2-1a2b3c4d --step 17   # documents whose tokens step 17 (from 1) was trained on

The artifacts it was made from must lie beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_r1.artifacts.base import open_artifact
from megatron_r1.train.ledger import documents_of_step, open_phase, prove
from megatron_r1.utils.errors import ConfigError, R1Error


def main(argv: list[str] | None = None) -> int:
    """Entry; 1 when something is wrong, with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="ledger.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", type=Path, help="folder of a train artifact")
    parser.add_argument("--step", type=int, help="print the documents of this step, counted from 1")
    options = parser.parse_args(argv)
    try:
        if options.step is None:
            found = prove(options.path)
            print("source\tepoch\ttokens\trepeated\tleft\tstate")
            for source, epoch, finished, tokens, repeated, left, _ in found:
                print(f"{source}\t{epoch}\t{tokens}\t{repeated}\t{left if finished else '-'}\t{'finished' if finished else 'running'}")
            return 0
        phase = open_phase(open_artifact(options.path))
        if not 1 <= options.step <= phase.found.manifest.steps:
            raise ConfigError(expected=f"a step from 1 to {phase.found.manifest.steps}", found=str(options.step), fix="give a step the phase has")
        print("source\tepoch\tdocument\tid\tfirst token\ttokens")
        for source, epoch, document, first, tokens in documents_of_step(phase.data, phase.config.sequences_per_step, options.step - 1):
            print(f"{source}\t{epoch}\t{document}\t{phase.shards.split(source).ids[document]}\t{first}\t{tokens}")
    except R1Error as error:
        print(f"ledger.py: {type(error).__name__}\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
