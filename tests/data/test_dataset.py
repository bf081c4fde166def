"""Batches: every token a target once, masks where nothing can be learnt, packing without loss."""

import numpy as np
import pytest
from data_toys import toy_shard

from megatron_r1.data import dataset, indexed
from megatron_r1.data.dataset import PretrainDataset, SftDataset
from megatron_r1.data.mixture_order import MixtureOrder
from megatron_r1.data.shards import Shard
from megatron_r1.data.view import TokenStream
from megatron_r1.utils.errors import DataError

S = 8
SHAPES = {"tokens": np.int32, "labels": np.int32, "loss_mask": np.float32, "position_ids": np.int32, "segment_ids": np.int32}


def pretrain(tmp_path, reset, weights=None):
    shards = {name: toy_shard(tmp_path / name, [5, 3, 11, 1, 1, 9, 20], seed=i)[0] for i, name in enumerate("ab")}
    streams = {name: TokenStream(shard) for name, shard in shards.items()}
    order = MixtureOrder({name: stream.blocks(S) for name, stream in streams.items()}, weights or {"a": 0.5, "b": 0.5}, 3)
    return PretrainDataset(streams, order, S, reset), streams, order


@pytest.mark.parametrize("reset", [True, False])
def test_shapes_and_types(tmp_path, reset):
    data, _, _ = pretrain(tmp_path, reset)
    batch = data.batch(range(3))
    for key, kind in SHAPES.items():
        assert (batch[key].shape, batch[key].dtype) == ((3, S), kind), key
    assert (batch["source_ids"].shape, batch["source_ids"].dtype) == ((3,), np.int32)


def test_an_epoch_predicts_every_token_once(tmp_path):
    data, streams, _ = pretrain(tmp_path, False, {"a": 1.0})
    n = streams["a"].blocks(S)
    whole = streams["a"].shard.read(0, streams["a"].n_tokens)
    blocks = {data.order.locate(i).block: data.sample(i) for i in range(n)}
    assert np.concatenate([blocks[i]["labels"] for i in range(n)]).tolist() == whole[1 : n * S + 1].tolist()
    assert np.concatenate([blocks[i]["tokens"] for i in range(n)]).tolist() == whole[: n * S].tolist()
    assert sorted(blocks) == list(range(n))


def test_documents_are_separated_when_asked(tmp_path):
    data, streams, order = pretrain(tmp_path, True)
    for i in range(8):
        row = data.sample(i)
        source, block, _ = order.locate(i)
        owner = np.repeat(np.arange(7), streams[source].shard.lengths)[block * S : block * S + S + 1]
        assert row["segment_ids"].tolist() == np.unique(owner[:S], return_inverse=True)[1].tolist()
        assert row["loss_mask"].tolist() == (owner[1:] == owner[:-1]).astype(float).tolist()
        assert row["document_ids"].tolist() == sorted(set(owner[:S].tolist()))
        expected, last = [], None
        for document in owner[:S]:
            expected.append(0 if document != last else expected[-1] + 1)
            last = document
        assert row["position_ids"].tolist() == expected
        assert data.source_names[row["source_id"]] == source


def test_without_reset_a_row_is_one_segment(tmp_path):
    row = pretrain(tmp_path, False)[0].sample(1)
    assert row["segment_ids"].tolist() == [0] * S
    assert row["position_ids"].tolist() == list(range(S))
    assert row["loss_mask"].tolist() == [1.0] * S


def test_batches_do_not_depend_on_how_they_are_asked_for(tmp_path):
    data, _, _ = pretrain(tmp_path, True)
    together = data.batch(range(6))
    for i in range(6):
        alone = data.batch([i])
        assert all((alone[key][0] == together[key][i]).all() for key in SHAPES)


def test_streams_shorter_than_the_order_says(tmp_path):
    _, streams, _ = pretrain(tmp_path, True)
    with pytest.raises(DataError, match="100 blocks"):
        PretrainDataset(streams, MixtureOrder({"a": 100}, {"a": 1.0}, 0), S, True)


