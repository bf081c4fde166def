"""Score shards: whatever a kill, a full disk or a flipped bit leaves behind, what is read is right, and what is missing is computed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.influence.store import ScoreStore
from megatron_r1.utils.errors import EnvironmentProblem

STEP = 40
SHAPES = [("wiki", 0, (3, 4)), ("wiki", 1, (1, 4)), ("code_ä", 0, (0, 4)), ("code_ä", 1, (5, 4))]
RECORDS = [(source, part, np.random.default_rng(i).normal(size=shape)) for i, (source, part, shape) in enumerate(SHAPES)]
RECORDS[0][2][1, 2] = np.nan  # not scored by fold


def write(folder: Path, records: list[tuple[str, int, np.ndarray]], copy: int = 0) -> Path:
    store = ScoreStore(folder)
    for source, part, scores in records:
        store.append(STEP, copy, source, part, scores)
    return folder / str(STEP) / f"copy-{copy:05d}.scores"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole"), RECORDS).read_bytes()


def same(found: dict[tuple[str, int], np.ndarray], records: list[tuple[str, int, np.ndarray]]) -> bool:
    return list(found) == [(s, p) for s, p, _ in records] and all(np.array_equal(found[s, p], x, equal_nan=True) for s, p, x in records)


def put(folder: Path, data: bytes, copy: int = 0) -> Path:
    path = folder / str(STEP) / f"copy-{copy:05d}.scores"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:2], copy=1)
    write(tmp_path, RECORDS[2:], copy=0)
    assert same(ScoreStore(tmp_path).finished(STEP), RECORDS[2:] + RECORDS[:2])
    assert ScoreStore(tmp_path).finished(STEP + 1) == {}


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1))
def test_cut_anywhere_and_taken_up_gives_the_same_bytes(whole: bytes, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = put(folder, whole[: int(share * len(whole))])
    found = ScoreStore(folder).finished(STEP)
    assert same(found, RECORDS[: len(found)])
    write(folder, RECORDS[len(found) :])
    assert path.read_bytes() == whole


@settings(deadline=None, max_examples=60)
@given(bit=st.integers(min_value=0))
def test_a_flipped_bit_is_never_read(whole: bytes, tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    bit %= 8 * len(whole)
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    folder = tmp_path_factory.mktemp("flipped")
    put(folder, bytes(damaged))
    found = ScoreStore(folder).finished(STEP)
    assert len(found) < len(RECORDS)
    assert same(found, RECORDS[: len(found)])


def test_a_full_disk_leaves_what_was_there_and_the_next_try_goes_on(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, RECORDS[:3])
    store, before = ScoreStore(tmp_path), path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_r1.influence.store.os.fsync", full)
        with pytest.raises(EnvironmentProblem, match="full"):
            store.append(STEP, 0, *RECORDS[3])
    path.write_bytes(before + b"R1SC what came through before it was full")
    store.append(STEP, 0, *RECORDS[3])
    assert path.read_bytes() == whole


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_one_counted_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[:1], copy=0)
    write(tmp_path, [("wiki", 0, RECORDS[0][2] + 1), RECORDS[1]], copy=1)
    assert same(ScoreStore(tmp_path).finished(STEP), RECORDS[:2])
