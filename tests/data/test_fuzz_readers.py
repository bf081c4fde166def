"""The readers of files that may be damaged: every input that ever broke one, and a bounded hunt for more (tools/fuzz_readers.py)."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz_readers.py"
CORPUS = Path(__file__).parent / "fuzz_corpus"
NAMES = ["index", "summed_index", "documents", "sums", "sources", "manifest", "tokenizer", "recipe", "override"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("fuzz_readers", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_readers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def targets(tool, tmp_path_factory):
    return tool.Targets(tmp_path_factory.mktemp("fuzz")).targets


def test_every_target_has_its_tests(targets):
    assert list(targets) == NAMES
    assert {path.name for path in CORPUS.iterdir()} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_good_files_are_read(tool, targets, name):
    """A reader that refuses everything would pass the rest."""
    for data in targets[name].seeds[:1]:
        targets[name].read(data)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_broke_a_reader(tool, targets, path):
    assert tool.offence(targets[path.parent.name], path.read_bytes()) is None


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_files_are_refused_or_read(tool, targets, name, seed):
    data = next(tool.inputs(targets[name], random.Random(seed)))
    assert tool.offence(targets[name], data) is None, data


def test_an_offence_is_seen(tool):
    """What is not an R1Error counts, and so does what takes too long."""
    assert "ZeroDivisionError" in tool.offence(tool.Target([b""], lambda data: 1 // 0), b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "SLOW", -1.0)
        assert tool.offence(tool.Target([b""], lambda data: None), b"").endswith(" s")
