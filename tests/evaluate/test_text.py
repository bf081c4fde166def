"""Bits per byte of models whose cost is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from evaluate_fakes import FakeShards, FakeSubject

from megatron_r1.evaluate.config import BitsPerByteSettings
from megatron_r1.evaluate.tasks.bits_per_byte import BitsPerByte
from megatron_r1.utils.errors import ConfigError


def run(bench, **settings):
    outcome = BitsPerByte(BitsPerByteSettings(**settings)).run(bench)
    return outcome, {m.result.task: m.result for m in outcome.measurements}


def test_a_uniform_model_costs_log2_of_its_vocabulary_per_byte(make_bench):
    """Each document of k bytes: k - 1 bytes and the end are predicted, so k tokens over k - 1 bytes."""
    texts = ["abcde", "ünï", "x" * 100]
    _, found = run(make_bench(shards=FakeShards(web=("web", texts))), windows_per_document=9)
    sizes = [len(text.encode()) for text in texts]
    first = [1, 3, 1]  # bytes of the first token's text; half of a character decodes to U+FFFD, which has 3 bytes
    bits = sum(sizes) * np.log2(258)
    assert found["web"].value == pytest.approx(bits / (sum(sizes) - sum(first)), rel=1e-12)
    assert found["web"].n == 3
    assert found["web"].low <= found["web"].value <= found["web"].high


def test_a_perfect_model_costs_nothing_and_a_long_document_is_covered_once(make_bench):
    seen = FakeSubject(nats=lambda context, token: 0.0)
    text = "".join(chr(97 + i % 26) for i in range(1000))
    _, found = run(make_bench(seen, FakeShards(web=("web", [text]))), seq_length=64, windows_per_document=1000)
    assert found["web"].value == 0
    targets = [token for window in seen.asked for token in window[1:]]
    assert bytes(targets[:-1]).decode() == text[1:]
    assert targets[-1] == 256
    assert max(len(window) for window in seen.asked) == 65


def test_cost_is_weighted_by_bytes_not_by_documents(make_bench):
    """'a' costs 1 bit, 'b' 3 bits; the long document counts more."""
    subject = FakeSubject(nats=lambda context, token: np.log(2) * {97: 1, 98: 3, 256: 0}[token])
    _, found = run(make_bench(subject, FakeShards(web=("web", ["a" * 31, "b" * 11]))))
    assert found["web"].value == pytest.approx((30 * 1 + 10 * 3) / 40)


def test_domains_pool_their_sources_and_distractors_are_left_out(make_bench):
    shards = FakeShards(stdlib=("code", ["aaaa"]), codeio=("code", ["bbbbbb"]), wiki=("web", ["cc"]), noise=("noise", ["dddd"], True), empty=("web", []))
    outcome, found = run(make_bench(shards=shards))
    assert list(found) == ["codeio", "stdlib", "wiki", "all code"]
    assert found["all code"].n == 2
    pooled = next(m for m in outcome.measurements if m.result.task == "all code")
    parts = [m for m in outcome.measurements if m.result.task in ("codeio", "stdlib")]
    assert sum(pooled.numerators) == pytest.approx(sum(sum(part.numerators) for part in parts))
    assert {record["source"] for record in outcome.samples} == {"stdlib", "codeio", "wiki"}


def test_conversations_are_left_out_and_one_token_documents_too(make_bench):
    shards = FakeShards(sft=("math", ["question answer"], False, "chat"), wiki=("web", ["", "words"]))
    _, found = run(make_bench(shards=shards))
    assert {name: result.n for name, result in found.items()} == {"wiki": 1}


def test_the_draw_depends_on_the_seed_only(make_bench):
    shards = FakeShards(web=("web", [f"document number {i}" * 30 for i in range(50)]))
    first, again = (run(make_bench(shards=shards), documents=5)[1]["web"] for _ in range(2))
    assert first == again
    assert first.n == 5
    more = run(make_bench(shards=FakeShards(web=("web", [f"document number {i}" * 30 for i in range(50)]), other=("web", ["x" * 50]))), documents=5)[1]["web"]
    assert more.prompt_sha256 == first.prompt_sha256


def test_without_shards_it_says_what_to_do(make_bench):
    with pytest.raises(ConfigError, match="bits_per_byte: null"):
        run(make_bench())


def test_an_unknown_source_is_named(make_bench):
    with pytest.raises(ConfigError, match="'wkii'"):
        run(make_bench(shards=FakeShards(wiki=("web", ["abc"]))), sources=["wkii"])
