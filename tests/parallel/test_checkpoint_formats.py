"""Checkpoints of released formats go on loading: fixtures written once, by make_checkpoint_fixture.py, and never again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_checkpoint_fixture import FIXTURES, small_run, sums

from megatron_r1.parallel import checkpoint
from megatron_r1.parallel.config import LayoutConfig

LAYOUTS = {"as saved": LayoutConfig(), "sharded optimizer": LayoutConfig(distributed_optimizer=True)}


def test_the_present_format_has_a_fixture() -> None:
    assert (FIXTURES / f"format-{checkpoint.FORMAT}").is_dir(), "a changed format needs its own fixture, and those before must stay"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda folder: folder.name)
def test_a_released_checkpoint_continues(folder: Path, layout: str) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    run = small_run(LAYOUTS[layout], seed=99)
    run.load(folder / "checkpoint")
    assert run.step_number == 2
    # Sums over all numbers: other processors may round products otherwise, but not what is stored.
    assert sums(run) == pytest.approx(expected["sums"], rel=1e-12)
    for found, wanted in zip(run.steps(2), expected["steps"], strict=True):
        assert found == pytest.approx(tuple(wanted), abs=1e-6, rel=1e-6)


def test_and_into_mixed_precision(tmp_path: Path) -> None:
    """bf16 training takes the stored fp32 weights as its main weights, and gives them back unchanged."""
    folder = FIXTURES / "format-1"
    run = small_run(precision="bf16", seed=99)
    run.load(folder / "checkpoint")
    run.save(tmp_path / "again")
    back = small_run(seed=98)
    back.load(tmp_path / "again")
    assert sums(back) == pytest.approx(json.loads((folder / "expected.json").read_text())["sums"], rel=1e-12)
