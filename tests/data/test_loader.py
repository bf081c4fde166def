"""Reading ahead: the right step always, errors where they belong, and no way to hang."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data import loader as module
from megatron_r1.data.loader import Loader
from megatron_r1.utils.errors import DataError


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(0, 11), max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_step_is_what_reading_it_gives(end, ahead, workers, jumps):
    loader = Loader(lambda step: ("step", step), end, ahead, workers)
    for first in [0, *(jump for jump in jumps if jump < end)]:
        for step in range(first, end):
            assert loader.get(step) == ("step", step)
    loader.close()


def test_no_more_is_read_than_asked_for():
    """Counted while the consumer holds still: steps 0 ... ahead - 1 beyond the one taken, and nothing past the end."""
    read, stop = [], threading.Event()

    def slow(step):
        read.append(step)
        if len(read) == 4:
            stop.set()
        return step

    loader = Loader(slow, 100, ahead=3, workers=2)
    assert read == []
    assert loader.get(5) == 5
    assert stop.wait(10)
    loader.close()
    assert sorted(read) == [5, 6, 7, 8]


def test_reading_goes_on_beside_the_consumer():
    """Step 1 is read before it is asked for: the reader of step 1 is waited for without asking."""
    begun = threading.Event()

    def read(step):
        if step == 1:
            begun.set()
        return step

    loader = Loader(read, 3)
    loader.get(0)
    assert begun.wait(10)
    loader.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_is_raised_by_the_step_it_belongs_to(workers):
    tries = []

    def read(step):
        if step == 2:
            tries.append(step)
            raise DataError(expected="whole blocks", found="a flipped bit in web", fix="restore it")
        return step

    loader = Loader(read, 6, ahead=4, workers=workers)
    assert [loader.get(0), loader.get(1)] == [0, 1]
    with pytest.raises(DataError, match="a flipped bit in web"):
        loader.get(2)
    assert loader.get(3) == 3
    with pytest.raises(DataError):
        loader.get(2)
    assert len(tries) == 2
    loader.close()


def test_a_read_that_hangs_holds_nothing_up(monkeypatch):
    said, go, raised = threading.Event(), threading.Event(), []
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(module.log, "warning", lambda message, step, seconds: said.set() if step == 1 else None)
    loader = Loader(lambda step: step if step == 0 else go.wait(60), 3, ahead=1)
    loader.get(0)

    def wait():
        try:
            loader.get(1)
        except RuntimeError as error:
            raised.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert said.wait(10)
    loader.close()
    waiting.join(10)
    assert "closed" in raised[0]
    go.set()
    with pytest.raises(RuntimeError, match="closed"):
        loader.get(2)


def test_steps_past_the_end():
    loader = Loader(lambda step: step, 2)
    with pytest.raises(RuntimeError, match="ends before step 2"):
        loader.get(2)
    loader.close()
