"""DALI carries the same samples, bit for bit; absent, it is named. Run with the package installed, or what needs it is skipped."""

import sys

import numpy as np
import pytest

from megatron_r1.data.dali import DaliSteps
from megatron_r1.utils.errors import DataError, EnvironmentProblem

KEYS = ("tokens", "loss_mask", "source_ids")


def steps_of(step):
    """Two micro-batches of 3 rows of 5."""
    if step == 7:
        raise DataError(expected="whole blocks", found="a flipped bit in web", fix="restore it")
    draw = np.random.default_rng(step)
    window = draw.integers(0, 2**31 - 1, (2, 3, 6)).astype(np.int32)
    return [
        {
            "tokens": part[:, :-1], "loss_mask": draw.random((3, 5)).astype(np.float32), "source_ids": draw.integers(0, 9, 3).astype(np.int32),
            "first_sample": np.asarray(6 * step + 3 * i), "document_ids": [i],
        }
        for i, part in enumerate(window)
    ]  # fmt: skip


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install nvidia-dali-cuda120, or set loader.backend to threads"):
        DaliSteps(steps_of, 5, 2, KEYS)


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert set(one) == set(other)
        for key in KEYS:
            assert one[key].dtype == other[key].dtype
            assert one[key].tobytes() == np.ascontiguousarray(other[key]).tobytes(), key
        assert one["first_sample"] == other["first_sample"]
        assert one["document_ids"] == other["document_ids"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_same_bits_on_the_cpu(ahead):
    pytest.importorskip("nvidia.dali", reason="needs the package nvidia-dali-cuda120")
    carried = DaliSteps(steps_of, 6, 2, KEYS, ahead)
    kept = []
    for step in [0, 1, 2, 3, 4, 5, 2, 3, 5]:
        kept.append((step, carried.get(step)))
    # Looked at last: DALI uses its memory again.
    for step, found in kept:
        same(found, steps_of(step))
    carried.close()


def test_an_error_comes_up_where_it_belongs():
    pytest.importorskip("nvidia.dali", reason="needs the package nvidia-dali-cuda120")
    carried = DaliSteps(steps_of, 12, 2, KEYS, 4)
    for step in (5, 6):
        same(carried.get(step), steps_of(step))
    with pytest.raises(DataError, match="a flipped bit in web"):
        carried.get(7)
    same(carried.get(8), steps_of(8))
    carried.close()


@pytest.mark.gpu
def test_the_same_bits_on_a_gpu():
    pytest.importorskip("nvidia.dali", reason="needs the package nvidia-dali-cuda120")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from megatron_r1.parallel.device import adopt

    carried = DaliSteps(steps_of, 6, 2, KEYS, 3, 0, adopt)
    kept = [(step, carried.get(step)) for step in range(6)]
    for step, found in kept:
        for batch, wanted in zip(found, steps_of(step)):
            tensors = batch["staged"].take()
            for key in KEYS:
                assert tensors[key].cpu().numpy().tobytes() == np.ascontiguousarray(wanted[key]).tobytes()
    carried.close()
