"""`doctor --cluster`: every kind of cluster that must not train is named, and a good one passes. nvidia-smi is a stand-in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.cli import main
from megatron_r1.parallel.cluster_check import SMI_FIELDS, Report, code_fingerprint, judge, nvidia_smi

GOOD = dict(zip(SMI_FIELDS, ("0", "NVIDIA H100 80GB HBM3", "580.1", "1980", "1980", "0", "Not Active")))


def cluster(**of_the_last: object) -> list[Report]:
    """Four processes on two machines; the last one's fields may differ."""
    one = Report(0, "node1", 0, "3.12.3", {"torch": "2.11.0", "megatron-core": "0.19.2"}, "abc", "cuda", (2, 27, 3), 1 << 40, [dict(GOOD)])
    reports = [replace(one, rank=rank, host=f"node{1 + rank // 2}", local_rank=rank % 2, gpus=[dict(GOOD)] if rank % 2 == 0 else []) for rank in range(4)]
    return [*reports[:3], replace(reports[3], **of_the_last)]


def test_a_good_cluster_has_no_problems() -> None:
    assert judge(cluster(), 100 << 30) == judge(cluster()[:1], 0)
    assert not judge(cluster(), 100 << 30).problems
    assert not judge(cluster(), 100 << 30).remarks


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"code": "xyz"}, ("code differs", "node2 has xyz", "others have abc")),
        ({"python": "3.11.1"}, ("python differs", "node2 has 3.11.1")),
        ({"versions": {"torch": "2.12.0", "megatron-core": "0.19.2"}}, ("torch differs", "node2 has 2.12.0")),
        ({"versions": {"torch": "2.11.0"}}, ("megatron-core differs", "not installed")),
        ({"device": "cpu"}, ("devices differs", "node2 has cpu")),
        ({"nccl": None}, ("NCCL differs", "node2 has none")),
        ({"free": 5 << 30}, ("node2: 5.0 GiB are free", "100.0 GiB are needed")),
        ({"gpus": [GOOD | {"ecc.errors.uncorrected.volatile.total": "2"}]}, ("node2: GPU 0", "2 uncorrectable")),
        ({"gpus": [GOOD | {"clocks_throttle_reasons.hw_slowdown": "Active"}]}, ("node2: GPU 0", "slowed down")),
    ],
)
def test_what_must_not_train_is_named(wrong: dict, words: tuple[str, ...]) -> None:
    (problem,) = judge(cluster(**wrong), 100 << 30).problems
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(("version", "bad"), [((2, 28, 2), False), ((2, 28, 3), True), ((2, 28, 8), True), ((2, 28, 9), False), ((2, 29, 0), False)])
def test_nccl_versions_to_avoid(version: tuple[int, ...], bad: bool) -> None:
    problems = judge([replace(one, nccl=version) for one in cluster()], 0).problems
    assert bool(problems) == bad
    assert all("NCCL" in text for text in problems)


def test_remarks_stop_nothing() -> None:
    slow = judge(cluster(gpus=[GOOD | {"clocks.max.sm": "1410"}]), 0)
    assert not slow.problems
    assert slow.remarks == ["node2: GPU 0 goes up to 1410 MHz, others to 1980"]
    unknown = judge(cluster(gpus=[], remark="nvidia-smi does not run: no such file"), 0)
    assert not unknown.problems
    assert "were not looked at" in unknown.remarks[0]
    assert not judge(cluster(gpus=[GOOD | {"ecc.errors.uncorrected.volatile.total": "[N/A]"}]), 0).problems, "cards without ECC"


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$1" in --query-gpu=*hw_slowdown) ;; *) exit 3 ;; esac\necho "0, NVIDIA H100, 580.1, 345, 1980, 0, Not Active"\necho "1, NVIDIA H100, 580.1, 345, 1980, 4, Active"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    rows, why = nvidia_smi()
    assert not why
    assert [row["index"] for row in rows] == ["0", "1"]
    assert rows[1]["ecc.errors.uncorrected.volatile.total"] == "4"
    assert len(judge(cluster(gpus=rows), 0).problems) == 2
    program.write_text("#!/bin/sh\necho 'no devices were found'; exit 6\n")
    assert nvidia_smi() == ([], "nvidia-smi fails: no devices were found")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert nvidia_smi()[1].startswith("nvidia-smi does not run")


def test_code_has_one_fingerprint() -> None:
    assert code_fingerprint() == code_fingerprint()
    assert len(code_fingerprint()) == 12


def test_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole path; the folder for runs need not exist yet."""
    assert main(["doctor", "--cluster", "--runs-dir", str(tmp_path / "not" / "yet"), "--free-gib", "0"]) == 0
    assert "fit to train" in capsys.readouterr().out
    assert main(["doctor", "--cluster", "--runs-dir", str(tmp_path), "--free-gib", "1e9"]) == 1
    captured = capsys.readouterr()
    assert "not fit to train" in captured.out
    assert "are needed" in captured.err
