"""The corpus step through datatrove's executors ends in the bytes of a plain run. Needs datatrove (and ray): skipped without."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from megatron_r1.cli import main as megatron_r1
from megatron_r1.corpus.phases import Desk, phases
from megatron_r1.corpus.workers import Share
from megatron_r1.utils.errors import EnvironmentProblem

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_cluster.py"
RECIPE = """
name: toy
description: two sources
seed: 1
steps:
  corpus:
    stage: corpus
    tokenizer: {{kind: train_bpe, vocab_size: 400}}
    decontaminate: null
    splits: {{control_countries: 0}}
    shuffle: true
    sources:
      one: {{kind: jsonl, path: {raw}/one.jsonl, domain: web}}
      two: {{kind: jsonl, path: {raw}/two.jsonl, domain: web, id_field: key}}
  later:
    stage: corpus
    inputs: {{tokenizer: corpus}}
    decontaminate: null
    splits: {{control_countries: 0}}
    sources:
      two: {{kind: jsonl, path: {raw}/two.jsonl, domain: web}}
"""


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("preprocess_cluster", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["preprocess_cluster"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path):
    for name in ("one", "two"):
        lines = [json.dumps({"key": i, "text": " ".join(f"{name} {word} {i * word % 97}" for word in range(40))}) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(raw=tmp_path))
    return path


def contents(runs, step="corpus"):
    folder = next((runs / "toy").glob(f"{step}-*[0-9a-f]"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"}


def finished(recipe, runs, step="corpus"):
    assert megatron_r1(["run", str(recipe), "--only", step, "--runs-dir", str(runs)]) == 0
    return contents(runs, step)


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_executors(tmp_path, tool, recipe, executor):
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    if executor == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    expected = finished(recipe, tmp_path / "plain")
    flags = [str(recipe), "--step", "corpus", "--runs-dir", str(tmp_path / "shared"), "--executor", executor, "--ranks", "3", "--workers", "2", "--mem-per-cpu-gb", "1"]
    assert tool.main(flags) == 0
    partial = next((tmp_path / "shared" / "toy").glob("corpus-*.partial"))
    records = {path: path.stat().st_mtime_ns for path in partial.glob("tmp/made-*/records/**/*.json")}
    assert finished(recipe, tmp_path / "shared") == expected
    assert len(records) > 6


def test_slurm(tmp_path, tool, recipe, monkeypatch):
    """A stand-in for sbatch does what Slurm would do, at once: every job of the chain, its ranks in turn."""
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    expected = finished(recipe, tmp_path / "plain")
    (tmp_path / "bin").mkdir()
    stand_in = (
        "#!/usr/bin/env bash\n"
        f"number=$(( $(cat {tmp_path}/jobs 2>/dev/null || echo 0) + 1 )); echo $number > {tmp_path}/jobs\n"
        'script="${@: -1}"; echo "$@" >> ' f"{tmp_path}/asked\n"
        "export RUN_OFFSET=0 SLURM_NODELIST=localhost SLURM_JOB_ID=$number SLURM_CPUS_PER_TASK=1 SLURM_MEM_PER_CPU=1\n"
        f'for rank in 0 1; do SLURM_ARRAY_TASK_ID=$rank PATH="{tmp_path}/bin:$PATH" bash "$script" >> {tmp_path}/log 2>&1; done\n'
        "echo $number\n"
    )
    for name, text in (("sbatch", stand_in), ("srun", '#!/usr/bin/env bash\nuntil [[ "$1" == launch_* ]]; do shift; done\nexec "$@"\n'), ("scontrol", "#!/usr/bin/env bash\necho localhost\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}")
    flags = [str(recipe), "--step", "corpus", "--runs-dir", str(tmp_path / "shared"), "--executor", "slurm", "--ranks", "2", "--partition", "any"]
    assert tool.main(flags) == 0
    asked = [line for line in (tmp_path / "asked").read_text().splitlines() if "RUN_OFFSET" in line]  # the others merge statistics
    _, job = tool.workspace(tool.arguments(flags))
    assert len(asked) == len(phases(job.config))
    assert all("afterok:" in line for line in asked[1:])
    assert all(Desk(job).done(task) for task in Desk(job).tasks("finish")), (tmp_path / "log").read_text()
    assert finished(recipe, tmp_path / "shared") == expected


def test_ranks_without_datatrove(tmp_path, tool, recipe):
    """What an executor does: every rank of every phase, in any order; a phase that is not done stops the next."""
    expected = finished(recipe, tmp_path / "plain")
    args = tool.arguments([str(recipe), "--step", "corpus", "--runs-dir", str(tmp_path / "shared"), "--executor", "local", "--ranks", "3"])
    _, job = tool.workspace(args)
    Share(job, "extract")(None, 1, 3)
    with pytest.raises(EnvironmentProblem, match="extract"):
        Share(job, phases(job.config)[1])(None, 0, 1)
    for phase in phases(job.config):
        for rank in (2, 0, 1):
            Share(job, phase)(None, rank, 3)
        assert all(Desk(job).done(task) for task in Desk(job).tasks(phase))
    assert finished(recipe, tmp_path / "shared") == expected


def test_a_tokenizer_of_an_earlier_step(tmp_path, tool, recipe):
    finished(recipe, tmp_path / "runs")
    args = tool.arguments([str(recipe), "--step", "later", "--runs-dir", str(tmp_path / "runs"), "--executor", "local", "--ranks", "1"])
    _, job = tool.workspace(args)
    for phase in phases(job.config):
        Share(job, phase)(None)
    again = finished(recipe, tmp_path / "runs", "later")
    assert again["tokenizer/tokenizer.json"] == contents(tmp_path / "runs")["tokenizer/tokenizer.json"]


def test_what_is_refused(tmp_path, tool, recipe, capsys):
    flags = [str(recipe), "--runs-dir", str(tmp_path / "runs"), "--executor", "local", "--ranks", "1"]
    assert tool.main([*flags, "--step", "nothing"]) == 1
    assert "corpus, later" in capsys.readouterr().err
    assert tool.main([*flags, "--step", "corpus", "--ranks", "0"]) == 1
    assert "--ranks of 1" in capsys.readouterr().err
    assert tool.main([*flags, "--step", "later"]) == 1
    assert "complete artifact" in capsys.readouterr().err
