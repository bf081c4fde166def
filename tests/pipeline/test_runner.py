"""Relaunching the same command is always right."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest

from megatron_r1.artifacts.base import open_artifact
from megatron_r1.pipeline.recipe import load_recipe
from megatron_r1.pipeline.runner import run_recipe
from megatron_r1.pipeline.summary import print_ledger, print_summary
from megatron_r1.utils.errors import ArtifactError, ConfigError, EnvironmentProblem

TEXT = """\
name: toy
steps:
  first: {stage: make, text: one}
  second: {stage: make, text: two}
  joined: {stage: join, inputs: {shards: first, others: [second]}}
  last: {stage: join, inputs: {shards: second}}
"""


@pytest.fixture
def toy(tmp_path: Path, fake_stages):
    path = tmp_path / "toy.yaml"
    path.write_text(TEXT)
    return lambda *overrides: load_recipe(path, overrides)


def calls(fake_stages) -> list[str]:
    return fake_stages["make"].calls + fake_stages["join"].calls


def test_runs_in_order_then_skips_everything(toy, fake_stages, tmp_path: Path, capsys) -> None:
    done = run_recipe(toy(), tmp_path, "cmd")
    assert [item.step for item in done] == ["first", "second", "joined", "last"]
    assert done[2].artifact.file("text").read_text() == "one 1 + two 1"
    assert [parent.name for parent in done[2].artifact.manifest.parents["others"]] == ["second"]
    again = run_recipe(toy(), tmp_path, "cmd")
    assert all(item.skipped for item in again)
    assert calls(fake_stages) == ["first", "second", "joined", "last"]
    print_summary(again)
    assert print_ledger(tmp_path / "toy", verify=True, graph=True, as_mermaid=False) == 0
    assert print_ledger(tmp_path / "toy", verify=True, graph=False, as_mermaid=True) == 0
    out = capsys.readouterr().out
    assert "skipped" in out
    assert "first --> joined" in out


def test_a_changed_setting_remakes_what_depends_on_it_only(toy, fake_stages, tmp_path: Path) -> None:
    before = {item.step: item.artifact for item in run_recipe(toy(), tmp_path, "cmd")}
    after = {item.step: item for item in run_recipe(toy("steps.first.text=uno"), tmp_path, "cmd")}
    assert {step for step, item in after.items() if item.skipped} == {"second", "last"}
    assert after["joined"].artifact.file("text").read_text() == "uno 1 + two 1"
    open_artifact(before["first"].path, verify="full")


def test_only_and_until(toy, fake_stages, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="first"):
        run_recipe(toy(), tmp_path, "cmd", only="joined")
    assert [item.step for item in run_recipe(toy(), tmp_path, "cmd", until="last")] == ["second", "last"]
    run_recipe(toy(), tmp_path, "cmd", only="first")
    assert [item.step for item in run_recipe(toy(), tmp_path, "cmd", only="joined") if not item.skipped] == ["joined"]
    with pytest.raises(ConfigError, match="did you mean 'first'"):
        run_recipe(toy(), tmp_path, "cmd", only="frist")


def test_a_failed_step_is_finished_on_relaunch(toy, fake_stages, tmp_path: Path) -> None:
    import dataclasses

    good = fake_stages["join"]

    def broken(config, inputs, work):
        (work.path / "part-0").write_text("half")
        raise RuntimeError("power cut")

    fake_stages["join"] = dataclasses.replace(good, run=broken)
    with pytest.raises(RuntimeError, match="power cut"):
        run_recipe(toy(), tmp_path, "cmd")
    fake_stages["join"] = good
    done = {item.step: item for item in run_recipe(toy(), tmp_path, "cmd")}
    assert done["first"].skipped
    assert done["joined"].artifact.file("part-0").read_text() == "half"


def test_a_damaged_step_is_named_and_the_others_stay(toy, fake_stages, tmp_path: Path) -> None:
    done = {item.step: item.artifact for item in run_recipe(toy(), tmp_path, "cmd")}
    done["second"].file("text").write_text("edited")
    with pytest.raises(ArtifactError) as caught:
        run_recipe(toy(), tmp_path, "cmd")
    assert done["second"].path.name in caught.value.expected
    open_artifact(done["first"].path, verify="full")


def test_two_processes_cannot_work_in_one_run(toy, fake_stages, tmp_path: Path) -> None:
    run_recipe(toy(), tmp_path, "cmd", until="first")
    with open(tmp_path / "toy" / ".lock", "a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="holds its lock"):
            run_recipe(toy(), tmp_path, "cmd")


def test_other_ranks_wait_for_rank_zero(toy, fake_stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {}
    monkeypatch.setattr("megatron_r1.pipeline.runner.is_main_rank", lambda: threading.current_thread().name != "rank1")
    waiting = threading.Thread(name="rank1", target=lambda: results.update(done=run_recipe(toy(), tmp_path, "cmd", until="last")))
    waiting.start()
    time.sleep(0.3)
    assert calls(fake_stages) == []
    run_recipe(toy(), tmp_path, "cmd", until="last")
    waiting.join(timeout=20)
    assert [item.step for item in results["done"]] == ["second", "last"]
    assert calls(fake_stages) == ["second", "last"]
