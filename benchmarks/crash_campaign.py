"""Kill preprocessing, scoring and training at random moments, relaunch, and compare the results' bytes with an uninterrupted run's.

    python benchmarks/crash_campaign.py                      200 kills: half in preprocessing, a quarter each in scoring and training
    python benchmarks/crash_campaign.py --kills 12 --steps corpus

A small recipe is run whole, once, through the command line. Then every step is run again and again in a folder of its own: each
attempt's whole process group gets SIGKILL after a random time (for preprocessing with a random number of worker processes); after
one to four kills an attempt is left alone, and every file of its artifact is compared with the reference. Files that hold
clock readings are compared without them, and named in the row. The input is cut small, so that a kill falls between tasks as
often as into one. Seeded; bounded by --kills and --minutes; appends a dated row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from megatron_r1.utils import io, machine

RESULTS = Path(__file__).parent / "results" / "crash_campaign.jsonl"
SHARES = {"corpus": 0.5, "influence": 0.25, "train": 0.25}
CLOCKS = {"seconds", "tokens_per_second", "seconds_per_step", "tokenise_mb_per_second", "created"}
WORDS = ["the", "of", "a", "model", "learns", "from", "text", "and", "code", "numbers", "words", "river", "stone", "light", "water", "seven", "blue", "green", "over", "under", "between"]
RECIPE = """
name: campaign
description: small steps to be killed
seed: 3
steps:
  corpus:
    stage: corpus
    tokenizer: {{kind: train_bpe, vocab_size: 512}}
    decontaminate: null
    splits: {{control_countries: 0}}
    shuffle: true
    near_duplicates: {{threshold: 0.8}}
    sources:
      one: {{kind: jsonl, path: "{raw}/one/*", domain: web, id_field: key}}
      two: {{kind: jsonl, path: "{raw}/two.jsonl.gz", domain: code}}
      three: {{kind: jsonl, path: "{raw}/three.jsonl", domain: math, max_bytes: 300 kB}}
      talks: {{kind: jsonl, path: "{raw}/talks.jsonl", domain: chat, format: chat}}
  probe:
    stage: probe
    inputs: {{shards: corpus}}
    documents: 8
    tokens_per_document: 48
    capabilities:
      code: {{sources: {{two: 1}}}}
      math: {{sources: {{three: 1}}}}
  mix:
    stage: mixture
    inputs: {{shards: corpus}}
    method: uniform
  train:
    stage: train
    inputs: {{shards: corpus, mixture: mix, probe: probe}}
    objective: next_token
    model: nano
    budget: 24576 tokens
    global_batch: 512 tokens
    micro_batch: 4
    seq_length: 64 tokens
    lr: {{peak: 3e-3, schedule: linear, warmup: 4 steps, final_ratio: 0.1}}
    checkpoints: {{every: 8 steps}}
    validation: {{every: 16 steps, tokens: 1024 tokens}}
  influence:
    stage: influence
    inputs: {{shards: corpus, probe: probe, checkpoint: train}}
    documents: 24
    tokens_per_document: 48
    checkpoints: 1
