"""What a step trains on does not depend on the layout, on who reads it, nor on where a run was taken up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_toys import settings as train_settings

from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.train.feed import Feed
from megatron_r1.train.objectives import TENSORS, to_tensors
from megatron_r1.utils.errors import DataError, ParallelError

CPU = torch.device("cpu")
STEPS, LENGTH = 4, 32


class Numbered:
    """A dataset whose every token says which sample it is of."""

    source_names = ["all"]
    order = MixtureOrder({"all": 10}, {"all": 1.0}, 0)

    def batch(self, indices):
        rows = np.asarray(list(indices), np.int32)
        if 17 in rows and self.broken:
            raise DataError(expected="whole blocks", found="a flipped bit (while reading blocks 3 of all)", fix="restore it")
        table = np.repeat(rows[:, None], LENGTH, 1)
        return {
            "tokens": table, "labels": table + 1, "loss_mask": np.ones(table.shape, np.float32), "segment_ids": np.zeros_like(table),
            "position_ids": np.zeros_like(table), "source_ids": np.zeros(len(rows), np.int32), "document_ids": [[]] * len(rows),
        }  # fmt: skip

    def __init__(self, broken=False):
        self.broken = broken


def config(sequences, micro_batch, **loader):
    return train_settings(global_batch=f"{sequences * LENGTH} tokens", seq_length=f"{LENGTH} tokens", micro_batch=micro_batch, loader=loader)


def rows_of(step, sequences, data_size, micro_batch, **loader):
    """Sample numbers of the steps from `step` on: micro-batch by micro-batch over all ranks."""
    feeds = [Feed(Numbered(), config(sequences, micro_batch, **loader), rank, data_size, STEPS, CPU) for rank in range(data_size)]
    found = []
    for t in range(step, STEPS):
        given = [feed.step(t) for feed in feeds]
        for batches in zip(*given):
            for batch in batches:
                assert batch["first_sample"] == batch["tokens"][0, 0]
                found += batch["tokens"][:, 0].tolist()
    for feed in feeds:
        feed.close()
    return found


@given(
    st.sampled_from([(12, size, micro) for size in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4, 6, 12) if 12 % (size * micro) == 0]),
    st.integers(0, STEPS - 1), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_order_of_samples_is_that_of_any_layout(layout, resumed, ahead, workers):
    """One rank without reading ahead is 0, 1, 2, ...; every other layout, taken up at any step, goes on with the same."""
    sequences, data_size, micro_batch = layout
    assert rows_of(resumed, sequences, data_size, micro_batch, ahead=ahead, workers=workers) == list(range(resumed * sequences, STEPS * sequences))


def test_dali_gives_the_same_order():
    pytest.importorskip("nvidia.dali", reason="needs the package nvidia-dali-cuda120")
    assert rows_of(1, 12, 2, 3, backend="dali") == rows_of(1, 12, 2, 3)


def test_an_error_comes_up_in_the_step_that_needs_the_batch():
    feed = Feed(Numbered(broken=True), config(8, 4, ahead=3, workers=2), 0, 1, STEPS, CPU)
    assert [len(feed.step(t)) for t in (0, 1)] == [2, 2]
    with pytest.raises(DataError, match="while reading blocks 3 of all"):
        feed.step(2)
    feed.close()


def test_how_batches_are_read_is_no_part_of_what_a_step_makes():
    assert config(8, 4).identity() == config(8, 4, ahead=7, workers=3, backend="dali").identity()
    assert config(8, 4).plain() != config(8, 4, ahead=7).plain()
    assert config(8, 4).identity() != config(8, 2).identity()


def test_numbers_are_wide_on_the_device():
    batch = Numbered().batch(range(3))
    tensors = to_tensors(batch, CPU)
    assert set(tensors) == set(TENSORS)
    assert {key: tensor.dtype for key, tensor in tensors.items() if tensor.dtype == torch.int64}.keys() == {"tokens", "labels", "position_ids"}
    assert all((tensors[key].numpy() == batch[key]).all() for key in TENSORS)


@pytest.mark.gpu
def test_uploads_hold_the_same_numbers():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    gpu = torch.device("cuda", 0)
    feed = Feed(Numbered(), config(8, 4, ahead=3, workers=2), 0, 1, STEPS, gpu)
    for step in range(STEPS):
        for batch in feed.step(step):
            tensors = to_tensors(batch, gpu)
            assert all((tensors[key].cpu().numpy() == batch[key]).all() for key in TENSORS)
    feed.close()


def test_a_micro_batch_that_does_not_fit():
    with pytest.raises(ParallelError, match=r"micro_batch 3 x 1(?s:.)*one of \[1, 2, 4, 8\]"):
        Feed(Numbered(), config(8, 3), 0, 1, STEPS, CPU)


def test_micro_batches_that_an_interleaved_pipeline_can_not_take_in_turns():
    def interleaved(micro_batch):
        return train_settings(
            global_batch=f"{8 * LENGTH} tokens", seq_length=f"{LENGTH} tokens", micro_batch=micro_batch, layout={"pipeline": 4, "virtual_pipeline": 2}
        )

    Feed(Numbered(), interleaved(2), 0, 1, STEPS, CPU).close()
    with pytest.raises(ParallelError, match=r"multiple of pipeline = 4(?s:.)*= 2"):
        Feed(Numbered(), interleaved(4), 0, 1, STEPS, CPU)
