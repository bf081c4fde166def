"""One rank: steps that are listened to, and the same without, under every layout it is told, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from scored_steps import stepped

from megatron_r1.parallel import context
from megatron_r1.parallel.config import LayoutConfig


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for name, case in json.loads((folder / "arguments.json").read_text())["cases"].items():
        layout, options = LayoutConfig(**case["layout"]), case.get("options", {})
        results[name] = [stepped(layout, scored=scored, **options) for scored in (True, False)]
        print(name, flush=True)
    (folder / f"result-{context.current().rank}.json").write_text(json.dumps(results))
    context.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