"""


def write_input(folder: Path, seed: int) -> None:
    """Some megabytes of JSON lines, whole, compressed and in several files, with duplicates, near-duplicates, repeated ids and bad lines."""
    import gzip

    draw = random.Random(seed)

    def lines(count: int, name: str) -> list[str]:
        texts: list[str] = []
        for _ in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randint(60, 200)))
            if texts and draw.random() < 0.1:
                text = draw.choice(texts) + draw.choice(["", " again"])
            texts.append(text)
        made = [json.dumps({"key": f"{name}-{number if draw.random() > 0.004 else 0}", "text": text}) for number, text in enumerate(texts)]
        made[7] = '{"text": "open'
        return made

    (folder / "one").mkdir(parents=True)
    for number in range(3):
        (folder / "one" / f"{number}.jsonl").write_text("\n".join(lines(1500, str(number))) + "\n")
    (folder / "two.jsonl.gz").write_bytes(gzip.compress("\n".join(lines(1500, "")).encode(), mtime=0))
    (folder / "three.jsonl").write_text("\n".join(lines(1500, "")) + "\n")
    talks = [json.dumps({"messages": [{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]}) for i in range(500)]
    (folder / "talks.jsonl").write_text("\n".join(talks) + "\n")


def child(arguments: list[str]) -> int:
    """What is killed: the command line, with the work cut small."""
    from megatron_r1.cli import main
    from megatron_r1.corpus import plan

    plan.SIZES = plan.Sizes(partition=200_000, part=80_000, bucket=3000, range=1 << 20, segment=20_000)
    return main(arguments)


def launch(recipe: Path, runs: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start the command line in a process group of its own; what it says goes to runs.log."""
    log = open(runs.parent / "runs.log", "ab")  # noqa: SIM115 - the child's
    command = [sys.executable, __file__, "--child", "run", str(recipe), "--runs-dir", str(runs), "--verify", "sizes", *more]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def contents(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Every file of an artifact as (digest, or records without clock readings), and the files that hold such readings. TensorBoard's
    event files are named after the time of the attempt, and left out."""
    found: dict[str, Any] = {}
    timed: set[str] = set()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "manifest.json" or name.startswith("tensorboard/"):
            continue
        found[name] = io.sha256_file(path)
        if path.suffix in (".json", ".jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else json.loads(path.read_text())
            without = timeless(records)
            if without != records:
                found[name] = without
                timed.add(name)
    for name in [name for name in found if name.endswith("checksums.json")]:
        sums = io.read_json(folder / name)["files"]
        found[name] = {key: value for key, value in sums.items() if f"{Path(name).parent.as_posix()}/{key}" not in timed}
    return found, timed


def timeless(value: Any) -> Any:
    """JSON without clock readings."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in CLOCKS}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def artifact(runs: Path, step: str) -> Path:
    """The complete artifact of a step."""
    return next(path for path in (runs / "campaign").glob(f"{step}-*") if (path / "manifest.json").is_file())


def campaign(step: str, kills: int, recipe: Path, reference: Path, scratch: Path, draw: random.Random, deadline: float) -> dict[str, Any]:
    """Kill `step` so many times; returns counts and what differed."""
    expected, timed = contents(artifact(reference, step))
    runs = scratch / step
    shutil.copytree(reference, runs)
    shutil.rmtree(artifact(runs, step))
    bare = {path.name for path in (runs / "campaign").iterdir()}
    done = attempts = finished = 0
    differing: list[str] = []
    typical = 0.0

    def more() -> list[str]:
        return ["--set", f"steps.corpus.workers={draw.choice([1, 2, 3])}"] if step == "corpus" else []

    while (done < kills and time.monotonic() < deadline) or not typical:
        # The first time nothing is killed: how long it takes, and that two uninterrupted runs agree.
        for _ in range(min(draw.randint(1, 4), kills - done) if typical else 0):
            process = launch(recipe, runs, "--only", step, *more())
            attempts += 1
            try:
                process.wait(draw.uniform(0.05, 1.05) * typical)
                if process.returncode:
                    raise SystemExit(f"{step} failed by itself; see {scratch / 'runs.log'}")
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
        began = time.monotonic()
        process = launch(recipe, runs, "--only", step, *more())
        attempts += 1
        if process.wait():
            raise SystemExit(f"{step} failed by itself after kills; see {scratch / 'runs.log'}")
        typical = max(typical, time.monotonic() - began)
        found, _ = contents(artifact(runs, step))
        differing += [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        finished += 1
        for path in (runs / "campaign").iterdir():
            if path.name not in bare and path.is_dir():
                shutil.rmtree(path)
        print(f"{step}: {done} of {kills} kills, {finished} artifacts compared, {len(differing)} files differ", flush=True)
    return {"kills": done, "attempts": attempts, "artifacts": finished, "files": len(expected), "differing": differing, "without_clocks": sorted(timed)}


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 when anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills in total")
    parser.add_argument("--minutes", type=float, default=120, help="no new attempt after this long")
    parser.add_argument("--steps", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (some 100 MB); by default a temporary folder")
    parser.add_argument("--no-record", action="store_true", help="append no row to the results")
    options = parser.parse_args(argv)
    scratch = options.folder or Path(tempfile.mkdtemp(prefix="crash-campaign-"))
    scratch.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    write_input(scratch / "raw", options.seed)
    recipe = scratch / "campaign.yaml"
    recipe.write_text(RECIPE.format(raw=scratch / "raw"))
    last = "influence" if "influence" in options.steps else "train" if "train" in options.steps else "corpus"
    if launch(recipe, scratch / "reference", "--until", last).wait():
        raise SystemExit(f"the uninterrupted run failed; see {scratch / 'runs.log'}")
    total = sum(SHARES[step] for step in options.steps)
    draw = random.Random(options.seed)
    found = {}
    for step in options.steps:
        kills = max(1, round(options.kills * SHARES[step] / total))
        found[step] = campaign(step, kills, recipe, scratch / "reference", scratch, draw, began + 60 * options.minutes)
    row = {
        "date": date.today().isoformat(), "command": shlex.join(["python", "benchmarks/crash_campaign.py", "--kills", str(options.kills), "--minutes", f"{options.minutes:g}", "--steps", *options.steps, "--seed", str(options.seed)]),
        "machine": machine.describe(), "versions": machine.versions(), "minutes": round((time.monotonic() - began) / 60, 1),
        "kills": sum(entry["kills"] for entry in found.values()), "identical": not any(entry["differing"] for entry in found.values()), "steps": found,
    }
    print(json.dumps({key: row[key] for key in ("kills", "identical", "minutes")}))
    if not options.no_record:
        RESULTS.parent.mkdir(exist_ok=True)
        io.append_jsonl(RESULTS, row)
    if options.folder is None and row["identical"]:
        shutil.rmtree(scratch)
    return 0 if row["identical"] else 1


if __name__ == "__main__":
    sys.exit(child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
