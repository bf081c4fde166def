"""Two gloo processes: what goes wrong on one is decided for both, both stop together, a disk full for one is for both, and torchrun starts a killed one anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "train"))
sys.path.insert(0, str(HERE))

from guard_worker import LAYOUTS, cases  # noqa: E402
from launch import launch  # noqa: E402
from train_toys import make_shards  # noqa: E402


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("guard")
    return launch(HERE / "guard_worker.py", 2, folder, {"shards": str(shards.path)})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shards):
    """The same faults in one process, whose every number they touch."""
    return cases(tmp_path_factory.mktemp("alone"), shards, rank=0)


def decisions(journal):
    return [{key: record.get(key) for key in ("step", "attempt", "decision", "first", "last", "to", "passed", "documents")} for record in journal]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "layout"), [(fault, "-".join(layout) or "plain") for fault, layouts in LAYOUTS.items() for layout in layouts])
def test_a_fault_on_one_rank_is_decided_for_all(runs, alone, fault, layout):
    assert runs[0]["cases"] == runs[1]["cases"]
    found, wanted = runs[0]["cases"][f"{fault}-{layout}"], alone[f"{fault}-plain"]
    assert [record["decision"] for record in found["journal"]] == (["skip"] if fault == "norm" else ["skip", "hold", "rollback"])
    assert decisions(found["journal"]) == decisions(wanted["journal"])
    assert found["skipped"] == wanted["skipped"]
    assert found["ledger"] == wanted["ledger"]
    for mine, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        for key in ("loss", "grad_norm", "lr", "parameter_norm"):
            assert (mine[key] is None) == (theirs[key] is None), (mine["step"], key)
            assert (mine[key] or 0.0) == pytest.approx(theirs[key] or 0.0, rel=1e-5), (mine["step"], key)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(runs):
    assert runs[0]["signalled"] == runs[1]["signalled"] == [85, ["step-00000002", "step-00000004"], True]


@pytest.mark.slow
def test_a_disk_full_for_one_rank_ends_both_and_loses_nothing_older(runs):
    for rank in runs:
        found, steps, same = rank["full"]
        assert "disk is full" in found
        assert steps == ["step-00000002"]
        assert same


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_anew(tmp_path, shards):
    (tmp_path / "arguments.json").write_text(json.dumps({"shards": str(shards.path)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, str(HERE / "guard_worker.py"), str(tmp_path), "elastic"], env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in range(2):
        assert json.loads((tmp_path / f"result-{rank}.json").read_text()) == {"attempt": "3", "began": [6], "same": True}