def sft(tmp_path, lengths, masks=True, **options):
    shard, documents = toy_shard(tmp_path / "chat", lengths, masks=masks)
    return SftDataset({"chat": shard}, S, seed=options.pop("seed", 1), pad_id=7, **options), shard, documents


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_packed_conversations_lose_nothing(tmp_path, mask):
    lengths = [3, 9, 5, 4, 2, 7, 6, 3]
    data, shard, documents = sft(tmp_path, lengths, mask=mask)
    seen = []
    for i in range(len(data)):
        row = data.sample(i)
        for number, document in enumerate(row["document_ids"]):
            here = row["segment_ids"] == number
            tokens, wanted = documents[document], shard.mask(int(document))[1:] if mask == "assistant" else np.ones(len(documents[document]) - 1)
            assert row["tokens"][here].tolist() == tokens[:-1].tolist()
            assert row["labels"][here].tolist() == tokens[1:].tolist()
            assert row["loss_mask"][here].tolist() == wanted.tolist()
            assert row["position_ids"][here].tolist() == list(range(len(tokens) - 1))
            seen.append(int(document))
        padding = row["segment_ids"] == -1
        assert (row["tokens"][padding] == 7).all()
        assert row["loss_mask"][padding].sum() == 0
    assert sorted(seen) == list(range(len(lengths)))
    assert len(data) * S < 2 * sum(lengths)


def test_later_epochs_hold_the_same_in_another_order(tmp_path):
    data, _, _ = sft(tmp_path, [7, 8, 9] * 6)
    epochs = [[tuple(data.sample(e * len(data) + i)["document_ids"]) for i in range(len(data))] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_long_conversations_are_cut_and_those_without_a_target_left_out(tmp_path):
    data, shard, documents = sft(tmp_path, [30, 4, 12])
    # Masks cover the second half: cut to 9 tokens, the first conversation keeps no target and the third keeps three.
    assert data.without_target == {"chat": 1}
    assert data.truncated == {"chat": 1}
    rows = [data.sample(i) for i in range(len(data))]
    assert sorted(int(d) for row in rows for d in row["document_ids"]) == [1, 2]
    cut = next(row for row in rows if 2 in row["document_ids"])
    assert cut["labels"].tolist() == documents[2][1:9].tolist()
    assert cut["loss_mask"].tolist() == shard.mask(2)[1:9].tolist()


def test_weights_between_sources(tmp_path):
    first, _ = toy_shard(tmp_path / "a", [8] * 10, masks=True)
    second, _ = toy_shard(tmp_path / "b", [8] * 40, masks=True)
    natural = SftDataset({"a": first, "b": second}, S, 0, None)
    assert natural.batch(range(50))["source_ids"].tolist().count(0) == 10
    weighted = SftDataset({"a": first, "b": second}, S, 0, None, {"a": 3.0, "b": 1.0})
    assert weighted.batch(range(40))["source_ids"].tolist().count(0) == 30


@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 22])
def test_what_can_be_learnt_from_is_found_in_any_pieces(tmp_path, monkeypatch, mask, piece):
    monkeypatch.setattr(dataset, "MASK_PIECE", piece)
    lengths = [1, 3, 0, 40, 16, 17, 0, 2, 1, 9, 4]
    data, shard, _ = sft(tmp_path, lengths, mask=mask)
    wanted = [i for i, n in enumerate(lengths) if n > 1 and (mask == "all" or shard.mask(i)[1 : S + 1].any())]
    assert sorted(data.rows["chat"].items.tolist()) == wanted
    assert data.without_target == {"chat": len(lengths) - len(wanted)}


def test_damage_names_the_source_and_the_conversation(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "BLOCK", 8)
    _, shard, _ = sft(tmp_path, [6, 7, 8])
    path = tmp_path / "chat" / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[30] ^= 1
    path.write_bytes(raw)
    damaged = Shard(tmp_path / "chat" / "train", shard.record)
    data = SftDataset({"chat": damaged}, S, 1, None)
    with pytest.raises(DataError, match=r"reading conversation [12] of chat"):
        data.batch(range(len(data)))
    stream = TokenStream(damaged)
    text = PretrainDataset({"books": stream}, MixtureOrder({"books": 2}, {"books": 1.0}, 0), S, True)
    with pytest.raises(DataError, match=r"reading blocks (0, 1|1, 0) of books"):
        text.batch(range(2))


def test_a_disk_that_fails_names_the_source(tmp_path, monkeypatch):
    data, _, _ = sft(tmp_path, [6, 7, 8])
    monkeypatch.setattr(Shard, "read", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(DataError, match=r"conversation \d of chat to be readable(?s:.)*Input/output error"):
        data.batch([0])


def test_nothing_to_learn(tmp_path):
    with pytest.raises(DataError, match="at least one conversation"):
        sft(tmp_path, [40])
