"""The converter: there and back is bit-identical; every wrong call says what to do and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.artifacts.base import open_artifact
from megatron_r1.artifacts.checkpoint import CheckpointSet

ROOT = Path(__file__).parents[2]


def _load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = _load(ROOT / "tools" / "convert_checkpoint.py", "convert_checkpoint")
make_checkpoint = _load(ROOT / "tests" / "export" / "conftest.py", "export_conftest").make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("run"))


def test_there_and_back(checkpoint, tmp_path, capsys):
    assert convert.main(["--load", str(checkpoint.path), "--save", str(tmp_path / "out"), "--target", "hf"]) == 0
    assert str(tmp_path / "out" / "hf") in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"]
    assert convert.main(["--load", str(tmp_path / "out" / "hf"), "--save", str(tmp_path / "back"), "--target", "mcore"]) == 0
    back = open_artifact(tmp_path / "back", "checkpoint", verify="full")
    assert CheckpointSet.open(back).model == CheckpointSet.open(checkpoint).model
    assert convert.main(["--load", str(tmp_path / "back"), "--save", str(tmp_path / "again"), "--target", "hf"]) == 0
    first, second = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "tools/convert_checkpoint.py --load" in back.manifest.command


def test_a_step_of_a_run_is_found_by_name(checkpoint):
    run = checkpoint.path.parent
    (run / "run.json").write_text(json.dumps({"steps": {"sft": checkpoint.path.name}}))
    assert convert.find_checkpoint(run / "sft").fingerprint == checkpoint.fingerprint
    with pytest.raises(convert.ArtifactError, match="a step of the run"):
        convert.find_checkpoint(run / "stf")


@pytest.mark.parametrize(
    ("load", "target", "message"),
    [("nowhere", "hf", "complete artifact"), ("nowhere", "mcore", "config.json"), (".", "hf", "without manifest.json")],
)
def test_errors_are_told_and_nothing_is_left(tmp_path, capsys, load, target, message):
    (tmp_path / "empty").mkdir()
    status = convert.main(["--load", str(tmp_path / "empty" / load), "--save", str(tmp_path / "out"), "--target", target])
    printed = capsys.readouterr().err
    assert status == 1
    assert message in printed
    assert "do:" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_existing_folder_is_never_overwritten(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert convert.main(["--load", str(checkpoint.path), "--save", str(tmp_path / "out"), "--target", "hf"]) == 1
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_help_names_the_targets(capsys):
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    assert "--target {hf,mcore}" in capsys.readouterr().out
