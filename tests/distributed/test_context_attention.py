"""Attention over sequences cut over 2 and 4 processes gives what one process gives: output and all gradients, one start each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch

from megatron_r1.parallel.sequence import SequencePiece

HALF_SPLIT = {"interleaved": False, "grouped": False}
CASES: dict[str, dict[str, Any]] = {
    f"{implementation}, {documents or 'no documents'}": {"documents": documents, "options": {"implementation": implementation}, "gains": True}
    for implementation in ("csrc", "analytic", "reference")
    for documents in (None, "ids", "boundaries")
} | {
    "weightless": {"documents": "ids"},
    "half split": {"documents": "ids", "options": HALF_SPLIT, "gains": True},
    "math": {"documents": "ids", "options": {"core": "math"}, "gains": True},
    "math, no documents": {"documents": None, "options": {"core": "math"}},
    "bf16": {"documents": "ids", "dtype": "bfloat16", "gains": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(f"context{request.param}")
    return launch(Path(__file__).with_name("context_worker.py"), request.param, folder, {"cases": CASES})


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_piece_equals_its_part_of_the_whole(name: str, ranks: list[dict[str, Any]]) -> None:
    implementation = CASES[name].get("options", {}).get("implementation")
    for rank in ranks:
        if implementation and implementation not in rank["implementations"]:
            pytest.skip(f"{implementation} is not here")
        assert len(rank[name]) == (4 if CASES[name].get("gains") else 2)
        bound = 0.02 if CASES[name].get("dtype") else 1e-6
        assert all(difference <= bound for difference in rank[name].values()), rank[name]


@pytest.mark.slow
def test_exchanges(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["exchange"] == [True] * 4


@pytest.mark.slow
def test_lengths_that_can_not_be_cut(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    for rank in ranks:
        whole, piece, total, attention = rank["refused"]
        assert f"{2 * size + 1} tokens" in whole
        assert "3 tokens" in piece
        assert f"{2 * size - 1} tokens" in total
        assert f"found: {3 * size} tokens" in attention
        assert "accepted" not in rank["refused"]


def test_one_process_keeps_everything() -> None:
    x = torch.arange(5.0)
    piece = SequencePiece(0, 1)
    assert piece.gather(x) is x
    assert piece.scatter_sum(x) is x
    assert piece.cut(x) is x


def test_the_order_is_megatron_cores() -> None:
    assert [SequencePiece(rank, 2).cut(torch.arange(8)).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
