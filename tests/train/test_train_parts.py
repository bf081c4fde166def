"""RankMe, held-out rows, top-k cache: each against an independent oracle."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_toys import make_shards

from megatron_r1.data.shards import ShardSet
from megatron_r1.train import teacher_cache
from megatron_r1.train.callbacks.validation import Validation
from megatron_r1.train.config import ValidationConfig
from megatron_r1.train.heldout import Document, pack, source_documents
from megatron_r1.train.rankme import rankme
from megatron_r1.train.topk_cache import TopKCache
from megatron_r1.utils.errors import CheckpointError

# ---------------------------------------------------------------- RankMe


@pytest.mark.parametrize("shape", [(12, 30), (40, 30), (400, 30)])
def test_rankme_against_the_formula_on_numpy_singular_values(shape):
    states = np.random.default_rng(0).normal(size=shape) * np.logspace(0, -3, shape[1])
    sigma = np.linalg.svd(states, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(torch.from_numpy(states)) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-8)


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- held-out rows


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=30), st.integers(4, 20))
def test_packing_keeps_every_target_once(lengths, seq_length):
    rng = np.random.default_rng(len(lengths))
    documents = [Document(f"c{i % 3}", rng.integers(1, 1000, n)) for i, n in enumerate(lengths)]
    rows = pack(documents, seq_length)
    assert rows.batch["loss_mask"].sum() == sum(min(n - 1, seq_length) for n in lengths)
    for document, (row, start, inputs) in zip(documents, rows.places):
        columns = slice(start, start + inputs)
        assert rows.batch["tokens"][row, columns].tolist() == document.tokens[:inputs].tolist()
        assert rows.batch["labels"][row, columns].tolist() == document.tokens[1 : inputs + 1].tolist()
        assert len(set(rows.batch["segment_ids"][row, columns].tolist())) == 1
        assert {rows.curves[i] for i in rows.curve_ids[row, columns]} == {document.curve}
    for row in rows.batch["segment_ids"]:
        numbers = [value for value in row.tolist() if value >= 0]
        assert numbers == sorted(numbers)


def test_every_source_has_a_curve_and_those_without_held_out_text_are_named(tmp_path, messages):
    shards = ShardSet.open(make_shards(tmp_path, documents=12))
    names = list(shards.sources)
    documents = source_documents(shards, names, 50, 16, 3)
    assert {document.curve for document in documents} == {f"source/{name}" for name in names}
    for name in names:
        mine = [document for document in documents if document.curve == f"source/{name}"]
        assert 0 < sum(len(document.tokens) - 1 for document in mine) <= 50
        alone = source_documents(shards, [name], 50, 16, 3)
        assert [document.tokens.tolist() for document in mine] == [document.tokens.tolist() for document in alone]
    assert source_documents(shards, names, 0, 16, 3) == []
    bare = ShardSet.open(make_shards(tmp_path / "bare", documents=2))  # a quarter of two documents: none is held out
    Validation(ValidationConfig(), bare, None, ["alpha", "beta"], 16, 3)
    assert any("no held-out documents of alpha, beta" in message for message in messages)


# ---------------------------------------------------------------- top-k cache


def make_cache(folder, **changes):
    values = {"samples": 10, "seq_length": 3, "top_k": 2, "chunk": 4, **changes}
    return TopKCache(folder, {"teacher": "t"}, **values)


def content(cache, chunk):
    rows = cache.rows(chunk)
    indices = torch.arange(rows.start * 6, rows.stop * 6, dtype=torch.int32).view(-1, 3, 2)
    return -indices.float() / 64, indices


def filled(folder):
    cache = make_cache(folder)
    cache.prepare()
    for chunk in range(cache.chunks):
        cache.write(chunk, *content(cache, chunk))
    return cache


def test_cache_reads_across_chunks_and_knows_its_size(tmp_path):
    cache = filled(tmp_path / "cache")
    assert [list(cache.rows(chunk)) for chunk in range(cache.chunks)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    logprobs, indices = cache.read(3, 6)
    assert indices.tolist() == torch.arange(18, 54).view(6, 3, 2).tolist()
    assert torch.equal(logprobs, -indices.float() / 64)
    tensors = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert cache.nbytes == 10 * 3 * 2 * 8
    assert 0 <= tensors - cache.nbytes < 3 * 300


def test_cache_resumes_after_an_interruption_and_notices_damage(tmp_path, messages):
    cache = filled(tmp_path / "cache")
    (tmp_path / "cache" / "chunk-000002.json").unlink()  # killed between the chunk and its receipt
    data = tmp_path / "cache" / "chunk-000001.safetensors"
    flipped = bytearray(data.read_bytes())
    flipped[-1] ^= 1
    data.write_bytes(flipped)
    again = make_cache(tmp_path / "cache")
    again.prepare()
    assert [again.complete(chunk) for chunk in range(3)] == [True, False, False]
    assert any("chunk-000001" in message and "damaged" in message for message in messages)
    for chunk in (1, 2):
        again.write(chunk, *content(again, chunk))
    assert torch.equal(again.read(0, 10)[1], cache.read(0, 10)[1])


def test_ranks_look_for_missing_chunks_together(monkeypatch):
    """Three ranks as threads: each chunk is read once, by one of them, and all know all that is missing."""
    monkeypatch.setattr(teacher_cache, "_CHECKED", 2)
    chunks, missing, read, meeting, box = 23, {0, 7, 8, 22}, [], threading.Barrier(3), {}

    class Cache:
        def __init__(self):
            self.chunks = chunks

        def complete(self, chunk):
            read.append(chunk)
            return chunk not in missing

    class Rank:
        world_size = 3

        def __init__(self, rank):
            self.rank = rank

        def everywhere(self, action):
            box[self.rank] = action()
            meeting.wait(20)
            found = [box[rank] for rank in range(3)]
            meeting.wait(20)
            return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: teacher_cache._missing(Cache(), Rank(rank)), range(3)))
    assert found == [sorted(missing)] * 3
    assert sorted(read) == list(range(chunks))


def test_cache_of_another_teacher_or_length_is_thrown_away(tmp_path, messages):
    filled(tmp_path / "cache")
    other = TopKCache(tmp_path / "cache", {"teacher": "another"}, samples=10, seq_length=3, top_k=2, chunk=4)
    other.prepare()
    assert not any(other.complete(chunk) for chunk in range(3))
    assert any("teacher differ" in message for message in messages)


def test_unreadable_cache_says_what_to_do(tmp_path):
    cache = filled(tmp_path / "cache")
    data = tmp_path / "cache" / "chunk-000000.safetensors"
    data.write_bytes(data.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="run the same command again"):
        cache.read(0, 1)
