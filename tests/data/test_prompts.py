"""Questions with known answers: what is used, in which order, and what a batch holds."""

import numpy as np
import pytest
from data_toys import toy_shard, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.chat import render
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.prompts import GroupedOrder, PromptDataset
from megatron_r1.data.shards import Shard, ShardWriter
from megatron_r1.utils.errors import DataError

TALKS = [
    ("1 + 2", "1 + 2 = 3\n#### 3"), ("2 + 2", "so \\boxed{4}"), ("who are you", "a model"), ("3 + 3", "The answer is 6."), ("long " * 40, "#### 1"), ("4 + 4", "####"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def shard(folder, tokenizer, talks):
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder / "train", tokenizer.vocab_size, masked=True)
    for number, (question, answer) in enumerate(talks):
        ids, mask = render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)
        writer.add(ids, len(question), f"talk{number}", mask=mask)
    return Shard(folder / "train", writer.close())


def test_only_questions_that_fit_and_whose_answer_is_known_are_asked(tmp_path, tokenizer):
    data = PromptDataset({"talks": shard(tmp_path, tokenizer, TALKS)}, tokenizer, 1, 4, 60)
    assert data.documents["talks"].tolist() == [0, 1, 3]
    assert (data.without_answer, data.too_long) == ({"talks": 2}, {"talks": 1})
    seen = {}
    for sample in range(0, 24, 4):
        batch = data.batch(range(sample, sample + 4))
        assert len({tuple(row) for row in batch["tokens"].tolist()}) == len(set(batch["answers"])) == 1
        length = int((batch["segment_ids"][0] == 0).sum())
        question = tokenizer.decode([t for t in batch["tokens"][0, :length].tolist() if t not in tokenizer.info.chat_ids.values()])
        seen.setdefault(sample // 12, []).append((question.split("user\n\n")[1].split("assistant")[0], batch["answers"][0]))
        assert batch["tokens"][0, :length].tolist() == render([{"role": "user", "content": TALKS[int(batch["document_ids"][0][0])][0]}], tokenizer, True)[0]
        assert not batch["loss_mask"].any()
    assert [sorted(epoch) for epoch in seen.values()] == [[("1 + 2", "3"), ("2 + 2", "4"), ("3 + 3", "6")]] * 2


def test_rows_of_different_questions_are_padded(tmp_path, tokenizer):
    data = PromptDataset({"talks": shard(tmp_path, tokenizer, [("1", "#### 1"), ("a longer question", "#### 2")])}, tokenizer, 0, 2, 60)
    batch = data.batch(range(4))
    lengths = (batch["segment_ids"] == 0).sum(axis=1)
    assert lengths.max() == batch["tokens"].shape[1] > lengths.min()
    assert batch["position_ids"][0, : lengths[0]].tolist() == list(range(lengths[0]))


def test_nothing_to_ask_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"2 without such an answer, 0 too long[\s\S]*whose answers can be checked"):
        PromptDataset({"talks": shard(tmp_path / "a", tokenizer, TALKS[2:3] * 2)}, tokenizer, 0, 2, 60)
    plain, _ = toy_shard(tmp_path / "b", [5, 9], vocab_size=400)
    with pytest.raises(DataError, match="none in text"):
        PromptDataset({"text": plain}, tokenizer, 0, 2, 60)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 60), st.integers(0, 100))
def test_a_grouped_order_counts_what_it_hands_out(group, samples, seed):
    inner = MixtureOrder({"a": 3, "b": 7}, {"a": 0.4, "b": 0.6}, seed)
    order = GroupedOrder(inner, group)
    found = [order.locate(sample) for sample in range(samples)]
    assert order.counts(samples) == {name: sum(place.source == name for place in found) for name in ("a", "b")}
    assert found == [inner.locate(sample // group) for sample in range(samples)]
    assert order.blocks == {"a": 3 * group, "b": 7 * group}
    if samples:
        numbers, blocks, _ = order.locate_many(np.arange(samples))
        assert [order.names[number] for number in numbers] == [place.source for place in found]
        assert blocks.tolist() == [place.block for place in found]
    assert order.fingerprint != GroupedOrder(inner, group + 1).fingerprint
