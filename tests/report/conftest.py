"""One whole made-up run and its report, shared by the tests that only read them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_r1.artifacts.base import Artifact

sys.path.insert(0, str(Path(__file__).parent))  # whatever pytest's import mode: the tests here share fixture_run
from fixture_run import FixtureRun, whole_run, write_report


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FixtureRun:
    return whole_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def report(whole: FixtureRun) -> Artifact:
    return write_report(whole, title="A <b>bold</b> title")


@pytest.fixture(scope="session")
def page(report: Artifact) -> str:
    return report.file("report.html").read_text(encoding="utf-8")
